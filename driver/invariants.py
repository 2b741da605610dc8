"""Checks on every step; a failure stops the run."""

from collections.abc import Sequence

import numpy as np

from driver.run import Run
from video_opd.errors import ParityError, RunError
from video_opd.types import ScoredGroup, StepReport


def check_lag(groups: Sequence[ScoredGroup], step: int, max_policy_lag: int) -> list[int]:
    """The policy lag of every sampled trajectory. Raises ParityError if one exceeds the bound."""
    lags = [step - t.policy_version for g in groups for t in g.group.rollouts]
    if lags and (min(lags) < 0 or max(lags) > max_policy_lag):
        found = f"policy lags {min(lags)} to {max(lags)}"
        raise ParityError(f"step {step}: {found}, allowed 0 to {max_policy_lag}")
    return lags


def check_finite(report: StepReport) -> None:
    """Raises RunError if the update diverged: it must not be published."""
    for name in ("learner/loss", "learner/grad_norm"):
        if not np.isfinite(value := report.metrics[name]):
            what = f"step {report.step}: {name} is {value}"
            raise RunError(f"{what}: lower learner.lr, or resume from a checkpoint")


def check_logprob_gap(run: Run, report: StepReport) -> None:
    """Raises ParityError if actor and learner disagree on the tokens of the first batch that has any."""
    gap, bound = report.metrics.get("learner/logprob_gap_p99"), run.config.checks.max_logprob_gap
    if run.gap_is_checked or bound is None or gap is None:
        return
    run.gap_is_checked = True
    if not gap <= bound:
        measure = "on the first batch the 99th percentile of |actor - learner log-prob|"
        values = f"is {gap:.4f}, bound {bound} (checks.max_logprob_gap)"
        raise ParityError(f"{measure} {values}: the two engines do not compute the same model")
