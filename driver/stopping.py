"""How a run ends: by itself, stopped by a signal, or with its Ray."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from ray.exceptions import RayError
from rich.console import Console

from driver.checkpoints import checkpoint
from driver.run import Run
from driver.run_state import Phase
from driver.signals import signalled_again, signals_to_handle
from video_opd.cluster.faults import cause_of
from video_opd.cluster.join import Lifeline, kill_own_ray
from video_opd.errors import StoppedError, VideoOPDError
from video_opd.logs import log

LIFELINE_POLL_S = 1.0
SIGNAL_DELAY_S = 0.02  # a signal for everything reaches Ray and this process, in any order


@asynccontextmanager
async def shutdown_at_end(run: Run) -> AsyncIterator[None]:
    """The block is the run. On exit, stops teacher and learner and waits for uploads.

    After SIGTERM or SIGINT the update under way has stop_grace_s to end. Then the block is cancelled, a
    checkpoint written and StoppedError raised, also if the block has just ended: an evaluation was cut short.
    A second signal, later than SAME_STOP_S, ends the process at once.
    """
    task = asyncio.current_task()
    assert task
    loop, handlers = asyncio.get_running_loop(), {w: signal.getsignal(w) for w in signals_to_handle()}
    for which in handlers:
        loop.add_signal_handler(which, _on_signal, run, which)
    stopping = asyncio.ensure_future(_cancel_after_signal(run, task))
    try:
        yield
        if run.state.stopped_by is not None:
            raise asyncio.CancelledError
    except (asyncio.CancelledError, Exception) as error:
        stopping.cancel()
        if run.state.stopped_by is None:
            raise
        if isinstance(error, asyncio.CancelledError):
            task.uncancel()
        raise await _stopped(run, run.state.stopped_by) from None
    finally:
        stopping.cancel()
        async with AsyncExitStack() as last:  # runs all, in reverse order, whatever one of them raises
            for which, handler in handlers.items():
                last.callback(signal.signal, which, handler)
                last.callback(loop.remove_signal_handler, which)
            if run.uploads:  # can take an hour: only after the parts gave back their places
                last.push_async_callback(run.uploads.finish)
            last.callback(run.learner.stop)
            if run.teacher:
                last.callback(run.teacher.stop)


def _on_signal(run: Run, which: signal.Signals) -> None:
    if run.state.stopped_by is not None:
        return signalled_again(which, run.state.stopped_at_s)
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
    newest = run.newest_checkpoint
    where = "before its first checkpoint" if newest is None else f"at step {newest}"
    return StoppedError(f"stopped by {which.name} {where}: {how_to_resume(run.folder)}{note}", which)


def how_to_resume(folder: Path) -> str:
    return f"continue with --resume {folder}"


@asynccontextmanager
async def ended_with_ray(run: Run) -> AsyncIterator[None]:
    """In the block, the process ends with one line soon after its Ray did.

    A thread watches, and ends it as a crash does: calls of Ray wait for a minute, then it aborts.
    """
    lifeline, over = Lifeline(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            if (why := lifeline.wait(LIFELINE_POLL_S)) and not over.wait(SIGNAL_DELAY_S):
                _end_without_ray(run, why)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()
    try:
        yield
    finally:
        over.set()


def _end_without_ray(run: Run, why: str) -> None:
    which = run.state.stopped_by
    ended = "error: Ray ended under the run" if which is None else f"stopped by {which.name}, and Ray with it"
    line = f"{ended} ({why}): {how_to_resume(run.folder)}"
    log.error(line)
    Console(stderr=True).show_cursor()  # which a progress bar hides
    print(line, file=sys.stderr, flush=True)
    kill_own_ray()
    os._exit(1 if which is None else 128 + which)
