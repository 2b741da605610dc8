"""What a signal does to a run, by the moment at which it comes."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import driver.stopping
from driver.progress import Progress
from driver.run import Run, unless_stopped
from driver.run_state import Phase
from driver.signals import SIGNALS, stopped_by_signals
from driver.stopping import ended_with_ray, shutdown_at_end
from video_opd.errors import RunError, StoppedError

ROOT = Path(__file__).resolve().parents[2]


def make_run(step: int = 3, newest_checkpoint: int | None = 2, stop_grace_s: float = 60.0) -> Any:
    parts: Any = {name: None for name in ("plan", "actors", "teacher", "curriculum", "control")}
    parts["learner"] = SimpleNamespace(stop=lambda: None)
    config: Any = SimpleNamespace(stop_grace_s=stop_grace_s, max_scored_tokens=None)
    parts |= {"config": config, "given": config, "rewards": [], "progress": Progress(step=step)}
    return Run(folder=Path("runs/name"), newest_checkpoint=newest_checkpoint, **parts)


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """Default handlers, even where the shell ignores SIGINT, as it does in the background."""
    before = {which: signal.getsignal(which) for which in SIGNALS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The steps whose checkpoints were written."""
    steps: list[int] = []

    async def checkpoint(run: Run) -> None:
        steps.append(run.step)
        run.newest_checkpoint = run.step

    monkeypatch.setattr(driver.stopping, "checkpoint", checkpoint)
    return steps


def stopped(run: Any, body: Any, which: signal.Signals = signal.SIGTERM) -> StoppedError:
    """How the run ends whose body calls what it is given to send the signal."""

    async def go():
        async with shutdown_at_end(run):
            await body(lambda: os.kill(os.getpid(), which))

    with pytest.raises(StoppedError) as caught:
        asyncio.run(asyncio.wait_for(go(), 120))
    assert "\n" not in str(caught.value)
    return caught.value


async def forever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_waits_ends_where_it_stands(written, which, code):
    async def body(send):
        send()
        await forever()

    error = stopped(make_run(), body, which)
    assert written == [3] and error.exit_code == code
    assert str(error) == f"stopped by {which.name} at step 3: continue with --resume runs/name"


def test_the_update_under_way_is_done_first(written):
    run = make_run()

    async def body(send):
        run.state.enter(Phase.UPDATING)
        send()
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert run.is_over, "no further step may begin"
        run.progress.step += 1
        run.state.enter(Phase.RUNNING)
        await forever()

    stopped(run, body)
    assert written == [4]


def test_an_update_that_does_not_end_is_given_up_and_what_there_is_stands(written):
    run = make_run(stop_grace_s=0.05)

    async def body(send):
        run.state.enter(Phase.UPDATING)
        send()
        await forever()

    error = stopped(run, body)
    assert written == []
    assert "at step 2: continue" in str(error) and "step 3 was not done within stop_grace_s=0.05" in str(
        error
    )


def test_a_checkpoint_that_is_being_written_is_waited_for(written):
    run = make_run(stop_grace_s=0.02)

    async def body(send):
        run.state.enter(Phase.UPDATING)
        with run.state.saving():
            send()
            await asyncio.sleep(0.3)
            run.newest_checkpoint = 3
        assert run.state.phase is Phase.UPDATING
        run.state.enter(Phase.RUNNING)
        await forever()

    assert "at step 3: continue" in str(stopped(run, body)) and written == []


def test_nothing_new_is_not_written_again(written):
    async def body(send):
        send()
        await forever()

    assert "at step 3" in str(stopped(make_run(step=3, newest_checkpoint=3), body)) and written == []
    error = stopped(make_run(step=0, newest_checkpoint=None), body)
    first = "stopped by SIGTERM before its first checkpoint: continue with --resume runs/name"
    assert str(error) == first and written == []


def test_a_run_that_is_told_to_stop_while_it_restores_can_go_on_from_there(written):
    async def body(send):
        run.state.enter(Phase.RESTORING)
        send()
        await forever()

    run = make_run(step=5, newest_checkpoint=5, stop_grace_s=0.05)
    run.resume_from = object()
    assert (
        str(stopped(run, body)) == "stopped by SIGTERM at step 5: continue with --resume runs/name"
        and written == []
    )


def test_the_parts_give_their_places_back_before_uploads_end():
    ended: list[str] = []

    async def finish() -> None:
        ended.append("uploads")

    async def go() -> None:
        run = make_run()
        run.learner.stop = lambda: ended.append("learner")
        run.teacher = SimpleNamespace(stop=lambda: ended.append("teacher") or 1 / 0)
        run.uploads = SimpleNamespace(finish=finish)
        async with shutdown_at_end(run):
            pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(go())
    assert ended == ["teacher", "learner", "uploads"]


@pytest.mark.parametrize("which", SIGNALS)
def test_a_signal_outside_the_loop_is_one_line_that_no_handler_of_errors_takes(which):
    before = signal.getsignal(which)

    def wait() -> None:
        with stopped_by_signals(" before the run began") as said:
            said.text = ": as it was told to"
            try:
                os.kill(os.getpid(), which)
                time.sleep(5)
            except Exception:
                pytest.fail("a library's handler took it for an error of its own")

    with pytest.raises(StoppedError, match=f"^stopped by {which.name}: as it was told to$") as caught:
        wait()
    assert caught.value.exit_code == 128 + which and signal.getsignal(which) == before


@pytest.mark.parametrize("which", SIGNALS)
def test_the_same_stop_may_come_twice_as_from_timeout_which_signals_process_and_group(written, which):
    async def body(send):
        send()
        send()
        await asyncio.sleep(0)
        send()
        await forever()

    def wait() -> None:
        with stopped_by_signals(" before the run began"):
            try:
                os.kill(os.getpid(), which)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), which)

    assert "at step 3: continue" in str(stopped(make_run(), body, which)) and written == [3]
    with pytest.raises(StoppedError, match="before the run began"):
        wait()


def test_a_run_that_ends_while_it_is_told_to_stop_was_stopped(written):
    """Its last evaluation was cut short: its results are not those of a whole run."""
    run = make_run()

    async def body(send):
        with run.state.saving():
            send()
            await run.state.wait_until(lambda: run.state.stopped_by)

    error = stopped(run, body)
    assert "stopped by SIGTERM at step 3" in str(error) and written == [3]


def test_handlers_are_what_they_were_once_a_run_has_ended():
    async def go() -> None:
        async with shutdown_at_end(make_run()):
            assert signal.getsignal(signal.SIGTERM) != before

    with stopped_by_signals(" after it"):
        before = signal.getsignal(signal.SIGTERM)
        asyncio.run(go())
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_checkpoint_that_fails_is_said(monkeypatch):
    async def checkpoint(_: Run) -> None:
        raise RunError("no room")

    monkeypatch.setattr(driver.stopping, "checkpoint", checkpoint)

    async def body(send):
        send()
        await forever()

    error = stopped(make_run(), body)
    assert "at step 2: continue" in str(error) and "step 3 could not be written: no room" in str(error)


def test_without_a_signal_a_run_ends_as_it_does(written):
    async def go(body):
        async with shutdown_at_end(make_run()):
            return await body

    async def fail():
        raise RunError("broken")

    assert asyncio.run(go(asyncio.sleep(0, "done"))) == "done"
    with pytest.raises(RunError):
        asyncio.run(go(fail()))
    assert written == []


def test_what_a_signal_interrupts_has_no_result():
    run = make_run()

    async def go():
        assert await unless_stopped(run, asyncio.sleep(0, "done")) == "done"
        asyncio.get_running_loop().call_later(0.01, run.state.stop, signal.SIGTERM)
        assert await unless_stopped(run, forever()) is None

    asyncio.run(go())


@pytest.mark.parametrize(
    ("which", "code", "said"),
    [
        (None, 1, "error: Ray ended under the run"),
        (signal.SIGTERM, 143, "stopped by SIGTERM, and Ray with it"),
    ],
)
def test_a_run_ends_with_its_ray_also_while_a_call_of_ray_does_not_return(
    monkeypatch, capsys, which, code, said
):
    run, calls, ended, over = make_run(), [], threading.Event(), threading.Event()

    class Lifeline:
        def wait(self, timeout_s: float) -> str:
            return "its raylet was ended by SIGKILL"

    def end(number: int) -> None:
        calls.append(number)
        ended.set()
        assert over.wait(60), "the process is gone here"

    async def go() -> None:
        if which:
            run.state.stop(which)
        async with ended_with_ray(run):
            assert ended.wait(60)
        over.set()

    monkeypatch.setattr(driver.stopping, "Lifeline", Lifeline)
    monkeypatch.setattr(driver.stopping, "kill_own_ray", lambda: calls.append("killed"))
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(driver.stopping.log, "handlers", [logging.NullHandler()])
    asyncio.run(go())
    why = "its raylet was ended by SIGKILL"
    assert capsys.readouterr().err == f"{said} ({why}): continue with --resume runs/name\n"
    assert calls == ["killed", code]


TWICE = """
import asyncio, os, signal, sys
import driver.signals
from driver.run_state import Phase
from tests.driver.test_stopping import forever, make_run
from driver.stopping import shutdown_at_end
driver.signals.SAME_STOP_S = 0.0
async def go():
    run = make_run()
    async with shutdown_at_end(run):
        run.state.enter(Phase.UPDATING)
        os.kill(os.getpid(), signal.SIGTERM)
        while not run.is_over:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await forever()
asyncio.run(go())
"""
IGNORED = """
import asyncio, os, signal
from tests.driver.test_stopping import make_run
from driver.stopping import shutdown_at_end
async def go():
    async with shutdown_at_end(make_run()):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.1)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and `&` in a script do
asyncio.run(go())
"""


@pytest.mark.parametrize(
    ("script", "code"), [(TWICE, -signal.SIGTERM), (IGNORED, 0)], ids=["a second signal", "an ignored one"]
)
def test_processes(script, code):
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
