"""A run that goes on when its parts do not."""

import asyncio
import time
from collections.abc import Iterator

from driver.checkpoints import restore, start_over
from driver.run import Run
from video_opd.cluster.deadline import waits, with_deadline
from video_opd.cluster.faults import LOST
from video_opd.errors import LearnerLostError, PartLostError
from video_opd.logs import log

WAITS_SHOWN = 4
CONTROL_TIMEOUT_S, CONTROL_POLL_S = 10.0, 0.5


def single_errors(error: BaseException) -> Iterator[BaseException]:
    """The errors inside a task group's, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from single_errors(part)
    else:
        yield error


def first_error(error: BaseException) -> BaseException:
    """What went wrong first."""
    return next(single_errors(error))


def learner_lost(error: BaseException) -> LearnerLostError | None:
    """The loss of the learner among what went wrong: others may have failed with it."""
    return next((e for e in single_errors(error) if isinstance(e, LearnerLostError)), None)


async def recover(run: Run, cause: LearnerLostError) -> None:
    """A new group of learner ranks, and the whole run back where the last checkpoint stands.

    Raises PartLostError after max_retries from the same checkpoint.
    """
    lost_at, back_to = run.step, run.resume_from or run.checkpointed or 0
    run.num_restarts[back_to] += 1
    if run.num_restarts[back_to] > run.config.max_retries:
        raise PartLostError(
            f"{cause}; it was started again {run.config.max_retries} times at step {back_to}"
        ) from cause
    log.warning("%s; it is started again, and the run goes back from step %d to %d", cause, lost_at, back_to)
    run.published = -1
    await run.learner.restart()
    if run.checkpointed is None and run.resume_from is None:
        await start_over(run)
    else:
        await restore(run)


async def poll_control(run: Run) -> None:
    """Takes what was asked of the run from outside, and says how it stands; see run_control.RunControl."""
    while True:
        try:
            said = run.control.exchange.remote({"step": run.step, **run.actors.counts()})
            asked = await with_deadline(CONTROL_TIMEOUT_S, said, "the run's control actor")
        except LOST:  # Ray starts it again
            asked = None
        if asked is not None:
            log.info("rollout actors: %d -> %d", run.actors.num_wanted, asked)
            await run.actors.scale(asked)
        await asyncio.sleep(CONTROL_POLL_S)


async def watch(run: Run) -> None:
    """The watchdog: while no step ends, says what is waited for."""
    seen, since = run.step, time.monotonic()
    while True:
        await asyncio.sleep(run.config.watchdog_s)
        now = time.monotonic()
        if run.step != seen:
            seen, since = run.step, now
        else:
            log.warning("no step for %.0f s; waiting for %s", now - since, describe_waits(now))


def describe_waits(now_s: float) -> str:
    """The longest waits of this process and their seconds."""
    oldest = [f"{wait.what} ({now_s - wait.since_s:.0f} s)" for wait in waits()[:WAITS_SHOWN]]
    return "; ".join(oldest) or "nothing that has a name"
