"""The loss in chunks of rows against the loss at once: values, gradients and logits held at a time."""

import pytest
import torch

from learner.loss import ResponseTokens, loss_per_token
from video_opd.config_learner import OBJECTIVES, LossConfig
from video_opd.models.forward import by_chunks

ROWS, HIDDEN, V, K = 13, 8, 40, 5


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("chunk", [1, 4, 13, 50])
def test_chunks_change_neither_value_nor_gradient(kind, chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, V, bias=False).double()
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    targets, actor, advantage = torch.randint(V, (ROWS,)), torch.randn(ROWS) - 3, torch.randn(ROWS)
    teacher = torch.randn(ROWS, V)
    top = teacher.log_softmax(-1).topk(K)
    tokens = ResponseTokens(
        targets, actor, advantage, (top.indices, top.values), lambda rows: teacher[rows], advantage - 2
    )
    largest = 0

    def loss(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        nonlocal largest
        largest = max(largest, len(logits))
        return loss_per_token(LossConfig(kind=kind), logits, tokens, rows)

    def run(size: int, most_rows: int = ROWS) -> tuple[torch.Tensor, ...]:
        per_token, logprobs = by_chunks(head, hidden, loss, size, most_rows)
        weights = torch.linspace(0.5, 2, ROWS)
        gradients = torch.autograd.grad((per_token * weights).sum(), [hidden, head.weight])
        return per_token, logprobs, *gradients

    expected = run(ROWS)
    largest = 0
    for ours, whole in zip(run(chunk), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
    assert largest == min(chunk, ROWS)
    for ours, whole in zip(run(chunk, most_rows=ROWS + 20), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 13])
def test_every_rank_goes_through_the_head_equally_often(rows):
    """Under ZeRO-3 each pass gathers the head's weights, so all ranks must make equally many."""
    passes = 0
    linear = torch.nn.Linear(HIDDEN, V, bias=False)

    def head(part: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return linear(part)

    hidden = torch.randn(rows, HIDDEN, requires_grad=True)
    (values,) = by_chunks(head, hidden, lambda logits, _: (logits.logsumexp(-1),), 4, most_rows=13)
    assert passes == 4 and values.shape == (rows,)
    values.sum().backward()
    assert passes == 8
