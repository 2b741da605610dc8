"""Every wait for another process has a deadline."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from video_opd.errors import RunError

T = TypeVar("T")


async def within(timeout_s: float, call: Awaitable[T], what: str) -> T:
    """The call's result. Raises RunError, naming `what` was waited for, after `timeout_s` seconds."""
    try:
        return await asyncio.wait_for(call, timeout_s)
    except TimeoutError:
        raise RunError(
            f"{what} did not end within {timeout_s:.0f} s: see the Ray dashboard, or raise request_timeout_s or start_timeout_s"
        ) from None
