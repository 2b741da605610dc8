"""How a run ends, by itself or because a signal asks it to."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from ray.exceptions import RayError

from driver.checkpoints import checkpoint
from driver.run import Run
from driver.start_ray import SIGNALS
from video_opd.cluster.faults import cause_of
from video_opd.errors import StoppedError, VideoOPDError
from video_opd.logs import log


@asynccontextmanager
async def shutdown_at_end(run: Run) -> AsyncIterator[None]:
    """The block is the run. Whatever ends it, teacher service and learner go, checkpoints on their way elsewhere arrive.

    The first SIGTERM or SIGINT lets the update under way end within stop_grace_s, ends the block there, and writes a checkpoint;
    a second one ends the process at once. Raises StoppedError, which says where the run can go on.
    """
    task = asyncio.current_task()
    assert task
    handled = _handle_signals(run)
    stopping = asyncio.ensure_future(_cancel_when_settled(run, task))
    try:
        yield
    except (asyncio.CancelledError, Exception) as error:
        if run.stopped_by is None:
            raise
        if isinstance(error, asyncio.CancelledError):
            task.uncancel()
        raise await _stopped(run) from None
    finally:
        stopping.cancel()
        async with AsyncExitStack() as last:  # each, whatever another raises; the one named last is the first
            for which in handled:
                last.callback(asyncio.get_running_loop().remove_signal_handler, which)
            if run.uploads:  # it may take an hour yet: without what holds places of the cluster
                last.push_async_callback(run.uploads.finish)
            last.callback(run.learner.stop)
            if run.teacher:
                last.callback(run.teacher.stop)


def _handle_signals(run: Run) -> list[signal.Signals]:
    """Which signals are handled: those that are not ignored, as SIGINT is under nohup, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    handled = [which for which in SIGNALS if signal.getsignal(which) != signal.SIG_IGN]
    for which in handled:
        asyncio.get_running_loop().add_signal_handler(which, _on_signal, run, which)
    return handled


def _on_signal(run: Run, which: signal.Signals) -> None:
    if run.stopped_by is not None:
        signal.signal(which, signal.SIG_DFL)
        os.kill(os.getpid(), which)
        return
    run.stopped_by = which
    run.stop.set()
    said = f"{which.name}: stopping after the step under way; a second signal ends the run at once"
    print(said, file=sys.stderr)
    log.debug(said)


async def _cancel_when_settled(run: Run, task: asyncio.Task) -> None:
    """After a signal: cancels the run where a checkpoint can be written, or, after stop_grace_s, where it is."""
    await run.stop.wait()
    with suppress(TimeoutError):
        await asyncio.wait_for(run.settled.wait(), run.config.stop_grace_s)
    while run.saving:  # as good as done, and what the grace is for
        await asyncio.sleep(0.05)
    task.cancel()


async def _stopped(run: Run) -> StoppedError:
    """The run ended by a signal, after a checkpoint if there is anything new that can be written."""
    assert run.stopped_by
    note = ""
    newest = run.resume_from if run.checkpointed is None else run.checkpointed
    if run.settled.is_set() and run.step > (newest or 0):
        try:
            await checkpoint(run)
            newest = run.checkpointed
        except (VideoOPDError, RayError, OSError) as error:
            note = f" (step {run.step} could not be written: {cause_of(error)})"
    elif not run.settled.is_set() and run.resume_from is None:
        note = f" (step {run.step} was not done within stop_grace_s={run.config.stop_grace_s:g})"
    if newest is None:
        where = "before its first checkpoint, there is nothing to go on with"
    else:
        where = f"at step {newest}: go on with --resume {run.folder}"
    return StoppedError(f"stopped by {run.stopped_by.name} {where}{note}", run.stopped_by)
