"""What people see of a pass: bars on a terminal, else a line now and then."""

import asyncio
import io
import logging
from typing import Any

import pytest
from rich.console import Console

import driver.passes
from driver.passes import shown
from driver.records import report

PROMPTS: Any = range(5)


@pytest.fixture
def lines(caplog) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "video_opd")
    return caplog


def test_without_a_terminal_there_is_a_line_now_and_then_and_nothing_else(monkeypatch, capsys, lines):
    times = iter([0.0, 30.0, 60.0, 119.0, 150.0])
    monkeypatch.setattr(driver.passes.time, "monotonic", lambda: next(times))
    with shown("answers", 20) as arrived:
        for _ in range(4):
            arrived(PROMPTS, PROMPTS)
    assert [(r.levelno, r.message) for r in lines.records] == [
        (logging.INFO, "answers: 10 of 20 prompts, about 0:01:00 left"),
        (logging.INFO, "answers: 20 of 20 prompts, about 0:00:00 left"),
    ]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_passes_share_a_display_and_end_in_any_order(monkeypatch, lines):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    for module in (driver.passes, report):
        monkeypatch.setattr(module, "TERMINAL", terminal)
    monkeypatch.setattr(driver.passes, "LINE_EVERY_S", 0.0)

    async def one(what: str, begins: asyncio.Event, ends: asyncio.Event) -> None:
        with shown(what, 10) as arrived:
            begins.set()
            arrived(PROMPTS, PROMPTS)
            await ends.wait()

    async def both() -> None:
        first, second, end = (asyncio.Event() for _ in range(3))
        task = asyncio.create_task(one("teacher", first, second))
        await first.wait()
        await asyncio.gather(task, one("student", second, end), asyncio.to_thread(lambda: None), ending(end))

    async def ending(end: asyncio.Event) -> None:
        await asyncio.sleep(0)
        driver.passes._bars._display.refresh()  # type: ignore[union-attr]
        end.set()

    asyncio.run(both())
    assert driver.passes._bars._display is None and not terminal._live_stack
    with report.progress_bar(3, 0):  # a pass within the run's own bar
        asyncio.run(both())
    assert not terminal._live_stack
    text = screen.getvalue()
    assert all(what in text for what in ("teacher", "student", "5/10", "step"))
    assert {r.levelno for r in lines.records} == {logging.DEBUG}, "the bar says it on the terminal"
