"""Objectives of softmax(logits / T) without banned ids, against float64 readings that leave them out."""

import math

import numpy as np
import pytest
import torch

from learner.loss import ResponseTokens, loss_per_token
from video_opd.config_file import load_demo
from video_opd.config_learner import LossConfig
from video_opd.models.forward import token_entropy
from video_opd.models.policy import Policy

R, V = 3, 7
BANNED, ALLOWED = (1, 4), (0, 2, 3, 5, 6)
ALL = slice(None)
ACTOR, ADVANTAGE = torch.tensor([-1.0, -0.5, -2.0]).double(), torch.tensor([0.7, -0.2, 1.1]).double()
TARGETS = torch.tensor([0, 5, 3])


def raw(seed: int) -> torch.Tensor:
    """float64[R, V] logits in which banned ids are likely."""
    logits = 1.5 * torch.randn(R, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, BANNED] += 2.0
    return logits


def literal(row: torch.Tensor, temperature: float) -> dict[int, float]:
    """The probability of each allowed id."""
    weights = {i: math.exp(float(row[i]) / temperature) for i in ALLOWED}
    return {i: w / sum(weights.values()) for i, w in weights.items()}


def kl(p: dict[int, float], q: dict[int, float]) -> float:
    return sum(p[i] * math.log(p[i] / q[i]) for i in p)


def mixed(p: dict[int, float], q: dict[int, float]) -> dict[int, float]:
    return {i: (p[i] + q[i]) / 2 for i in p}


def bucketed(p: dict[int, float], ids: list[int]) -> dict[int, float]:
    """-1: all other ids."""
    return {i: p[i] for i in ids} | {-1: sum(p[i] for i in p if i not in ids)}


def of_row(loss: LossConfig, p: dict[int, float], q: dict[int, float], row: int) -> float:
    """docs/algorithm.md, at one state: p the student's distribution, q the teacher's."""
    token = int(TARGETS[row])
    rho, a = p[token] / math.exp(ACTOR[row]), float(ADVANTAGE[row])
    match loss.kind, loss.divergence:
        case "opd", _:
            return -rho * a
        case "opd_topk", _:
            ids = sorted(q, key=lambda i: -q[i])[:2]
            return kl(bucketed(p, ids), bucketed(q, ids))
        case "opd_full", "reverse":
            return kl(p, q)
        case ("opd_full", "forward") | ("off_policy_fkd", _):
            return kl(q, p)
        case "opd_full", "jsd":
            return kl(p, mixed(p, q)) / 2 + kl(q, mixed(p, q)) / 2
        case "grpo", _:
            x = q[token] / p[token]
            return -min(rho * a, min(max(rho, 0.8), 1.2) * a) + loss.kl_coef * (x - 1 - math.log(x))
        case "off_policy_rkd", _:
            return -math.log(q[token] / p[token])
        case "sft", _:
            return -math.log(p[token])
    raise AssertionError(loss.kind)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "options",
    [
        *({"kind": kind} for kind in ("opd", "opd_topk", "off_policy_rkd", "off_policy_fkd", "sft")),
        *({"kind": "opd_full", "divergence": how} for how in ("reverse", "forward", "jsd")),
        {"kind": "grpo", "kl_coef": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_objective_is_that_of_the_scaled_distributions_without_the_banned_ids(options, temperature):
    loss = LossConfig(**{"top_k": 2, **options})
    policy = Policy(temperature, BANNED, "cpu")
    student, teacher = raw(0).requires_grad_(), raw(1)
    known = policy(teacher.clone()).log_softmax(-1)
    top = known.topk(2)
    tokens = ResponseTokens(
        *(TARGETS, ACTOR, ADVANTAGE, (top.indices, top.values)),
        teacher_logits=lambda rows: policy(teacher[rows].clone()),
        teacher_logprobs=known[torch.arange(R), TARGETS],
    )
    found, _ = loss_per_token(loss, policy(student.clone()), tokens, ALL)
    p, q = ([literal(row, temperature) for row in of.detach()] for of in (student, teacher))
    assert found.tolist() == pytest.approx([of_row(loss, p[i], q[i], i) for i in range(R)], rel=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.isfinite().all() and gradient.abs().max() > 0.01
    assert (gradient[:, BANNED] == 0).all(), "nothing is learned about what cannot be sampled"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_expected_sampled_gradient_is_that_of_the_kl_of_the_scaled_distributions(temperature):
    """Over all tokens that can be sampled, with the actor's and the teacher's log-probs of the policy."""
    policy, student = Policy(temperature, BANNED, "cpu"), raw(2).requires_grad_()
    p = (student[:, ALLOWED] / temperature).log_softmax(-1)
    q = (raw(3)[:, ALLOWED] / temperature).log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), student)
    expected = torch.zeros_like(exact)
    for place, token in enumerate(ALLOWED):
        actor = p.detach()[:, place]
        tokens = ResponseTokens(torch.full((R,), token), actor, q[:, place] - actor)
        loss, learner = loss_per_token(LossConfig(kind="opd"), policy(student.clone()), tokens, ALL)
        torch.testing.assert_close(learner, actor)
        expected += torch.autograd.grad((actor.exp() * loss).sum(), student)[0]
    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-12)
    assert exact.abs().max() > 0.1


def test_at_temperature_1_other_logits_keep_their_bits_and_memory_and_entropy_is_finite():
    logits = raw(4).float()
    kept = logits.clone()
    scaled = Policy(1.0, BANNED, "cpu")(logits)
    assert scaled.data_ptr() == logits.data_ptr()
    assert torch.equal(scaled[:, ALLOWED], kept[:, ALLOWED])
    p = [literal(row, 1.0) for row in kept]
    entropy = [-sum(x * math.log(x) for x in of_row.values()) for of_row in p]
    assert token_entropy(scaled).tolist() == pytest.approx(entropy, rel=1e-6)


def test_bfloat16_logits_are_divided_in_float32():
    logits = (10 * raw(5)).bfloat16()
    exact = logits.float() / 0.9
    assert torch.equal(Policy(0.9, BANNED, "cpu")(logits)[:, ALLOWED], exact[:, ALLOWED])
    assert np.abs((logits / 0.9).float() - exact).max() > 0.01, "bfloat16 would round"


def test_the_learner_of_sft_stays_at_temperature_1():
    temperature = "rollout.temperature=0.9"
    assert load_demo([temperature]).learner_temperature == 0.9
    assert load_demo([temperature, "loss={kind: sft}"]).learner_temperature == 1.0
