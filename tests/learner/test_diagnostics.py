"""Diagnostics of an update against numbers by hand and exact enumeration."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from learner.diagnostics import (
    TimestampTokens,
    TokenRecords,
    batch_diagnostics,
    policy_diagnostics,
    reverse_kl,
)
from tests.fakes import make_group
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.config_learner import LossConfig
from video_opd.models.forward import token_entropy

VOCABULARY = ["From", "Ġ", "1", "23", ".", "Ġ4", "Ġseconds", "<|im_end|>"]


class Tokenizer:
    def __len__(self) -> int:
        return len(VOCABULARY)

    def convert_ids_to_tokens(self, ids) -> list[str]:
        return [VOCABULARY[i] for i in ids]


@pytest.fixture(scope="module")
def is_time() -> TimestampTokens:
    return TimestampTokens(Tokenizer())


def config_of(**loss: Any) -> Config:
    config = load_config("configs/demo.yaml")
    return config.model_copy(update={"loss": LossConfig(**loss)})


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["From", "Ġ", "1", ".", "23", "Ġseconds", "."], [0, 0, 1, 1, 1, 0, 0]),
        (["Ġ4", "."], [1, 0]),
        ([".", "1"], [0, 1]),
        (["1", "."], [1, 0]),
        (["From"], [0]),
        (["1", ".", "Ġ", "."], [1, 0, 0, 0]),
    ],
)
def test_timestamps_are_digits_and_the_point_between_them(is_time, tokens, expected):
    ids = np.array([VOCABULARY.index(t) for t in tokens], np.int32)
    assert is_time(ids).tolist() == [bool(e) for e in expected]


def test_both_estimates_of_the_reverse_kl_are_unbiased_and_split_without_a_rest():
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(5, dtype=torch.float64).log_softmax(-1),
        torch.randn(5, dtype=torch.float64).log_softmax(-1),
    )
    exact = float((student.exp() * (student - teacher)).sum())
    log_ratio = (teacher - student).numpy()
    probabilities = student.exp().numpy()
    each = [reverse_kl(np.array([r]), np.array([True])) for r in log_ratio]
    for name in ("learner/reverse_kl", "learner/reverse_kl_k3"):
        assert sum(
            p * metrics[name] for p, metrics in zip(probabilities, each, strict=True)
        ) == pytest.approx(exact)
    assert all(metrics["learner/reverse_kl_k3"] >= 0 for metrics in each) and min(log_ratio) < 0 < max(
        log_ratio
    )
    metrics = reverse_kl(log_ratio, np.array([True, False, True, False, False]))
    assert metrics["learner/reverse_kl_time"] == pytest.approx(-(log_ratio[0] + log_ratio[2]) / 2)
    assert metrics["learner/reverse_kl_rest"] == pytest.approx(
        -(log_ratio[1] + log_ratio[3] + log_ratio[4]) / 3
    )
    assert "learner/reverse_kl_rest" not in reverse_kl(log_ratio, np.ones(5, bool))


def test_entropy_is_that_of_the_distribution():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert token_entropy(logits).tolist() == pytest.approx([np.log(4), 0.0], abs=1e-6)


def records(ratios: list[float]) -> TokenRecords:
    actor = np.full(len(ratios), -2.0, np.float32)
    entropy = np.linspace(0, 1, len(ratios), dtype=np.float32)
    learner = actor + np.log(ratios).astype(np.float32)
    return TokenRecords(learner, actor, entropy, np.zeros(len(ratios), np.float32))


def test_policy_diagnostics_by_hand():
    tokens = records([0.5, 1.0, 1.1, 3.0])
    metrics = policy_diagnostics(tokens, LossConfig(kind="opd", max_ratio=2.0))
    assert metrics["learner/entropy"] == pytest.approx(0.5)
    assert (metrics["learner/ratio_min"], metrics["learner/ratio_max"]) == (
        pytest.approx(0.5),
        pytest.approx(3.0),
    )
    assert metrics["learner/ratio_p50"] == pytest.approx(1.05)
    assert metrics["learner/logprob_gap_max"] == pytest.approx(np.log(3.0), rel=1e-5)
    assert metrics["learner/ratio_truncated_frac"] == 0.25
    assert policy_diagnostics(tokens, LossConfig(kind="grpo"))["learner/ratio_truncated_frac"] == 0.5
    assert "learner/ratio_truncated_frac" not in policy_diagnostics(tokens, LossConfig(kind="opd"))
    assert policy_diagnostics(tokens, LossConfig(kind="sft")).keys() == {"learner/entropy"}, (
        "nobody sampled: there is no ratio"
    )


def test_demonstrations_count_in_their_own_likelihood_alone():
    own = records([0.5, 1.0, 1.1, 3.0])
    shown = TokenRecords(*np.array([[-0.25, -0.75], [0.0, 0.0], [9.0, 9.0], [1.0, 1.0]], np.float32))
    loss = LossConfig(kind="opd", on_policy_frac=0.5)
    both = policy_diagnostics(TokenRecords.of_all_ranks([own, shown], world_size=1), loss)
    assert both.pop("learner/demonstration_nll") == 0.5
    assert both == policy_diagnostics(own, loss)


def test_parts_of_a_rank_are_put_together():
    whole = TokenRecords.of_all_ranks([records([1.0, 2.0]), records([]), records([3.0])], world_size=1)
    assert np.exp(whole.learner_logprobs - whole.actor_logprobs) == pytest.approx([1.0, 2.0, 3.0])
    assert len(whole.entropy) == 3


def test_batch_diagnostics_tell_what_the_objective_has(is_time):
    group = make_group("p", (3, 5))
    short = [
        replace(t, response_token_ids=t.response_token_ids % len(VOCABULARY))
        for t in group.group.trajectories
    ]
    group = replace(group, group=replace(group.group, trajectories=tuple(short)))
    scores = tuple(
        replace(s, entropy=np.full(len(s.teacher_logprobs), 0.25, np.float32)) for s in group.scores
    )
    metrics = batch_diagnostics(
        [replace(group, scores=scores)], config_of(kind="opd", clamp=0.1, center="batch"), is_time
    )
    log_ratio = np.concatenate(
        [s.teacher_logprobs - t.actor_logprobs for s, t in zip(scores, short, strict=True)]
    )
    assert metrics["learner/num_tokens"] == 8 and metrics["learner/response_tokens"] == 4
    assert metrics["teacher/entropy"] == 0.25
    assert metrics["learner/reverse_kl"] == pytest.approx(-log_ratio.mean(), rel=1e-6)
    assert metrics["learner/clamped_frac"] == (np.abs(log_ratio) > 0.1).mean()
    assert metrics["learner/center"] == pytest.approx(np.clip(log_ratio, -0.1, 0.1).mean(), rel=1e-6)
    grey = tuple(replace(s, grey_logprobs=s.teacher_logprobs - np.float32(0.5)) for s in scores)
    assert grey[0].grey_logprobs is not None
    grey[0].grey_logprobs[:] += 2.0  # there the video makes the teacher's tokens less likely
    seen = batch_diagnostics([replace(group, scores=grey)], config_of(visual_weight=0.5), is_time)
    times = np.concatenate([is_time(t.response_token_ids) for t in short])
    assert 0 < times[3:].sum() < times.sum()
    assert seen["learner/visual_advantage"] == pytest.approx(0.5 * 5 / 8, rel=1e-5)
    of_times = 0.5 * times[3:].sum() / times.sum()
    assert seen["learner/visual_advantage_time"] == pytest.approx(of_times, rel=1e-5)
    unknown = batch_diagnostics([group], config_of(kind="opd_topk"), is_time)
    assert "teacher/entropy" not in unknown and "learner/clamped_frac" not in unknown
    rewarded = replace(group, scores=(), rewards=(0.5, 1.0))
    metrics = batch_diagnostics(
        [rewarded, replace(rewarded, rewards=(1.0, 1.0))], config_of(kind="grpo"), is_time
    )
    assert metrics["learner/reward"] == 0.875 and metrics["learner/flat_groups_frac"] == 0.5
    assert "learner/reverse_kl" not in metrics
