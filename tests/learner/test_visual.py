"""Weights by visual advantage against a literal float64 reading of arXiv 2605.21924, eq. 2 to 6."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batching import plan_update
from learner.loss import ResponseTokens, divergence, loss_per_token, sampled_advantage, with_tail
from learner.visual import visual_weights
from tests.fakes import make_group
from video_opd.config_learner import LearnerConfig, LossConfig
from video_opd.types import ScoredGroup

NONE = np.zeros(0, np.int32)
LENGTHS = ((5, 9, 1), (7,), (11, 4))


def with_grey(group: ScoredGroup, seed: int) -> ScoredGroup:
    rng = np.random.default_rng(seed)
    grey = [-rng.exponential(1.0, len(s.teacher_logprobs)).astype(np.float32) for s in group.scores]
    scores = tuple(replace(s, grey_logprobs=g) for s, g in zip(group.scores, grey, strict=True))
    return replace(group, scores=scores)


def groups(seed: int) -> list[ScoredGroup]:
    made = [make_group(f"p{i}", n, top_k=3, seed=seed + i) for i, n in enumerate(LENGTHS)]
    return [with_grey(g, seed + i) for i, g in enumerate(made)]


def literal(group: ScoredGroup, alpha: float, p: float) -> list[list[float]]:
    """One token at a time."""
    pairs = [(s.teacher_logprobs.tolist(), np.asarray(s.grey_logprobs).tolist()) for s in group.scores]
    v = [[max(0.0, a - b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    means = [sum(of) / len(of) for of in v]
    mean = sum(means) / len(means)
    std = math.sqrt(sum((m - mean) ** 2 for m in means) / len(means))
    exps = [math.exp((m - mean) / (std + 1e-6)) for m in means]
    weights = []
    for exp, of in zip(exps, v, strict=True):
        n, n_high = len(of), math.ceil(p * len(of))
        high = set(sorted(range(n), key=lambda t: (-of[t], t))[:n_high])
        u = len(exps) * exp / sum(exps)
        each = (alpha * n / n_high, (1 - alpha) * n / (n - n_high)) if n > n_high else (1.0, 1.0)
        weights.append([u * each[0 if t in high else 1] for t in range(n)])
    return weights


@given(st.integers(0, 50), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([0.1, 0.2, 0.5, 0.95]))
def test_weights_are_those_of_the_paper_and_keep_the_mass_of_responses_and_prompts(seed, alpha, p):
    asked = groups(seed)
    found = iter(visual_weights(asked, LossConfig(visual_weight=alpha, visual_frac=p)))
    for group in asked:
        own = [next(found) for _ in group.scores]
        for weights, exact in zip(own, literal(group, alpha, p), strict=True):
            assert weights.dtype == np.float32
            np.testing.assert_allclose(weights, exact, rtol=1e-5)
        assert sum(w.mean() for w in own) == pytest.approx(len(own), rel=1e-5)
    assert next(found, None) is None


def test_a_prompt_whose_rollouts_are_all_suspended_has_no_weights():
    none = replace(make_group("p", (), suspended=(3,)))
    assert [w.tolist() for w in visual_weights([none], LossConfig(visual_weight=0.5))] == []


@pytest.mark.parametrize("kind", ["opd", "opd_topk", "opd_full"])
def test_each_token_s_distillation_loss_and_gradient_are_multiplied(kind):
    """The plan's rows through the loss, against unweighted losses times literal weights."""
    torch.manual_seed(0)
    asked, loss = groups(3), LossConfig(kind=kind, top_k=3, clamp=None if kind == "opd_full" else 1.0)
    weighted = loss.model_copy(update={"visual_weight": 0.6, "visual_frac": 0.3})
    (rows,) = plan_update(asked, weighted, LearnerConfig(micro_batch=8), 0, lambda _: NONE, 99).micro_batches
    exact = {s.trajectory_id: of for g in asked for s, of in zip(g.scores, literal(g, 0.6, 0.3), strict=True)}
    assert len(rows) == len(exact)
    for row in rows:
        n, scores = len(row.signal.advantage), row.scores
        assert scores and scores.top_k
        first = min(2, n - 1)
        logits = torch.randn(n, 50, dtype=torch.float64, requires_grad=True)
        teacher, targets = torch.randn(n, 50), torch.from_numpy(row.trajectory.response_token_ids).long()
        actor = torch.from_numpy(row.trajectory.actor_logprobs)
        top_k = torch.from_numpy(scores.top_k.ids).long(), torch.from_numpy(scores.top_k.logprobs)
        own = {name: torch.from_numpy(of) for name, of in vars(row.signal).items()}
        given_ = ResponseTokens(targets, actor, top_k=top_k, teacher_logits=lambda r, t=teacher: t[r], **own)
        found, _ = loss_per_token(weighted, logits[first:], given_, slice(first, n))
        learner = logits.log_softmax(-1)[torch.arange(n), targets]
        r = torch.from_numpy(sampled_advantage(scores.teacher_logprobs, actor.numpy(), loss))
        plain = {
            "opd": -(learner - actor).exp() * r,
            "opd_topk": divergence(*with_tail(logits, *top_k), clamp=1.0),
            "opd_full": divergence(logits.log_softmax(-1), teacher.log_softmax(-1)),
        }[kind]
        wanted = (plain * torch.tensor(exact[scores.trajectory_id]))[first:]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        gradients = [torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
