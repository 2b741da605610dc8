"""Records one step: the line of metrics.jsonl, the trajectory log, the gauges and the progress bar."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from driver.records.report import COMPUTED, SEPARATE, ShowStep
from driver.records.sinks import MetricSinks, TrajectoryLog
from driver.run import Run
from video_opd.grounding import prompt_iou
from video_opd.types import Prompt, ScoredGroup, StepReport, Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class Outputs:
    """Where a step is recorded."""

    sinks: MetricSinks
    log: TrajectoryLog
    progress: ShowStep


def mean(values: Sequence[float]) -> float:
    """The mean; NaN for no values, which MetricSinks leaves out."""
    return float(np.mean(values)) if values else math.nan


def num_tokens(trajectories: Iterable[Trajectory]) -> int:
    """Number of response tokens."""
    return sum(len(t.response_token_ids) for t in trajectories)


def cache_metrics(groups: Iterable[TrajectoryGroup]) -> dict[str, float]:
    """Shares of the prompts' tokens, once an answer, and of the prompts' clips that engines had computed."""
    sampled = [(group, hits) for group in groups if (hits := group.cache_hits)]
    num_tokens = sum(len(t.prompt_token_ids) for group, _ in sampled for t in group.sampled)
    num_cached = sum(hits.num_cached_tokens for _, hits in sampled)
    return {
        "actors/prefix_cache_hit_frac": num_cached / num_tokens if num_tokens else math.nan,
        "actors/mm_cache_hit_frac": mean([hits.was_clip_processed for _, hits in sampled]),
    }


def source_metrics(prompts: Sequence[Prompt], rollouts: Iterable[tuple[Prompt, float]]) -> dict[str, float]:
    """Of each source of the step's prompts its share, and the mean IoU of its rollouts that have a truth."""
    ious: dict[str, list[float]] = {p.source: [] for p in prompts if p.source}
    for prompt, iou in rollouts:
        if prompt.source:
            ious[prompt.source].append(iou)
    shares = {f"sources/{s}/share": sum(p.source == s for p in prompts) / len(prompts) for s in ious}
    return shares | {f"sources/{s}/miou": mean(of_source) for s, of_source in ious.items()}


async def record(
    run: Run, outputs: Outputs, report: StepReport, groups: list[ScoredGroup], lags: list[int]
) -> None:
    """Writes the step's metrics. Ground truth that stands in for rollouts does not count as sampled."""
    sampled = [(g.group.prompt, t) for g in groups for t in g.group.rollouts]
    readings = [run.config.prompt.of_style(p.style).span_iou for p, _ in sampled]
    pairs = zip(sampled, readings, strict=True)
    scored = [(p, prompt_iou(t.predicted_spans_s, p, how)) for (p, t), how in pairs if p.answer_spans_s]
    num_suspended = sum(len(g.group.suspended) for g in groups)
    seconds, tokens_per_s, wall_s = run.clock.take_times()
    run.totals.update({"rollouts": len(sampled), "suspended_rollouts": num_suspended})
    run.totals.update(rollout_tokens=num_tokens(t for _, t in sampled))
    run.totals.update({f"{phase}_s": s for phase, s in seconds.items()})
    metrics = report.metrics | {
        "actors/miou": mean([iou for _, iou in scored]),
        "actors/unparsed_frac": mean([not t.predicted_spans_s for _, t in sampled]),
        "actors/truncated_frac": mean([t.finish_reason == "length" for _, t in sampled]),
        **source_metrics([g.group.prompt for g in groups], scored),
        **cache_metrics([g.group for g in groups]),
        "actors/policy_lag_mean": mean(lags),
        "actors/policy_lag_max": float(max(lags, default=math.nan)),
        "actors/rollouts": float(run.totals["rollouts"]),
        "actors/rollout_tokens": float(run.totals["rollout_tokens"]),
        "teacher/scored_tokens": float(run.totals["scored_tokens"]),
        "curriculum/presented": float(len(groups)),
        "curriculum/suspended_frac": num_suspended / max(1, len(sampled)),
        "learner/utilisation": seconds["update"] / wall_s,
        **run.actors.take_metrics(),
        **run.curriculum.take_metrics(),
        **(await run.teacher.take_metrics() if run.teacher else {}),
        **{f"time/{phase}_s": s for phase, s in seconds.items()},
        **{f"tokens_per_s/{phase}": rate for phase, rate in tokens_per_s.items()},
    }
    run.totals.update({k: value for k, value in metrics.items() if k.endswith((COMPUTED, SEPARATE))})
    run.gauges.set_step(metrics)
    outputs.log.write(groups, report.step)
    outputs.sinks.write(replace(report, metrics=metrics), time.time())
    outputs.progress(metrics)
