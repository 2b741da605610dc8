"""The losses against exact enumeration over a small vocabulary."""

import math

import numpy as np
import pytest
import torch

from learner.loss import (
    MIN_TAIL,
    ResponseTokens,
    divergence,
    loss_per_token,
    sampled_advantage,
    sampled_loss,
    with_tail,
)
from video_opd.config_learner import LossConfig

V = 6
ALL = slice(None)
STATES = 3


def distributions(seed: int, rows: int = STATES, vocabulary: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits (a leaf) and teacher log-probs, float64[rows, vocabulary]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    teacher = (1.5 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return logits.requires_grad_(), teacher


def reverse_kl(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of each row, summed over the whole vocabulary."""
    student = logits.log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def gradient(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, leaf)[0]


def teacher_top_k(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, ids = teacher.topk(k, dim=-1)
    return ids, logprobs


def topk_loss(
    logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor, clamp: float | None = None
) -> torch.Tensor:
    return divergence(*with_tail(logits, ids, teacher), clamp=clamp)


def bucketed_kl(student_logits: np.ndarray, teacher_logprobs: np.ndarray, ids: np.ndarray) -> float:
    """One row, literally: the KL of both distributions over the tokens `ids` and one bucket for the rest."""
    p = np.exp(student_logits) / np.exp(student_logits).sum()
    q = np.exp(teacher_logprobs)
    inside = [int(i) for i in ids]
    outside = [i for i in range(len(p)) if i not in inside]
    buckets_p = [p[i] for i in inside] + [sum(p[i] for i in outside)]
    buckets_q = [q[i] for i in inside] + [sum(q[i] for i in outside)]
    assert math.isclose(sum(buckets_p), 1.0) and math.isclose(sum(buckets_q), 1.0)
    return sum(a * math.log(a / b) for a, b in zip(buckets_p, buckets_q, strict=True))


def test_expected_sampled_gradient_is_the_gradient_of_the_reverse_kl():
    logits, teacher = distributions(0)
    exact = gradient(reverse_kl(logits, teacher).sum(), logits)

    probabilities = logits.detach().softmax(-1)
    expected = torch.zeros_like(exact)
    for token in range(V):
        targets = torch.full((STATES,), token)
        actor = logits.detach().log_softmax(-1)[:, token]
        advantage = teacher[:, token] - actor
        loss, _ = loss_per_token(
            LossConfig(kind="opd"), logits, ResponseTokens(targets, actor, advantage), ALL
        )
        expected += gradient((probabilities[:, token] * loss).sum(), logits)

    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-12)
    assert exact.abs().max() > 0.1  # the comparison is not of zeros


def test_expected_sampled_gradient_off_policy_is_that_of_the_student_not_of_the_actor():
    """With rho_t, tokens drawn from pi_old give the gradient of -sum_a pi_theta(a) r(a)."""
    logits, teacher = distributions(1)
    actor_logits, _ = distributions(2)
    actor = actor_logits.detach().log_softmax(-1)
    advantage = teacher - actor
    exact = gradient(-(logits.softmax(-1) * advantage).sum(), logits)

    expected = torch.zeros_like(exact)
    for token in range(V):
        loss = sampled_loss(logits.log_softmax(-1)[:, token], actor[:, token], advantage[:, token])
        expected += gradient((actor[:, token].exp() * loss).sum(), logits)

    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-12)


def test_monte_carlo_gradient_converges_like_one_over_root_n():
    """The error over 64 repetitions is as the enumerated variance predicts, at n and at 16 n samples."""
    logits, teacher = distributions(3, rows=1)
    exact = gradient(reverse_kl(logits, teacher).sum(), logits)
    logprobs = logits.detach().log_softmax(-1)[0]
    actor_all, teacher_all = logprobs.numpy().astype(np.float32), teacher[0].numpy().astype(np.float32)

    def estimate(tokens: torch.Tensor) -> torch.Tensor:
        actor = torch.from_numpy(actor_all)[tokens]
        advantage = torch.from_numpy(
            sampled_advantage(teacher_all[tokens.numpy()], actor.numpy(), LossConfig())
        )
        loss, _ = loss_per_token(
            LossConfig(), logits.expand(len(tokens), V), ResponseTokens(tokens, actor, advantage), ALL
        )
        return gradient(loss.mean(), logits)

    each = torch.cat([estimate(torch.tensor([token])) for token in range(V)])
    variance = float(
        (logprobs.exp()[:, None] * (each - exact) ** 2).sum()
    )  # trace of the covariance of one sample

    generator = torch.Generator().manual_seed(0)
    errors = {}
    for n in (100, 1600):
        draws = torch.multinomial(logprobs.exp(), 64 * n, replacement=True, generator=generator).split(n)
        estimates = torch.cat([estimate(tokens) for tokens in draws])
        errors[n] = float(((estimates - exact) ** 2).sum(-1).mean().sqrt())
        # 64 squared errors of V - 1 free components: relative deviation below 1 / sqrt(32), so 4 sigma
        # of the root are 35 %
        assert errors[n] == pytest.approx(math.sqrt(variance / n), rel=0.35)
        # and no bias: the mean of all repetitions is within 5 standard errors
        assert float((estimates.mean(0) - exact).norm()) < 5 * math.sqrt(variance / (64 * n))
    assert errors[1600] < errors[100] / 2


def test_topk_over_the_whole_vocabulary_is_the_exact_reverse_kl():
    logits, teacher = distributions(4)
    loss = topk_loss(logits, *teacher_top_k(teacher, V))
    torch.testing.assert_close(loss, reverse_kl(logits, teacher), rtol=1e-10, atol=1e-12)
    exact = gradient(reverse_kl(logits, teacher).sum(), logits)
    torch.testing.assert_close(gradient(loss.sum(), logits), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, V - 1])
def test_topk_is_the_kl_of_the_distributions_with_one_bucket_for_the_rest(k):
    logits, teacher = distributions(5)
    ids, logprobs = teacher_top_k(teacher, k)
    loss = topk_loss(logits, ids, logprobs)
    literal = [
        bucketed_kl(logits.detach()[i].numpy(), teacher[i].numpy(), ids[i].numpy()) for i in range(STATES)
    ]
    assert loss.tolist() == pytest.approx(literal, rel=1e-10)
    assert min(literal) > 1e-3


@pytest.mark.parametrize("k", [1, 3, V])
def test_topk_gradient_is_that_of_finite_differences(k):
    logits, teacher = distributions(6)
    ids, logprobs = teacher_top_k(teacher, k)
    assert torch.autograd.gradcheck(lambda x: topk_loss(x, ids, logprobs), (logits,), eps=1e-6, atol=1e-7)


def test_topk_in_float32_agrees_with_the_literal_reading_in_float64():
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(20, 200, generator=generator)
    teacher = (3 * torch.randn(20, 200, generator=generator, dtype=torch.float64)).log_softmax(-1)
    ids, logprobs = teacher_top_k(teacher, 16)
    loss = topk_loss(logits, ids, logprobs.float())
    literal = [bucketed_kl(logits[i].double().numpy(), teacher[i].numpy(), ids[i].numpy()) for i in range(20)]
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(literal, rel=1e-4)


def test_moving_student_mass_out_of_the_teachers_set_raises_the_topk_loss():
    _, teacher = distributions(8, rows=1)
    ids, logprobs = teacher_top_k(teacher, 3)
    outside = next(t for t in range(V) if t not in ids[0].tolist())

    def moved(share: float) -> torch.Tensor:
        """The teacher's own distribution with this share of the set's mass on one token outside of it."""
        student = teacher[0].exp().clone()
        student[ids[0]] *= 1 - share
        student[outside] += 1 - student.sum()
        return student.log()[None]

    losses = [topk_loss(moved(share), ids, logprobs).item() for share in (0.0, 0.3, 0.6, 0.9)]
    assert losses[0] == pytest.approx(0.0, abs=1e-12)
    assert losses == sorted(losses) and losses[-1] - losses[0] > 0.5
    # what it guards against: without the tail bucket the same moves lower the sum
    student = [moved(share)[0, ids[0]] for share in (0.0, 0.3, 0.6)]
    without_tail = [float((s.exp() * (s - logprobs[0])).sum()) for s in student]
    assert without_tail == sorted(without_tail, reverse=True)


def test_descending_the_topk_gradient_takes_mass_back_from_the_tail():
    logits, teacher = distributions(9, rows=1)
    ids, logprobs = teacher_top_k(teacher, 3)
    outside = [t for t in range(V) if t not in ids[0].tolist()]
    with torch.no_grad():
        logits[0, outside] += 4.0
    assert (gradient(topk_loss(logits, ids, logprobs).sum(), logits)[0, outside] > 0).all()


def test_a_teacher_with_all_its_mass_in_the_set_gives_a_finite_loss_and_gradient():
    """float32 top-K log-probs may even sum to slightly more than 1."""
    logits, _ = distributions(10, rows=1)
    ids = torch.tensor([[2, 4]])
    logprobs = torch.tensor([[0.75, 0.25]]).log() + 1e-6
    loss = topk_loss(logits, ids, logprobs)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient(loss.sum(), logits)).all()
    p = logits.detach().softmax(-1)[0]
    tail = float(1 - p[2] - p[4])
    literal = sum(
        float(p[i] * (p[i].log() - q)) for i, q in zip((2, 4), logprobs[0], strict=True)
    ) + tail * math.log(tail / MIN_TAIL)
    assert loss.item() == pytest.approx(literal, rel=1e-6)


@pytest.mark.parametrize("k", [2, V])
def test_a_student_equal_to_the_teacher_has_no_topk_loss_and_no_gradient(k):
    logits, _ = distributions(11)
    loss = topk_loss(logits, *teacher_top_k(logits.detach().log_softmax(-1), k))
    assert loss.abs().max().item() < 1e-12
    assert gradient(loss.sum(), logits).abs().max().item() < 1e-12


def test_a_student_equal_to_the_teacher_has_no_advantage_and_no_sampled_gradient():
    logits, _ = distributions(12)
    targets = torch.tensor([0, 3, 5])
    logprobs = logits.detach().log_softmax(-1)[torch.arange(STATES), targets]
    advantage = sampled_advantage(logprobs.numpy(), logprobs.numpy(), LossConfig(center="batch", clamp=3.0))
    assert (advantage == 0).all()
    loss, _ = loss_per_token(
        LossConfig(), logits, ResponseTokens(targets, logprobs, torch.from_numpy(advantage)), ALL
    )
    assert (loss == 0).all() and (gradient(loss.sum(), logits) == 0).all()


TEACHER = np.array([-1.0, -9.0, -0.5, -2.0], dtype=np.float32)
ACTOR = np.array([-2.0, -1.0, -0.5, -1.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, -8.0, 0.0, -1.0]),
        ({"clamp": 3.0}, [1.0, -3.0, 0.0, -1.0]),
        ({"clamp": 0.5}, [0.5, -0.5, 0.0, -0.5]),
        ({"center": "batch"}, [3.0, -6.0, 2.0, 1.0]),
        ({"clamp": 3.0, "center": "batch"}, [1.75, -2.25, 0.75, -0.25]),  # clamped first, so the mean is zero
    ],
)
def test_r_t_is_teacher_minus_actor_with_its_options(options, expected):
    advantage = sampled_advantage(TEACHER, ACTOR, LossConfig(**options))
    assert advantage.dtype == np.float32
    assert advantage.tolist() == pytest.approx(expected)


def test_a_bounded_ratio_scales_by_the_bound_and_stops_the_gradient_beyond_it():
    learner = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    actor = torch.tensor(
        [-1.0 - math.log(3.0), -1.0 + math.log(2.0)], dtype=torch.float64
    )  # ratios 3 and 1/2
    advantage = torch.tensor([-0.7, 0.4], dtype=torch.float64)

    free = sampled_loss(learner, actor, advantage)
    assert free.tolist() == pytest.approx([2.1, -0.2])
    assert gradient(free.sum(), learner).tolist() == pytest.approx([2.1, -0.2])

    bounded = sampled_loss(learner, actor, advantage, max_ratio=2.0)
    assert bounded.tolist() == pytest.approx([1.4, -0.2])
    assert gradient(bounded.sum(), learner).tolist() == pytest.approx([0.0, -0.2])


def test_loss_per_token_passes_the_ratio_bound_and_returns_the_learners_logprobs():
    logits, _ = distributions(13)
    targets = torch.tensor([1, 0, 4])
    logprobs = logits.detach().log_softmax(-1)[torch.arange(STATES), targets]
    loss, learner = loss_per_token(
        LossConfig(max_ratio=1.5), logits, ResponseTokens(targets, logprobs - 2.0, torch.ones(STATES)), ALL
    )
    assert loss.tolist() == pytest.approx([-1.5] * STATES)
    torch.testing.assert_close(learner, logprobs)
    assert not learner.requires_grad


def test_loss_per_token_computes_the_topk_loss_when_configured():
    logits, teacher = distributions(14)
    top_k = teacher_top_k(teacher, 2)
    loss, learner = loss_per_token(
        LossConfig(kind="opd_topk", top_k=2),
        logits,
        ResponseTokens(torch.tensor([1, 0, 4]), torch.zeros(STATES), torch.ones(STATES), top_k),
        ALL,
    )
    torch.testing.assert_close(loss, topk_loss(logits, *top_k))
    torch.testing.assert_close(
        learner, logits.detach().log_softmax(-1)[torch.arange(STATES), torch.tensor([1, 0, 4])]
    )


def test_topk_clamp_bounds_what_a_very_sure_teacher_can_do():
    """Gradient with clamp = sum over buckets of grad pi(b) * clip(log-ratio), written out in float64."""
    torch.manual_seed(5)
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(7)[:3] for _ in range(4)])
    teacher = torch.tensor([0.9, 0.0999, 1e-5], dtype=torch.float64).log().expand(4, 3)
    clamp = 1.5
    (gradient,) = torch.autograd.grad(topk_loss(logits, ids, teacher, clamp).sum(), logits)
    probabilities = logits.softmax(-1)
    buckets = torch.cat(
        [probabilities.gather(1, ids), 1 - probabilities.gather(1, ids).sum(1, keepdim=True)], 1
    )
    target = torch.cat([teacher.exp(), 1 - teacher.exp().sum(1, keepdim=True)], 1)
    ratio = (buckets / target).log().detach()
    assert (ratio.abs() > clamp).any()
    (expected,) = torch.autograd.grad((buckets * ratio.clip(-clamp, clamp)).sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-9)
    (free,) = torch.autograd.grad(topk_loss(logits, ids, teacher).sum(), logits)
    assert not torch.allclose(gradient, free, atol=1e-3)
