"""The advantage of every token: the teacher's signal, the task reward, or a constant, put together here.

    advantage_t = d_t r_t + w A      d_t = distill_weight times the visual weight, w = task_weight

kind=opd trains by it alone. For opd_topk and opd_full the teacher's part is the divergence times d_t, and the
advantage is w A. A demonstration has no advantage: nobody sampled it, so its r_t is known in the loss alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.loss import group_advantages, sampled_advantage
from learner.visual import visual_weights
from video_opd.config_learner import LossConfig
from video_opd.grounding import reaches
from video_opd.rewards import iou
from video_opd.types import ScoredGroup


@dataclass(frozen=True)
class Signal:
    """What trains the tokens of one trajectory beside the teacher's scores."""

    advantage: np.ndarray  # float32[N], of the policy gradient
    distill: np.ndarray  # float32[N], weight of the divergence, or of r_t at a demonstration


def signals_of(
    groups: Sequence[ScoredGroup], loss: LossConfig, baseline: float | None = None
) -> list[Signal]:
    """One per trajectory. baseline: what rewards are compared with; None: with their group's."""
    distill = distill_weights(groups, loss)
    weights = visual_weights(groups, loss) if loss.visual_weight else [1.0] * len(distill)
    task = task_advantages(groups, loss, baseline) * (1.0 if loss.kind == "grpo" else loss.task_weight)
    return [
        Signal((d * v * r + a).astype(np.float32), np.full(len(r), d * v, np.float32))
        for d, v, r, a in zip(distill, weights, teacher_signals(groups, loss), task, strict=True)
    ]


def distill_weights(groups: Sequence[ScoredGroup], loss: LossConfig) -> np.ndarray:
    """float64[trajectories]: distill_weight; 0 of rollouts whose IoU with the truth reaches task_gate."""
    every = [(g.group.prompt, t) for g in groups for t in g.group.trajectories]
    weights = np.full(len(every), loss.distill_weight)
    if loss.task_gate is not None:
        ious = np.array([-1.0 if t.is_demonstration else iou(t, prompt) for prompt, t in every])
        weights[reaches(ious, loss.task_gate)] = 0.0
    return weights


def task_advantages(groups: Sequence[ScoredGroup], loss: LossConfig, baseline: float | None) -> np.ndarray:
    """float64[trajectories]: A of each reward, 0 without one: its group's, or reward - baseline."""
    advantages: list[np.ndarray] = []
    for group in groups:
        if group.rewards is None or not loss.needs.rewards:
            advantages.append(np.zeros(len(group.group.trajectories)))
        elif baseline is not None:
            advantages.append(np.asarray(group.rewards) - baseline)
        else:
            assert len(group.rewards) > 1, "one reward has no group: it needs a baseline"
            advantages.append(group_advantages(group.rewards, loss.advantage_std))
    return np.concatenate(advantages) if advantages else np.zeros(0)


def teacher_signals(groups: Sequence[ScoredGroup], loss: LossConfig) -> list[np.ndarray]:
    """float32[N] per trajectory, for kind=opd: r_t, or fixed_advantage in its place; zeros where unknown.

    OPSA (arXiv 2608.31046): one negative advantage for every token. A run that it equals owes its gain to
    the student's own samples, not to the teacher.
    """
    trajectories = [t for g in groups for t in g.group.trajectories]
    constant = loss.fixed_advantage or 0.0
    signals = [np.full(len(t.response_token_ids), constant, np.float32) for t in trajectories]
    if loss.kind != "opd" or loss.needs.teacher == "none":
        return signals
    scores = [s for g in groups for s in g.scores]
    own = [i for i, t in enumerate(trajectories) if not t.is_demonstration]
    if own:
        teacher = np.concatenate([scores[i].teacher_logprobs for i in own])
        actor = np.concatenate([trajectories[i].actor_logprobs for i in own])
        lengths = [len(signals[i]) for i in own]
        of_own = np.split(sampled_advantage(teacher, actor, loss), np.cumsum(lengths)[:-1])
        for i, signal in zip(own, of_own, strict=True):
            signals[i] = signal
    return signals


def signal_metrics(
    groups: Sequence[ScoredGroup], loss: LossConfig, baseline: float | None
) -> dict[str, float]:
    """The rewards, their advantages, and the shares of gated rollouts and of demonstrations."""
    metrics = {}
    if rewards := [r for g in groups for r in g.rewards or () if loss.needs.rewards]:
        metrics["learner/reward"] = float(np.mean(rewards))
        advantages = np.abs(task_advantages(groups, loss, baseline))
        metrics["learner/task_advantage_abs"] = float(advantages.sum() / len(rewards))
        of_groups = [set(g.rewards) for g in groups if g.rewards and len(g.rewards) > 1]
        if of_groups:
            metrics["learner/flat_groups_frac"] = float(np.mean([len(values) == 1 for values in of_groups]))
        if baseline is not None:
            metrics["learner/reward_baseline"] = baseline
        if loss.task_gate is not None:
            num_gated = (distill_weights(groups, loss) == 0).sum()
            metrics["learner/gated_frac"] = float(num_gated / len(rewards))
    if loss.on_policy_frac < 1:
        shown = [t.is_demonstration for g in groups for t in g.group.trajectories]
        metrics["learner/demonstration_frac"] = float(np.mean(shown))
    return metrics
