"""Attention of branches without masks, against softmax over all keys in float64."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from video_opd.models import trees
from video_opd.models.merged_attention import branch_attention, is_fused

PREFIX, BRANCHES, HEADS, WIDTH = 37, (5, 1, 12), 3, 8


def drawn(tokens: int) -> torch.Tensor:
    return torch.randn(1, HEADS, tokens, WIDTH, dtype=torch.float64, requires_grad=True)


def by_softmax(query, prefix, key, value, scale: float) -> torch.Tensor:
    """Row by row: a token sees the prefix, and of its branch what is not after it."""
    rows, start = [], 0
    for length in BRANCHES:
        for last in range(start, start + length):
            keys, values = (
                torch.cat([shared, own[:, :, start : last + 1]], dim=2)
                for shared, own in zip(prefix, (key, value), strict=True)
            )
            weights = (query[:, :, last : last + 1] @ keys.mT * scale).softmax(-1)
            rows.append(weights @ values)
        start += length
    return torch.cat(rows, dim=2)


def test_branches_have_the_attention_and_gradients_of_a_softmax_over_prefix_and_branch():
    torch.manual_seed(0)
    tokens, scale = sum(BRANCHES), 1 / math.sqrt(WIDTH)
    states = [drawn(n) for n in (tokens, PREFIX, PREFIX, tokens, tokens)]
    query, *prefix, key, value = states
    expected = by_softmax(query, prefix, key, value, scale)
    found = branch_attention(query, (prefix[0], prefix[1]), key, value, BRANCHES, scale)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(expected)
    for of_state in zip(
        torch.autograd.grad((found * weights).sum(), states),
        torch.autograd.grad((expected * weights).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(*of_state, rtol=1e-9, atol=1e-11)


def test_half_precision_on_a_gpu_packs_the_branches_of_a_tree_as_one_segment_without_masks(monkeypatch):
    assert is_fused("cuda:1", torch.bfloat16)
    assert not is_fused("cuda", torch.float32) and not is_fused("cpu", torch.bfloat16)
    two = [trees.Tree((0, 1), 9, (3, 2)), trees.Tree((2,), 4, (0,)), trees.Tree((3, 4), 0, (2, 2))]
    monkeypatch.setattr(trees, "is_fused", lambda *_: True)
    packing = trees.Packing(two, "sdpa", 1, torch.bfloat16, "cpu")
    assert packing.sizes == [9, 5, 4, 2, 2] and not packing._masks
    assert [call.branches for call in packing.calls] == [(), (3, 2), (), (), ()]
    assert trees.Packing(two[:1], "eager", 1, torch.bfloat16, "cpu").sizes == [9, 3, 2]


def test_a_packing_attends_in_the_order_of_its_tokens(monkeypatch):
    """One layer through `attend`, merged, against the same layer under masks."""
    tree = trees.Tree((0, 1, 2), PREFIX, BRANCHES)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=False)
    states = [torch.randn(1, HEADS, tree.num_tokens, WIDTH, dtype=torch.float64) for _ in range(3)]
    found = {}
    for fused in (True, False):
        monkeypatch.setattr(trees, "is_fused", lambda *_, fused=fused: fused)
        packing = trees.Packing([tree], "sdpa", 1, torch.float64, "cpu")
        attend = trees.ALL_ATTENTION_FUNCTIONS["sdpa"]
        found[fused] = attend(module, *states, None, packing=packing, scaling=0.3, dropout=0.0)[0].numpy()
    np.testing.assert_allclose(found[True], found[False], rtol=1e-10, atol=1e-12)
