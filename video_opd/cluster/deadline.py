"""Every wait has a name, and a deadline where it is for another process."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from video_opd.errors import DeadlineError

T = TypeVar("T")


class Wait(NamedTuple):
    """One wait under way."""

    what: str
    since_s: float  # monotonic clock


_waits: dict[int, Wait] = {}
_numbers = itertools.count()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Names a wait while it lasts, for the watchdog."""
    number = next(_numbers)
    _waits[number] = Wait(what, time.monotonic())
    try:
        yield
    finally:
        del _waits[number]


async def with_deadline(timeout_s: float, call: Awaitable[T], what: str) -> T:
    """The call's result. Raises DeadlineError, naming `what` was waited for, after `timeout_s` seconds."""
    with waiting(what):
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                return await call
        except TimeoutError:
            if not deadline.expired():  # what was waited for raised it
                raise
            raise DeadlineError(
                f"{what} did not end within {timeout_s:.0f} s: see the Ray dashboard, or raise request_timeout_s or start_timeout_s"
            ) from None


def waits() -> list[Wait]:
    """All that this process waits for, longest first."""
    return sorted(_waits.values(), key=lambda wait: wait.since_s)
