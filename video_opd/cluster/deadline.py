"""Named waits, which the watchdog prints, and deadlines for waits on other processes."""

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from video_opd.errors import DeadlineError

T = TypeVar("T")


class Wait(NamedTuple):
    what: str
    since_s: float  # monotonic clock


_waits: list[Wait] = []


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Lists the wait while the block runs."""
    wait = Wait(what, time.monotonic())
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)


async def with_deadline(
    timeout_s: float, call: Awaitable[T], what: str, keys: str = "request_timeout_s or start_timeout_s"
) -> T:
    """The call's result. Raises DeadlineError, which names `what` and `keys`, after `timeout_s` seconds."""
    with waiting(what):
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                return await call
        except TimeoutError:
            if not deadline.expired():  # raised by the call itself
                raise
            hint = f"see the Ray dashboard, or raise {keys}"
            raise DeadlineError(f"{what} did not end within {timeout_s:.0f} s: {hint}") from None


def waits() -> list[Wait]:
    """The waits of this process, longest first."""
    return sorted(_waits, key=lambda wait: wait.since_s)
