"""One layer's attention of an 8B model by itself: for benchmarks.gpu_step."""

import statistics
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.command import Row
from benchmarks.gpu_check.part import Bench
from benchmarks.gpu_step_parts import clocked
from video_opd.models import trees
from video_opd.models.trees import Packing, Tree

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def packed(tree: Tree, device: str) -> Attend:
    """As the layers of a pass over the tree attend."""
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True, training=False)
    packing = Packing([tree], "sdpa", HEADS // KEY_HEADS, torch.bfloat16, device)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return lambda q, k, v: attend(module, q, k, v, None, packing=packing, scaling=WIDTH**-0.5)[0]


def under_one_mask(tree: Tree, device: str) -> tuple[Attend, float]:
    """All tokens in one call under a mask; the pairs of tokens that it lets attend."""
    places, branch = torch.arange(tree.num_tokens, device=device), tree.branches[0]
    segment = places.sub(tree.prefix).div(branch, rounding_mode="floor").clamp(-1)
    mask = ((segment[:, None] == segment) | (segment == -1)).tril()
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), float(mask.sum())


def measure(bench: Bench, tokens: int, pairs: float, attend: Attend, repeats: int) -> Row:
    """Milliseconds forward, and with the backward pass; operations of `pairs` a second, forward."""
    states = [
        torch.randn(1, n, tokens, WIDTH, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
        for n in (HEADS, KEY_HEADS, KEY_HEADS)
    ]

    def both() -> None:
        attend(*states).sum().backward()

    with torch.no_grad():
        forward_s = statistics.median([clocked(lambda: attend(*states)) for _ in range(repeats + 2)][2:])
    both_s = statistics.median([clocked(both) for _ in range(repeats + 2)][2:])
    tera = 4 * HEADS * WIDTH * pairs / 1e12
    return {"forward_ms": 1e3 * forward_s, "both_ms": 1e3 * both_s, "TFLOP/s": tera / forward_s}


def attention(bench: Bench, repeats: int) -> list[Row]:
    prefix, branch, number = (64, 16, 8) if bench.tiny else (8192, 160, 8)
    tree = Tree(tuple(range(number)), prefix, (branch,) * number)
    masked, pairs = under_one_mask(tree, bench.device)
    with patch.object(trees, "is_fused", lambda *_: False):
        by_branch = packed(tree, bench.device)
    alone, total = prefix + branch, tree.num_tokens
    ways = {
        "one sequence": (alone, alone**2 / 2, packed(Tree((0,), alone, (0,)), bench.device)),
        "tree": (total, pairs, packed(tree, bench.device)),
        "tree, each branch under a mask": (total, pairs, by_branch),
        "tree, all under one mask": (total, pairs, masked),
    }
    rows = []
    for name, (tokens, of_way, attend) in ways.items():
        rows.append({"case": f"attention: {name}"} | measure(bench, tokens, of_way, attend, repeats))
    return rows
