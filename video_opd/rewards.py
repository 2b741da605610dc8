"""Rewards of the task: functions (trajectory, prompt) -> float, named by import path."""

import math
import pkgutil
from collections.abc import Callable, Sequence

from video_opd.errors import ConfigError
from video_opd.grounding import best_iou, first_span
from video_opd.types import Prompt, ScoredGroup, Trajectory

Reward = Callable[[Trajectory, Prompt], float]


def iou(trajectory: Trajectory, prompt: Prompt) -> float:
    """IoU with the nearest true span; 0 for an unparsed response."""
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
    """1 for an ordered interval inside the clip, else 0."""
    span = first_span(trajectory.predicted_spans_s)
    return float(span is not None and 0 <= span[0] < span[1] <= prompt.clip.duration_s)


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
