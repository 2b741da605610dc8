"""What a step is held to, and what is recorded of it."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from driver.records.report import StepProgress
from driver.records.sinks import MetricSinks
from driver.records.trajectory_log import TrajectoryLog
from driver.run import Run
from video_opd.grounding import best_iou
from video_opd.types import ScoredGroup, StepReport, Trajectory


@dataclass(frozen=True)
class Outputs:
    """What a step is told to."""

    sinks: MetricSinks
    log: TrajectoryLog
    progress: StepProgress


def mean(values: Sequence[float]) -> float:
    """NaN of nothing, which no sink writes."""
    return float(np.mean(values)) if values else math.nan


def num_tokens(trajectories: Iterable[Trajectory]) -> int:
    """Response tokens."""
    return sum(len(t.response_token_ids) for t in trajectories)


async def record(
    run: Run, outputs: Outputs, report: StepReport, groups: list[ScoredGroup], lags: list[int]
) -> None:
    """One line of metrics: what the learner, the actors and the curriculum say of this step, and where its time went."""
    trajectories = [
        (g.group.prompt, t) for g in groups for t in g.group.sampled if t.prompt_fingerprint is not None
    ]
    num_suspended = sum(len(g.group.suspended) for g in groups)
    rollout_tokens = num_tokens(t for _, t in trajectories)
    run.totals.update(
        rollout_tokens=rollout_tokens, rollouts=len(trajectories), suspended_rollouts=num_suspended
    )
    labelled = [
        best_iou(t.predicted_span_s, p.answer_spans_s or ()) for p, t in trajectories if p.answer_spans_s
    ]
    seconds, tokens_per_s, wall_s = run.clock.take_times()
    run.totals.update({f"{phase}_s": s for phase, s in seconds.items()})
    metrics = report.metrics | {
        "actors/miou": mean(labelled),
        "actors/unparsed_frac": mean([t.predicted_span_s is None for _, t in trajectories]),
        "actors/truncated_frac": mean([t.finish_reason == "length" for _, t in trajectories]),
        "actors/policy_lag_mean": mean(lags),
        "actors/policy_lag_max": float(max(lags, default=math.nan)),
        "actors/rollout_tokens": float(run.totals["rollout_tokens"]),
        "teacher/scored_tokens": float(run.totals["scored_tokens"]),
        "curriculum/suspended_frac": num_suspended / max(1, len(trajectories)),
        "learner/utilisation": seconds["update"] / wall_s,
        **run.actors.take_metrics(),
        **await run.curriculum.metrics(),
        **(await run.teacher.take_metrics() if run.teacher else {}),
        **{f"time/{phase}_s": s for phase, s in seconds.items()},
        **{f"tokens_per_s/{phase}": rate for phase, rate in tokens_per_s.items()},
    }
    run.gauges.set_step(metrics)
    outputs.log.write(groups, report.step)
    outputs.sinks.write(
        StepReport(step=report.step, policy_version=report.policy_version, metrics=metrics), time.time()
    )
    outputs.progress.advance(metrics)
