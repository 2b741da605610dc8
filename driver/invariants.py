"""Checks on every step that stop the run."""

from collections.abc import Sequence

import numpy as np

from driver.run import Run
from video_opd.errors import ParityError, RunError
from video_opd.types import ScoredGroup, StepReport


def check_lag(groups: Sequence[ScoredGroup], step: int, max_policy_lag: int) -> list[int]:
    """The policy lag of every trajectory. Raises ParityError where one breaks the bound."""
    lags = [
        step - t.policy_version for g in groups for t in g.group.sampled if t.prompt_fingerprint is not None
    ]
    if lags and (min(lags) < 0 or max(lags) > max_policy_lag):
        raise ParityError(
            f"step {step}: policy lags {min(lags)} to {max(lags)}, allowed 0 to {max_policy_lag}"
        )
    return lags


def check_finite(report: StepReport) -> None:
    """A diverged update must not be published. Raises RunError."""
    for name in ("learner/loss", "learner/grad_norm"):
        if not np.isfinite(report.metrics[name]):
            raise RunError(
                f"step {report.step}: {name} is {report.metrics[name]}: lower learner.lr, or resume from a checkpoint"
            )


def check_logprob_gap(run: Run, report: StepReport) -> None:
    """Actor and learner must agree on the tokens of the first batch that has any."""
    gap, bound = report.metrics.get("learner/logprob_gap_p99"), run.config.checks.max_logprob_gap
    if run.gap_is_checked or bound is None or gap is None:
        return
    run.gap_is_checked = True
    if not gap <= bound:
        raise ParityError(
            f"on the first batch the 99th percentile of |actor - learner log-prob| is {gap:.4f}, bound "
            f"{bound} (checks.max_logprob_gap): the two engines do not compute the same model"
        )
