"""What replaces functions of transformers computes the same; positions and attention bit for bit on a CPU."""

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from video_opd.models import qwen_vl
from video_opd.models.qwen_vl import adapt, attend, project, qwen3_positions

GRIDS = [(3, 4, 6), (1, 8, 2), (5, 2, 2), (2, 6, 6)]
MERGE, TEXT_TOKENS = 2, 4  # between frames
VISION: Any = SimpleNamespace(hidden_size=32, num_heads=2, _attn_implementation="sdpa")


def token_types(grid: tuple[int, int, int], after: int) -> list[int]:
    """Text before every frame, and `after` the last one."""
    frame = grid[1] * grid[2] // MERGE**2
    return ([0] * TEXT_TOKENS + [2] * frame) * grid[0] + [0] * after


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("which", [GRIDS, GRIDS[:1], GRIDS[:1] * 3], ids=["several", "one", "equal"])
def test_positions_are_those_of_transformers(side, which):
    """side: of the padding; None: no mask, so sequences of one length."""
    which = which if side else which[:1] * len(which)
    types = [torch.tensor(token_types(grid, 1 + 2 * i * bool(side))) for i, grid in enumerate(which)]

    def pad(rows: list[torch.Tensor]) -> Any:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side or "right")

    mask = pad([torch.ones_like(t) for t in types]) if side else None
    model: Any = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=MERGE))
    )
    model.get_vision_position_ids = MethodType(qwen3.Qwen3VLModel.get_vision_position_ids, model)
    grids: Any = torch.tensor(which)
    ids: Any = torch.zeros_like(pad(types))
    expected = qwen3.Qwen3VLModel.get_rope_index(model, ids, pad(types), None, grids.clone(), mask)
    positions, ahead = qwen3_positions(model, ids, pad(types), grids, mask)
    assert torch.equal(positions, expected[0]) and torch.equal(ahead, expected[1])
    assert positions.dtype == expected[0].dtype and len(positions.unique()) > 4


@pytest.mark.parametrize(
    "lengths", [[24], [24] * 5, [24, 8, 24, 1, 8, 8, 24]], ids=["one", "equal", "several"]
)
def test_attention_is_that_of_transformers_and_so_are_its_gradients(lengths):
    torch.manual_seed(0)
    attention, patches = qwen3.Qwen3VLVisionAttention(VISION), sum(lengths)
    states, angles = torch.randn(patches, 32), torch.randn(patches, 16)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def run(forward) -> list[torch.Tensor]:
        given = states.clone().requires_grad_()
        output = forward(given, cu_seqlens=cu_seqlens, position_embeddings=(angles.cos(), angles.sin()))
        trained = [given, *attention.parameters()]
        return [output, *torch.autograd.grad((output**3).sum(), trained)]

    for ours, theirs in zip(run(MethodType(attend, attention)), run(attention.forward), strict=True):
        assert torch.equal(ours, theirs)


def test_the_kernel_is_called_once_for_each_length(monkeypatch):
    calls = []

    def counted(query, key, value, scale):
        calls.append(tuple(query.shape))
        return query

    monkeypatch.setattr(qwen_vl, "scaled_dot_product_attention", counted)
    attention, cu_seqlens = qwen3.Qwen3VLVisionAttention(VISION), torch.tensor([0, 4, 6, 10, 12, 16])
    angles = torch.zeros(16, 16)
    attend(attention, torch.randn(16, 32), cu_seqlens, (angles.cos(), angles.sin()))
    assert calls == [(2, 2, 2, 16), (3, 2, 4, 16)]


def test_the_towers_first_layer_is_its_convolution():
    torch.manual_seed(0)
    convolution, patches = torch.nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4)), torch.randn(7, 3, 2, 4, 4)
    torch.testing.assert_close(project(convolution, patches), convolution(patches))


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "eager"])
def test_only_attention_that_transformers_loops_over_is_replaced(attention):
    own = object()
    blocks = [SimpleNamespace(attn=SimpleNamespace(forward=own)) for _ in range(2)]
    first = SimpleNamespace(proj=SimpleNamespace(forward=own))
    tower = SimpleNamespace(blocks=blocks, patch_embed=first)
    inner = SimpleNamespace(visual=tower, get_rope_index=own)
    adapt(SimpleNamespace(config=SimpleNamespace(model_type="qwen3_vl"), model=inner), attention)
    assert inner.get_rope_index is not own and first.proj.forward is not own
    assert [block.attn.forward is own for block in blocks] == [attention != "sdpa"] * 2
