"""Rewards of the task: functions (trajectory, prompt) -> float, named by import path."""

import math
import pkgutil
from collections.abc import Callable, Sequence

from video_opd import grounding
from video_opd.errors import ConfigError
from video_opd.grounding import best_iou, first_span
from video_opd.types import Prompt, ScoredGroup, Trajectory

Reward = Callable[[Trajectory, Prompt], float]


def iou(trajectory: Trajectory, prompt: Prompt) -> float:
    """IoU of the first interval with the nearest true span; 0 for an unparsed response."""
    return best_iou(first_span(trajectory.predicted_spans_s), prompt.answer_spans_s or ())


def time_r1(trajectory: Trajectory, prompt: Prompt) -> float:
    """Time-R1: IoU (1 - |s - s'| / T) (1 - |e - e'| / T) with the nearest true span, T the duration."""
    span, duration = first_span(trajectory.predicted_spans_s), prompt.clip.duration_s
    if span is None or not prompt.answer_spans_s:
        return 0.0
    start, end = max(prompt.answer_spans_s, key=lambda answer: best_iou(span, [answer]))
    start_factor, end_factor = 1 - abs(span[0] - start) / duration, 1 - abs(span[1] - end) / duration
    return best_iou(span, [(start, end)]) * start_factor * end_factor


def answer_format(trajectory: Trajectory, prompt: Prompt) -> float:
    """1 for an ordered interval inside the clip, of a set for such intervals alone; else 0."""
    spans, duration = trajectory.predicted_spans_s, prompt.clip.duration_s
    return float(bool(spans) and all(0 <= start < end <= duration for start, end in spans))


def merged_iou(trajectory: Trajectory, prompt: Prompt) -> float:
    """IoU of the answer's and the true set, by the seconds that each covers; 0 for an unparsed response.

    TimeLens2 (arXiv 2607.17423), tiou, with merged true spans.
    """
    return grounding.merged_iou(trajectory.predicted_spans_s, prompt.answer_spans_s or ())


def temporal_wasserstein(trajectory: Trajectory, prompt: Prompt) -> float:
    """exp(-W1 / |truth|) of the answer's and the true set, |truth| in seconds covered; 0 for an unparsed one.

    TimeLens2 (arXiv 2607.17423), twass1: see grounding.wasserstein_s. It also tells apart answers that do not
    overlap with the truth.
    """
    truth = grounding.merge(prompt.answer_spans_s or ())
    if not truth:
        return 0.0
    distance_s = grounding.wasserstein_s(trajectory.predicted_spans_s, truth)
    return math.exp(-distance_s / grounding.duration_s(truth))


def parse_penalty(trajectory: Trajectory, prompt: Prompt) -> float:
    """-1 for a response without an interval whose start is before its end, else 0 (TimeLens2)."""
    return 0.0 if grounding.merge(trajectory.predicted_spans_s) else -1.0


def load_rewards(paths: Sequence[str]) -> list[Reward]:
    """Imports `module:function` paths. Raises ConfigError."""
    rewards = []
    for path in paths:
        try:
            reward = pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"loss.rewards: no {path} ({error}): write module:function") from error
        if not callable(reward):
            raise ConfigError(f"loss.rewards: {path} is not a function")
        rewards.append(reward)
    return rewards


def mean_reward(groups: Sequence[ScoredGroup]) -> float | None:
    """Of all rollouts of a batch; None without any."""
    rewards = [reward for group in groups for reward in group.rewards or ()]
    return sum(rewards) / len(rewards) if rewards else None


def next_baseline(baseline: float | None, mean: float | None, decay: float) -> float | None:
    """The baseline after a step of this mean reward: b' = decay b + (1 - decay) mean, or the first mean.

    None: no step has had a reward yet.
    """
    if baseline is None or mean is None:
        return mean if baseline is None else baseline
    return decay * baseline + (1.0 - decay) * mean


def total_reward(rewards: Sequence[Reward], trajectory: Trajectory, prompt: Prompt) -> float:
    """The sum of all rewards. Raises ConfigError if one is not a finite number."""
    total = 0.0
    for reward in rewards:
        value = reward(trajectory, prompt)
        if not isinstance(value, int | float) or not math.isfinite(value):
            given = f"{getattr(reward, '__name__', reward)} gives {value!r}"
            where = f"trajectory {trajectory.trajectory_id}"
            raise ConfigError(f"loss.rewards: {given} for {where}, not a finite number")
        total += value
    return total
