"""Attention of a tree's branches to their prefix and to themselves, without masks and copies of keys.

The branches together ask the prefix, and each itself, causally: two softmaxes, which their sums join.
Backward each part is what a fused kernel computes from the joined output and sums, as in ring attention (Liu,
Zaharia and Abbeel, arXiv 2310.01889).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

HALF = (torch.bfloat16, torch.float16)  # for other dtypes a GPU has no flash attention
_aten: Any = torch.ops.aten


def is_fused(device: Any, dtype: torch.dtype) -> bool:
    return torch.device(device).type == "cuda" and dtype in HALF


class _Part(NamedTuple):
    """One call of a kernel."""

    output: torch.Tensor  # [1, heads, rows, width]
    log_sum: torch.Tensor  # float32[1, heads, rows]
    further: tuple[Any, ...]  # what its backward call takes beside


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> _Part:
    if query.device.type == "cpu":  # as a reference: for heads as many as key heads
        found = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return _Part(found[0], found[1], ())
    output, log_sum, *further = _aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return _Part(output, log_sum, tuple(further[:6]))


def _backward(grad: torch.Tensor, states: Sequence[torch.Tensor], part: _Part, causal: bool, scale: float):
    """Gradients of query, key and value. part: with the output and the sums of all parts together."""
    if grad.device.type == "cpu":
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, *states, part.output, part.log_sum, 0.0, causal, scale=scale)
    *sizes, seed, offset = part.further
    backward = _aten._scaled_dot_product_flash_attention_backward
    how = (*sizes, 0.0, causal, seed, offset)
    return backward(grad, *states, part.output, part.log_sum, *how, scale=scale)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        prefix_key: torch.Tensor,
        prefix_value: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        to_prefix = _forward(query, prefix_key, prefix_value, False, scale)
        branches = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        inside = [_forward(q, k, v, True, scale) for q, k, v in branches]
        log_sums = torch.cat([part.log_sum for part in inside], dim=2)
        outputs = torch.cat([part.output for part in inside], dim=2)
        log_sum = torch.logaddexp(to_prefix.log_sum, log_sums)
        shares = ((part - log_sum).exp()[..., None] for part in (to_prefix.log_sum, log_sums))
        output = (next(shares) * to_prefix.output + next(shares) * outputs).to(query.dtype)
        ctx.save_for_backward(query, prefix_key, prefix_value, key, value, output, log_sum)
        ctx.lengths, ctx.scale = lengths, scale
        ctx.further = [part.further for part in (to_prefix, *inside)]
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, prefix_key, prefix_value, key, value, output, log_sum = ctx.saved_tensors
        (grad,), (of_prefix, *of_branches) = grads, ctx.further
        whole = _Part(output, log_sum, of_prefix)
        of_query, of_prefix_key, of_prefix_value = _backward(
            grad, (query, prefix_key, prefix_value), whole, False, ctx.scale
        )
        split = [states.split(ctx.lengths, dim=2) for states in (grad, query, key, value, output, log_sum)]
        inside = [
            _backward(g, states, _Part(o.contiguous(), sums.contiguous(), further), True, ctx.scale)
            for (g, *states, o, sums), further in zip(zip(*split, strict=True), of_branches, strict=True)
        ]
        own, of_key, of_value = (torch.cat(parts, dim=2) for parts in zip(*inside, strict=True))
        return of_query + own, of_prefix_key, of_prefix_value, of_key, of_value, None, None


def branch_attention(
    query: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """[1, heads, N, width] of branches of these lengths, N tokens together.

    query: [1, heads, N, width]; key, value: [1, key heads, N, width]; prefix: its keys and values.
    """
    return _Merged.apply(query, *prefix, key, value, tuple(lengths), scale)  # pyright: ignore
