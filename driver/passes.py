"""How far passes over many prompts are: bars with the time left on a terminal, else a line now and then."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

from rich import progress as bars
from rich.console import Console

from video_opd.logs import log
from video_opd.passes import Arrived
from video_opd.types import Prompt

LINE_EVERY_S = 60.0
SPEED_OVER_S = 3600.0  # the time left follows from the speed in this time: a call may take minutes
TERMINAL = Console(stderr=True)  # of all bars: rich draws those of one console together


class Bars:
    """The bars of the passes under way, as one display: rich's displays must end in reverse order."""

    def __init__(self) -> None:
        self._display: bars.Progress | None = None

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields what advances the bar."""
        if self._display is None:
            columns = "{task.description}", bars.MofNCompleteColumn(), bars.BarColumn(), "prompts"
            times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
            how: dict[str, Any] = {"transient": True, "speed_estimate_period": SPEED_OVER_S}
            self._display = bars.Progress(*columns, *times, console=TERMINAL, **how)
            self._display.start()
        display = self._display
        task = display.add_task(what, total=total)
        try:
            yield partial(display.advance, task)
        finally:
            display.remove_task(task)
            if not display.tasks:
                display.stop()
                self._display = None


_bars = Bars()


@contextmanager
def shown(what: str, num_prompts: int) -> Iterator[Arrived]:
    """Shows how many of the prompts have arrived while the block runs, and logs it every LINE_EVERY_S."""
    started = logged = time.monotonic()
    num_arrived, on_terminal = 0, TERMINAL.is_terminal
    level = logging.DEBUG if on_terminal else logging.INFO  # DEBUG: to the run's file alone

    def arrived(prompts: Sequence[Prompt], results: Sequence[Any]) -> None:
        nonlocal num_arrived, logged
        num_arrived += len(prompts)
        advance(len(prompts))
        now = time.monotonic()
        if now - logged >= LINE_EVERY_S:
            logged = now
            left = timedelta(seconds=round((now - started) * (num_prompts - num_arrived) / num_arrived))
            log.log(level, "%s: %d of %d prompts, about %s left", what, num_arrived, num_prompts, left)

    with _bars.bar(what, num_prompts) if on_terminal else nullcontext(lambda _: None) as advance:
        yield arrived
