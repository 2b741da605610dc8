"""What a signal does to a run, by the moment at which it comes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import driver.stopping
from driver.progress import Progress
from driver.run import Run, unless_stopped
from driver.start_ray import SIGNALS, stopped_by_signals
from driver.stopping import shutdown_at_end
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
        asyncio.run(asyncio.wait_for(go(), 30))
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
        run.settled.clear()
        send()
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert run.is_over, "no further step may begin"
        run.progress.step += 1
        run.settled.set()
        await forever()

    stopped(run, body)
    assert written == [4]


def test_an_update_that_does_not_end_is_given_up_and_what_there_is_stands(written):
    run = make_run(stop_grace_s=0.05)

    async def body(send):
        run.settled.clear()
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
        run.settled.clear()
        async with run.saving:
            send()
            await asyncio.sleep(0.3)
            run.newest_checkpoint = 3
        assert not run.settled.is_set()
        run.settled.set()
        await forever()

    assert "at step 3: continue" in str(stopped(run, body)) and written == []


def test_nothing_new_is_not_written_again(written):
    async def body(send):
        send()
        await forever()

    assert "at step 3" in str(stopped(make_run(step=3, newest_checkpoint=3), body)) and written == []
    assert (
        "nothing to resume from" in str(stopped(make_run(step=0, newest_checkpoint=None), body))
        and written == []
    )


def test_a_run_that_is_told_to_stop_while_it_restores_can_go_on_from_there(written):
    async def body(send):
        run.settled.clear()
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


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_run_has_begun_is_one_line(which):
    before = signal.getsignal(which)

    def wait() -> None:
        with stopped_by_signals("while it waited"):
            os.kill(os.getpid(), which)
            time.sleep(5)

    with pytest.raises(StoppedError, match=f"^stopped by {which.name} while it waited$") as caught:
        wait()
    assert caught.value.exit_code == 128 + which and signal.getsignal(which) == before


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
        asyncio.get_running_loop().call_later(0.01, run.stop, signal.SIGTERM)
        assert await unless_stopped(run, forever()) is None

    asyncio.run(go())


TWICE = """
import asyncio, os, signal, sys
from tests.driver.test_stopping import forever, make_run
from driver.stopping import shutdown_at_end
async def go():
    run = make_run()
    async with shutdown_at_end(run):
        run.settled.clear()
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
