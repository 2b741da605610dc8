"""The signals beside the teacher: each against a float64 reading of its formula, and each pair of options."""

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from learner.batching import plan_update
from learner.diagnostics import TokenRecords, policy_diagnostics
from learner.loss import ResponseTokens, is_unsure, loss_per_token
from learner.signals import signal_metrics, signals_of
from tests.fakes import make_group, make_prompt
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_file import load_config, parse_config
from video_opd.config_learner import LearnerConfig, LossConfig
from video_opd.errors import ConfigError
from video_opd.rewards import iou, mean_reward, next_baseline
from video_opd.types import ScoredGroup

V, K = 50, 4
TRUTH = (2.0, 6.0)
SPANS = [(2.0, 6.0), (2.0, 4.8), (4.0, 8.0), None]  # IoU 1, 0.7, 1/3, 0


def rolled(prompt_id: str, spans: list[Any], seed: int = 0) -> ScoredGroup:
    """A rollout for each answer, rewarded by its IoU."""
    group = make_group(prompt_id, range(2, 2 + len(spans)), top_k=K, seed=seed)
    pairs = zip(group.group.trajectories, spans, strict=True)
    trajectories = tuple(replace(t, predicted_spans_s=(span,) if span else ()) for t, span in pairs)
    prompt = make_prompt(prompt_id, (TRUTH,))
    of_prompt = replace(group.group, prompt=prompt, trajectories=trajectories)
    seen = tuple(
        replace(s, grey_logprobs=s.teacher_logprobs - 1, entropy=-s.teacher_logprobs) for s in group.scores
    )
    return replace(group, scores=seen, group=of_prompt, rewards=tuple(iou(t, prompt) for t in trajectories))


def shown(prompt_id: str, seed: int) -> ScoredGroup:
    """The truth as an answer, as driver/demonstrations.py makes it."""
    group = rolled(prompt_id, [TRUTH], seed)
    (truth,) = group.group.trajectories
    nobody = np.zeros(len(truth.response_token_ids), np.float32)
    truth = replace(
        truth, prompt_fingerprint=None, prompt_token_ids=np.zeros(0, np.int32), actor_logprobs=nobody
    )
    return replace(group, group=replace(group.group, trajectories=(truth,)), rewards=None)


SINGLE = [rolled(f"p{i}", [span], i) for i, span in enumerate(SPANS)]
MIXED = [*SINGLE[:2], shown("d", 9), *SINGLE[2:]]
BY_FOUR = [rolled("p", SPANS), rolled("q", [SPANS[2]] * 4, 1)]


def tokens_of(groups: list[ScoredGroup], loss: LossConfig, baseline: float | None) -> ResponseTokens:
    """The tensors that LearnerEngine makes of a batch, with a made-up teacher over V tokens."""
    rows = [(t, s) for g in groups for t, s in zip(g.group.trajectories, g.scores, strict=True)]
    signals = signals_of(groups, loss, baseline)

    def joined(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).double()

    top = [s.top_k for _, s in rows if s.top_k]
    marks = [np.full(len(t.response_token_ids), t.is_demonstration) for t, _ in rows]
    teacher = torch.randn(sum(map(len, marks)), V, generator=torch.Generator().manual_seed(1)).double()
    unsure = is_unsure([s for _, s in rows], loss)
    return ResponseTokens(
        targets=joined([t.response_token_ids for t, _ in rows]).long(),
        actor_logprobs=joined([t.actor_logprobs for t, _ in rows]),
        advantage=joined([s.advantage for s in signals]),
        distill=joined([s.distill for s in signals]),
        is_demonstration=joined(marks).bool() if loss.on_policy_frac < 1 else None,
        teacher_logprobs=joined([s.teacher_logprobs for _, s in rows]),
        top_k=(joined([t.ids for t in top]).long(), joined([t.logprobs for t in top])),
        teacher_logits=lambda which: teacher[which],
        is_forward=None if unsure is None else torch.from_numpy(unsure),
    )


def computed(groups, loss: LossConfig, baseline: float | None) -> tuple[np.ndarray, np.ndarray, Any]:
    """The loss of each token; its gradient by the student's logits; logits and tokens."""
    tokens = tokens_of(groups, loss, baseline)
    torch.manual_seed(0)
    logits = torch.randn(len(tokens.targets), V, dtype=torch.float64, requires_grad=True)
    value, _ = loss_per_token(loss, logits, tokens, slice(None))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach().numpy(), gradient.numpy(), (logits.detach().numpy(), tokens)


def literal_advantages(groups, options: dict[str, Any], baseline: float | None) -> list[list[float]]:
    """d r_t + w A of each rollout and 0 of demonstrations, read from docs/algorithm.md."""
    found = []
    for group in groups:
        rewards = np.array(group.rewards or (), np.float64)
        for i, (t, s) in enumerate(zip(group.group.trajectories, group.scores, strict=True)):
            n = len(t.response_token_ids)
            if group.rewards is None:
                found.append([0.0] * n)
                continue
            against = rewards.mean() if baseline is None else baseline
            scale = rewards.std() + 1e-4 if baseline is None and options.get("advantage_std", True) else 1.0
            task = options.get("task_weight", 0.0) * (rewards[i] - against) / scale
            gated = iou(t, group.group.prompt) >= options.get("task_gate", math.inf) - 1e-9
            d = 0.0 if gated else options.get("distill_weight", 1.0)
            r = np.asarray(s.teacher_logprobs, np.float64) - t.actor_logprobs
            clamp = options.get("clamp")
            r = r if clamp is None else np.clip(r, -clamp, clamp)
            fixed = options.get("fixed_advantage")
            found.append([d * (fixed if fixed is not None else x) + task for x in r])
    return found


@pytest.mark.parametrize(
    ("options", "groups", "baseline"),
    [
        ({}, SINGLE, None),
        ({"task_weight": 0.5}, SINGLE, 0.4),
        ({"task_weight": 2.0, "distill_weight": 0.3}, BY_FOUR, None),
        ({"task_weight": 2.0, "advantage_std": False, "clamp": 0.5}, BY_FOUR, None),
        ({"task_weight": 0.5, "task_gate": 0.7, "clamp": 3.0}, SINGLE, 0.4),
        ({"task_weight": 1.0, "distill_weight": 0.0}, SINGLE, 0.1),
        ({"fixed_advantage": -0.2}, SINGLE, None),
        ({"fixed_advantage": -0.2, "task_weight": 0.5, "task_gate": 0.3}, SINGLE, 0.4),
        ({"on_policy_frac": 0.75, "task_weight": 0.5, "task_gate": 0.3}, MIXED, 0.4),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_an_advantage_is_the_sum_of_its_signals(options, groups, baseline):
    signals = signals_of(groups, LossConfig(kind="opd", **options), baseline)
    expected = literal_advantages(groups, options, baseline)
    assert len(signals) == len(expected)
    for signal, of_tokens in zip(signals, expected, strict=True):
        np.testing.assert_allclose(signal.advantage, of_tokens, atol=2e-6)
        assert signal.advantage.dtype == np.float32


def test_center_is_the_mean_of_rollouts_and_a_gated_rollout_has_the_task_reward_alone():
    loss = LossConfig(kind="opd", center="batch", task_weight=0.5, task_gate=0.7, on_policy_frac=0.5)
    advantages = [s.advantage for s in signals_of(MIXED, loss, 0.5)]
    r = [(g.scores[0].teacher_logprobs - g.group.trajectories[0].actor_logprobs) for g in SINGLE]
    mean = np.concatenate(r).mean()
    np.testing.assert_allclose(advantages[0], 0.25, atol=1e-6)
    np.testing.assert_allclose(advantages[1], 0.1, atol=1e-6)
    np.testing.assert_allclose(advantages[2], 0.0)
    np.testing.assert_allclose(advantages[4], r[3] - mean - 0.25, atol=1e-6)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def literal_loss(logits, tokens: ResponseTokens, loss: LossConfig, advantage: np.ndarray, d: np.ndarray):
    """Of each token, as a function of the logits; what is constant in the gradient is taken from `tokens`."""
    p = softmax(logits)
    taken = np.log(p[np.arange(len(p)), tokens.targets.numpy()])
    ratio = np.exp(taken - tokens.actor_logprobs.numpy())
    of_policy = -np.minimum(ratio, loss.max_ratio or math.inf) * advantage
    if loss.kind == "opd":
        return of_policy
    if loss.kind == "opd_full":
        assert tokens.teacher_logits is not None
        q = softmax(tokens.teacher_logits(slice(None)).numpy())
        return d * (p * np.log(p / q)).sum(-1) + of_policy
    assert tokens.top_k is not None
    ids, q = tokens.top_k[0].numpy(), np.exp(tokens.top_k[1].numpy())
    inside = np.take_along_axis(p, ids, -1)
    tail, teacher_tail = 1 - inside.sum(-1), 1 - q.sum(-1)
    return d * ((inside * np.log(inside / q)).sum(-1) + tail * np.log(tail / teacher_tail)) + of_policy


@pytest.mark.parametrize("kind", ["opd", "opd_topk", "opd_full"])
def test_the_loss_of_rollouts_is_the_teachers_part_and_the_policy_gradient_of_the_reward(kind):
    options: dict[str, Any] = {"distill_weight": 0.3, "task_weight": 0.5, "task_gate": 0.7, "max_ratio": 1.1}
    loss = LossConfig(kind=kind, **options)
    value, gradient, (logits, tokens) = computed(SINGLE, loss, 0.4)
    of_opd = literal_advantages(SINGLE, options, 0.4)
    of_task = literal_advantages(SINGLE, options | {"distill_weight": 0.0}, 0.4)
    advantage = np.concatenate(of_opd if kind == "opd" else of_task)
    lengths = [len(a) for a in of_opd]
    d = np.repeat([0.0, 0.0, 0.3, 0.3], lengths)
    np.testing.assert_allclose(value, literal_loss(logits, tokens, loss, advantage, d), atol=1e-6)
    step = 1e-6
    for i, j in [(0, 3), (3, int(tokens.targets[3])), (len(logits) - 1, int(tokens.targets[-1]))]:
        up, down = logits.copy(), logits.copy()
        up[i, j] += step
        down[i, j] -= step
        literal = [literal_loss(x, tokens, loss, advantage, d).sum() for x in (up, down)]
        assert gradient[i, j] == pytest.approx((literal[0] - literal[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("kind", ["opd", "opd_topk", "opd_full"])
def test_a_demonstration_among_rollouts_trains_as_it_does_alone(kind):
    """kind=opd: as off_policy_rkd; the others: the same divergence at its states. Rollouts as without it."""
    clamp = None if kind == "opd_full" else 0.5
    loss = LossConfig(kind=kind, on_policy_frac=0.5, distill_weight=0.3, clamp=clamp)
    value, gradient, (logits, tokens) = computed(MIXED, loss, None)
    is_truth = tokens.is_demonstration.numpy()
    alone = LossConfig(kind="off_policy_rkd" if kind == "opd" else kind, clamp=clamp)
    leaf = torch.tensor(logits, requires_grad=True)
    plain = replace(tokens, distill=None, is_demonstration=None)
    of_alone, _ = loss_per_token(alone, leaf, plain, slice(None))
    (of_gradient,) = torch.autograd.grad(of_alone.sum(), leaf)
    np.testing.assert_allclose(value[is_truth], 0.3 * of_alone.detach().numpy()[is_truth], rtol=1e-6)
    np.testing.assert_allclose(gradient[is_truth], 0.3 * of_gradient.numpy()[is_truth], rtol=1e-5)
    assert np.abs(gradient[is_truth]).max() > 1e-3
    lengths = [len(g.group.trajectories[0].response_token_ids) for g in SINGLE]
    assert (~is_truth).sum() == sum(lengths)
    if kind == "opd":
        r = np.concatenate(literal_advantages(SINGLE, {"distill_weight": 0.3, "clamp": 0.5}, None))
        expected = literal_loss(logits[~is_truth], _some(tokens, ~is_truth), loss, r, r)
        np.testing.assert_allclose(value[~is_truth], expected, atol=1e-6)


def _some(tokens: ResponseTokens, which: np.ndarray) -> ResponseTokens:
    return replace(tokens, targets=tokens.targets[which], actor_logprobs=tokens.actor_logprobs[which])


def test_the_running_mean_is_of_past_steps_alone_but_at_the_first():
    rewards = [0.2, 0.8, 0.5]
    baseline, seen = None, []
    for reward in rewards:
        group = replace(SINGLE[0], rewards=(reward,))
        seen.append(mean_reward([group]) if baseline is None else baseline)
        baseline = next_baseline(baseline, mean_reward([group, shown("d", 0)]), 0.9)
    assert seen == pytest.approx([0.2, 0.2, 0.9 * 0.2 + 0.1 * 0.8])
    assert baseline == pytest.approx(0.9 * (0.9 * 0.2 + 0.1 * 0.8) + 0.1 * 0.5)
    assert next_baseline(0.4, mean_reward([shown("d", 0)]), 0.9) == 0.4, "demonstrations have no reward"
    assert mean_reward(BY_FOUR) == pytest.approx(np.mean([r for g in BY_FOUR for r in g.rewards or ()]))


def test_metrics_of_the_signals_by_hand():
    loss = LossConfig(kind="opd", task_weight=0.5, task_gate=0.7, on_policy_frac=0.75)
    metrics = signal_metrics(MIXED, loss, 0.5)
    rewards = np.array([1.0, 0.7, 1 / 3, 0.0])
    assert metrics == {
        "learner/reward": pytest.approx(rewards.mean()),
        "learner/task_advantage_abs": pytest.approx(np.abs(rewards - 0.5).mean()),
        "learner/reward_baseline": 0.5,
        "learner/gated_frac": 0.5,
        "learner/demonstration_frac": 0.2,
    }
    by_four = signal_metrics(BY_FOUR, LossConfig(kind="opd", task_weight=0.5), None)
    assert by_four["learner/flat_groups_frac"] == 0.5 and "learner/reward_baseline" not in by_four
    assert signal_metrics(SINGLE, LossConfig(kind="opd"), None) == {}
    shown = TokenRecords(*np.array([[-0.5], [0.0], [1.0], [1.0]], np.float32))
    assert policy_diagnostics(shown, loss) == {"learner/demonstration_nll": 0.5}, "there are no ratios"


# --- every pair of options ---

OPTIONS: dict[str, dict[str, Any]] = {  # add yours: a name, and the keys that turn it on
    "clamp": {"clamp": 1.0},
    "center": {"center": "batch"},
    "max_ratio": {"max_ratio": 1.1},
    "divergence": {"divergence": "jsd"},
    "beta": {"divergence": "jsd", "beta": 0.2},
    "forward_kl_entropy": {"forward_kl_entropy": 0.5},
    "top_k_of": {"top_k_of": "student"},
    "visual_weight": {"visual_weight": 0.4},
    "visual_frac": {"visual_weight": 0.4, "visual_frac": 0.5},
    "kl_coef": {"kl_coef": 0.1},
    "distill_weight": {"distill_weight": 0.5},
    "distill_weight=0": {"distill_weight": 0.0},
    "task_weight": {"task_weight": 0.5},
    "task_gate": {"task_weight": 0.5, "task_gate": 0.7},
    "baseline_decay": {"task_weight": 0.5, "baseline_decay": 0.5},
    "advantage_std": {"task_weight": 0.5, "advantage_std": False},
    "fixed_advantage": {"fixed_advantage": -0.1},
    "on_policy_frac": {"on_policy_frac": 0.5},
}
KINDS = ("opd", "opd_topk", "opd_full", "grpo", "off_policy_rkd", "off_policy_fkd", "sft")


DEMO = load_config(ROOT / "configs" / "demo.yaml").model_dump()


def config_with(loss: dict[str, Any], rollouts: int) -> Config:
    rollout = DEMO["rollout"] | {"rollouts_per_prompt": rollouts}
    return parse_config(DEMO | {"loss": loss, "rollout": rollout}, "test")


def one_line(error: Exception) -> bool:
    return "\n" not in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_two_options_make_a_finite_loss_or_are_refused_in_one_line(kind):
    works, refused = 0, []
    for first, second in combinations(OPTIONS, 2):
        loss = {"kind": kind, **OPTIONS[first], **OPTIONS[second]}
        for rollouts in (1, 4):
            try:
                config = config_with(loss, rollouts)
            except ConfigError as error:
                refused.append(error)
                continue
            works += 1
            groups = [shown("d", 9), *(SINGLE if rollouts == 1 else BY_FOUR)]
            groups = groups if config.loss.on_policy_frac < 1 else groups[1:]
            in_groups = config.rewards_in_groups or not config.loss.needs.rewards
            value, gradient, _ = computed(groups, config.loss, None if in_groups else 0.4)
            assert np.isfinite(value).all() and np.isfinite(gradient).all(), loss
            assert np.abs(gradient).max() > 0, loss
    assert all(map(one_line, refused)) and refused
    assert works > 0 or not kind.startswith("opd")


@pytest.mark.parametrize(
    ("loss", "rollouts", "message"),
    [
        ({"kind": "grpo", "task_weight": 0.5}, 4, "task_weight does nothing for kind=grpo"),
        ({"kind": "sft", "on_policy_frac": 0.5}, 1, "on_policy_frac does nothing for kind=sft"),
        ({"kind": "opd", "task_gate": 0.7}, 1, "task_gate does nothing without a task reward"),
        ({"kind": "opd", "baseline_decay": 0.5}, 1, "baseline_decay does nothing without a task reward"),
        ({"kind": "opd", "advantage_std": False}, 4, "advantage_std does nothing for kind=opd"),
        ({"kind": "opd", "rewards": ["video_opd.rewards:time_r1"]}, 1, "rewards does nothing for kind=opd"),
        ({"kind": "opd", "fixed_advantage": 0.1}, 1, "fixed_advantage"),
        ({"kind": "opd_topk", "fixed_advantage": -0.1}, 1, "fixed_advantage does nothing for kind=opd_topk"),
        ({"kind": "opd", "fixed_advantage": -0.1, "clamp": 3}, 1, "of which clamp is an option"),
        ({"kind": "opd", "distill_weight": 0}, 1, "leaves nothing to train on"),
        ({"kind": "opd_full", "distill_weight": 0, "task_weight": 1}, 1, "use kind=opd"),
        (
            {"kind": "opd", "distill_weight": 0, "task_weight": 1, "task_gate": 0.5},
            1,
            "task_gate is an option",
        ),
        ({"kind": "opd", "task_weight": 1, "advantage_std": False}, 1, "is for groups of rollouts"),
        ({"kind": "opd", "task_weight": 1, "baseline_decay": 0.5}, 4, "does nothing for groups"),
        ({"kind": "opd", "on_policy_frac": 0}, 1, "on_policy_frac"),
        (
            {"kind": "opd", "fixed_advantage": -0.1, "visual_weight": 0.4},
            1,
            "of which visual_weight is an option",
        ),
        ({"kind": "opd_topk", "on_policy_frac": 0.5, "top_k_of": "student"}, 1, "names as it samples"),
    ],
)
def test_an_option_that_does_nothing_is_refused(loss, rollouts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config_with(loss, rollouts)
    assert one_line(caught.value)


def test_without_a_teachers_signal_no_teacher_is_asked():
    assert LossConfig(kind="opd", fixed_advantage=-0.1).needs.teacher == "none"
    only_task = LossConfig(kind="opd", task_weight=1.0, distill_weight=0.0).needs
    assert only_task.teacher == "none" and only_task.rewards
    assert LossConfig(kind="opd_topk", task_weight=1.0).needs.teacher == "top_k"


def test_every_rank_has_the_same_signals():
    loss = LossConfig(kind="opd", task_weight=0.5, task_gate=0.7, on_policy_frac=0.75)
    whole = dict(zip((g.group.prompt.prompt_id for g in MIXED), signals_of(MIXED, loss, 0.4), strict=True))
    learner, ids = LearnerConfig(world_size=2), lambda _: np.arange(5, dtype=np.int32)
    for rank in range(2):
        plan = plan_update(MIXED, loss, learner, rank, ids, 99, baseline=0.4)
        for row in (row for batch in plan.micro_batches for row in batch):
            of_whole = whole[row.prompt.prompt_id]
            np.testing.assert_array_equal(row.signal.advantage, of_whole.advantage)
            np.testing.assert_array_equal(row.signal.distill, of_whole.distill)
