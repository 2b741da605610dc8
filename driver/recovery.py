"""What runs beside the loop, and what happens when the learner is lost."""

import asyncio
import time

from driver.checkpoints import restore, start_over
from driver.run import Run
from video_opd.cluster.deadline import waits, with_deadline
from video_opd.cluster.faults import LOST
from video_opd.errors import LearnerLostError, PartLostError, first_error
from video_opd.logs import log

WAITS_SHOWN = 4
CONTROL_TIMEOUT_S, CONTROL_POLL_S = 10.0, 0.5


def learner_lost(error: BaseException) -> LearnerLostError | None:
    """The learner's loss among the errors: other tasks may have failed with it. None: it was not lost."""
    if isinstance(error, BaseExceptionGroup):
        error = first_error(error.subgroup(LearnerLostError) or error)
    return error if isinstance(error, LearnerLostError) else None


async def recover(run: Run, cause: LearnerLostError) -> None:
    """Restarts the learner at the newest checkpoint. Raises PartLostError after max_retries from that one."""
    back_to = run.newest_checkpoint or 0
    run.num_restarts[back_to] += 1
    if run.num_restarts[back_to] > run.config.max_retries:
        restarted = f"it was restarted {run.config.max_retries} times at step {back_to}"
        raise PartLostError(f"{cause}; {restarted}") from cause
    log.warning("%s; it is restarted, and the run goes back from step %d to %d", cause, run.step, back_to)
    run.published = -1
    await run.learner.restart()
    await (start_over(run) if run.newest_checkpoint is None else restore(run))


async def poll_control(run: Run) -> None:
    """Applies scaling requests and reports status; see run_control.RunControl."""
    while True:
        try:
            answer = run.control.exchange.remote({"step": run.step, **run.actors.counts()})
            wanted = await with_deadline(CONTROL_TIMEOUT_S, answer, "the run's control actor")
        except LOST:  # Ray restarts it
            wanted = None
        if wanted is not None:
            log.info("rollout actors: %d -> %d", run.actors.num_wanted, wanted)
            await run.actors.scale(wanted)
        await asyncio.sleep(CONTROL_POLL_S)


async def watch(run: Run) -> None:
    """The watchdog: names the longest waits of this process when no step ends within watchdog_s."""
    seen, since = run.step, time.monotonic()
    while True:
        await asyncio.sleep(run.config.watchdog_s)
        now = time.monotonic()
        if run.step != seen:
            seen, since = run.step, now
        else:
            longest = [f"{wait.what} ({now - wait.since_s:.0f} s)" for wait in waits()[:WAITS_SHOWN]]
            what = "; ".join(longest) or "nothing that has a name"
            log.warning("no step for %.0f s; waiting for %s", now - since, what)
