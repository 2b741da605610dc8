"""How a run ends: by itself, or stopped by a signal."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from ray.exceptions import RayError

from driver.checkpoints import checkpoint
from driver.run import Run
from driver.run_state import Phase
from driver.start_ray import signals_to_handle
from video_opd.cluster.faults import cause_of
from video_opd.errors import StoppedError, VideoOPDError
from video_opd.logs import log


@asynccontextmanager
async def shutdown_at_end(run: Run) -> AsyncIterator[None]:
    """The block is the run. On exit, stops teacher and learner and waits for uploads.

    After SIGTERM or SIGINT the update under way has stop_grace_s to end. Then the block is cancelled, a
    checkpoint written and StoppedError raised. A second signal ends the process at once.
    """
    task = asyncio.current_task()
    assert task
    loop, handled = asyncio.get_running_loop(), signals_to_handle()
    for which in handled:
        loop.add_signal_handler(which, _on_signal, run, which)
    stopping = asyncio.ensure_future(_cancel_after_signal(run, task))
    try:
        yield
    except (asyncio.CancelledError, Exception) as error:
        if run.state.stopped_by is None:
            raise
        if isinstance(error, asyncio.CancelledError):
            task.uncancel()
        raise await _stopped(run, run.state.stopped_by) from None
    finally:
        stopping.cancel()
        async with AsyncExitStack() as last:  # runs all, in reverse order, whatever one of them raises
            for which in handled:
                last.callback(loop.remove_signal_handler, which)
            if run.uploads:  # can take an hour: only after the parts gave back their places
                last.push_async_callback(run.uploads.finish)
            last.callback(run.learner.stop)
            if run.teacher:
                last.callback(run.teacher.stop)


def _on_signal(run: Run, which: signal.Signals) -> None:
    if run.state.stopped_by is not None:
        signal.signal(which, signal.SIG_DFL)
        os.kill(os.getpid(), which)
        return
    run.state.stop(which)
    message = f"{which.name}: stopping after the step under way; a second signal ends the run at once"
    print(message, file=sys.stderr)
    log.debug(message)


async def _cancel_after_signal(run: Run, task: asyncio.Task) -> None:
    """After a signal, waits at most stop_grace_s until a checkpoint can be written; then cancels the run."""
    state = run.state
    await state.wait_until(lambda: state.stopped_by)
    with suppress(TimeoutError):
        await asyncio.wait_for(state.wait_until(lambda: state.is_settled), run.config.stop_grace_s)
    await state.wait_until(lambda: state.phase is not Phase.SAVING)  # almost done, and what the grace is for
    task.cancel()


async def _stopped(run: Run, which: signal.Signals) -> StoppedError:
    """Writes a checkpoint if there is something new and it can be written; returns how the run ended."""
    note = ""
    if run.state.is_settled and run.step > (run.newest_checkpoint or 0):
        try:
            await checkpoint(run)
        except (VideoOPDError, RayError, OSError) as error:
            note = f" (step {run.step} could not be written: {cause_of(error)})"
    elif not run.state.is_settled and run.resume_from is None:
        note = f" (step {run.step} was not done within stop_grace_s={run.config.stop_grace_s:g})"
    if run.newest_checkpoint is None:
        where = "before its first checkpoint: nothing to resume from"
    else:
        where = f"at step {run.newest_checkpoint}: continue with --resume {run.folder}"
    return StoppedError(f"stopped by {which.name} {where}{note}", which)
