"""Divergences over top-K tokens and the bucket of the rest: numpy in float64, token by token."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from learner.diagnostics import batch_diagnostics
from learner.loss import ResponseTokens, is_unsure, loss_per_token
from tests.fakes import make_group
from tests.learner.test_diagnostics import config_of
from video_opd.config_learner import LossConfig
from video_opd.types import TeacherScores, TopK

R, V = 5, 7
MEDIAN = -1.0  # stands for the entropy that three rows of five have
ALL = slice(None)
HOW = [
    {},
    {"clamp": 0.4},
    {"divergence": "forward"},
    {"divergence": "jsd"},
    {"divergence": "jsd", "beta": 0.2},
    {"forward_kl_entropy": MEDIAN},
    {"forward_kl_entropy": MEDIAN, "clamp": 0.4},
]


def draw(of_student: bool, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student and teacher logits float64[R, V], and the K likeliest tokens of one of them."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, R, V)) * 1.5
    teacher[:2] /= 20  # two rows on which the teacher is unsure
    return student, teacher, np.argsort(-(student if of_student else teacher), axis=-1)[:, :k]


def softmax(rows: np.ndarray) -> np.ndarray:
    return np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)


def of_buckets(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities of one row's tokens `ids` and of all others together."""
    return np.array([*p[ids], sum(p[i] for i in range(V) if i not in ids)])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def entropy(q: np.ndarray) -> float:
    return -sum(a * math.log(a) for a in q if a > 0)


def literal(loss: LossConfig, p: np.ndarray, q: np.ndarray) -> tuple[float, np.ndarray]:
    """Value, and gradient in the logarithms of p: d/d log p_b, as if the p_b were free."""
    if loss.divergence == "forward" or (loss.forward_kl_entropy and entropy(q) >= loss.forward_kl_entropy):
        return kl(q, p), -q
    if loss.divergence == "jsd":
        m = loss.beta * q + (1 - loss.beta) * p
        # d/dp of beta KL(q, m) + (1 - beta) KL(p, m): the terms through m cancel
        gradient = (1 - loss.beta) * p * np.log(np.where(p > 0, p, 1) / np.where(m > 0, m, 1))
        return loss.beta * kl(q, m) + (1 - loss.beta) * kl(p, m), gradient
    ratio = np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1))
    ratio = ratio if loss.clamp is None else np.clip(ratio, -loss.clamp, loss.clamp)
    return float((p * ratio).sum()), p * ratio


def in_logits(of_buckets: np.ndarray, p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The gradient in one row's logits: log P_b = log of the sum of the softmax over a bucket's tokens."""
    places = [list(ids).index(i) if i in ids else len(ids) for i in range(V)]
    mass = np.bincount(places, p, minlength=len(ids) + 1)
    return np.array([of_buckets[b] * p[i] / mass[b] for i, b in enumerate(places)]) - p * of_buckets.sum()


@pytest.mark.parametrize("options", HOW, ids=str)
@pytest.mark.parametrize(("of", "k"), [("teacher", 1), ("teacher", 3), ("student", 3), ("student", V)])
def test_value_and_gradient_over_top_k_and_the_rest_are_the_enumerated_ones(of, k, options):
    student, teacher, ids = draw(of == "student", k)
    p, q = softmax(student), softmax(teacher)
    if "forward_kl_entropy" in options:
        entropies = [entropy(of_buckets(q[i], ids[i])) for i in range(R)]
        options = options | {"forward_kl_entropy": float(np.median(entropies)) - 1e-6}
    loss = LossConfig(kind="opd_topk", top_k=k, top_k_of=of, **options)
    given = np.log(np.take_along_axis(q, ids, 1))
    rows = [literal(loss, of_buckets(p[i], ids[i]), of_buckets(q[i], ids[i])) for i in range(R)]
    expected = np.stack([in_logits(rows[i][1], p[i], ids[i]) for i in range(R)])
    found, gradient = computed(loss, student, (ids, given))
    assert found.tolist() == pytest.approx([value for value, _ in rows], rel=1e-8)
    np.testing.assert_allclose(gradient, expected, atol=1e-9)
    assert np.abs(expected).max() > 0.01
    if k == V:  # the whole vocabulary: the divergence of opd_full, where that has no clamp
        whole, of_whole = computed(loss.model_copy(update={"kind": "opd_full"}), student, None, teacher)
        if loss.clamp is None:
            np.testing.assert_allclose(found, whole, rtol=1e-9)
            np.testing.assert_allclose(gradient, of_whole, atol=1e-9)


def computed(loss: LossConfig, student: np.ndarray, top: Any, teacher: Any = None) -> list[np.ndarray]:
    """The loss of each row and its gradient in the student's logits."""
    logits = torch.tensor(student, requires_grad=True)
    entropies = None if teacher is None else np.array([entropy(q) for q in softmax(teacher)])
    scores = TeacherScores(
        trajectory_id="",
        teacher_id="",
        teacher_logprobs=np.zeros(R),
        top_k=top and TopK(ids=top[0], logprobs=top[1]),
        entropy=entropies,
    )
    unsure = is_unsure([scores], loss)
    assert unsure is None or unsure.sum() == 3
    tokens = ResponseTokens(
        torch.zeros(R, dtype=torch.int64),
        torch.zeros(R),
        torch.zeros(R),
        top and (torch.from_numpy(top[0]), torch.from_numpy(top[1])),
        lambda rows: torch.from_numpy(teacher)[rows],
        is_forward=None if unsure is None else torch.from_numpy(unsure),
    )
    # two chunks, as the learner computes them
    parts = [loss_per_token(loss, logits[rows], tokens, rows)[0] for rows in (slice(0, 2), slice(2, R))]
    found = torch.cat(parts)
    return [found.detach().numpy(), torch.autograd.grad(found.sum(), logits)[0].numpy()]


@pytest.mark.parametrize("k", [1, 2, V])
def test_the_entropy_of_top_k_and_the_rest_is_at_most_the_whole_ones_and_decides(k):
    _, teacher, ids = draw(False, k)
    q = softmax(teacher)
    exact = [entropy(of_buckets(q[i], ids[i])) for i in range(R)]
    assert all(e <= entropy(q[i]) + 1e-12 for i, e in enumerate(exact))
    top = TopK(ids=ids, logprobs=np.log(np.take_along_axis(q, ids, 1)).astype(np.float32))
    group = make_group("p", (R,))
    scores = (TeacherScores(trajectory_id="p/0", teacher_id="t", teacher_logprobs=np.zeros(R), top_k=top),)
    for bound in exact:
        for threshold in (bound - 1e-5, bound + 1e-5):
            loss = LossConfig(kind="opd_topk", forward_kl_entropy=threshold)
            expected = [e >= threshold for e in exact]
            assert is_unsure(scores, loss).tolist() == expected  # pyright: ignore[reportOptionalMemberAccess]
    metrics = batch_diagnostics(
        [type(group)(group=group.group, scores=scores)],
        config_of(kind="opd_topk", forward_kl_entropy=float(np.median(exact)) - 1e-5),
        lambda ids: np.zeros(len(ids), bool),  # pyright: ignore[reportArgumentType]
    )
    assert metrics["learner/forward_kl_frac"] == 3 / 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "opd_full", "top_k_of": "student"}, "top_k_of does nothing for kind=opd_full"),
        ({"kind": "opd", "divergence": "jsd"}, "they are options of opd_topk and opd_full"),
        ({"kind": "grpo", "forward_kl_entropy": 1.0}, "they are options of opd_topk and opd_full"),
        ({"kind": "opd_topk", "divergence": "forward", "forward_kl_entropy": 1.0}, "leave one out"),
        (
            {"kind": "opd_topk", "divergence": "jsd", "clamp": 3.0},
            "only the reverse KL needs: set",
        ),
        ({"kind": "opd_full", "divergence": "forward", "beta": 0.1}, "beta does nothing"),
    ],
)
def test_options_without_an_effect_are_refused_in_one_line(options, said):
    (problem,) = LossConfig.model_construct(**options).problems()
    assert said in problem and "\n" not in problem
