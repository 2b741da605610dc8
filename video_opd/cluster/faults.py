"""Errors that mean a process was lost, and retries after them."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from video_opd.errors import DeadlineError, PartLostError

T = TypeVar("T")

LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, DeadlineError)
"""A dead process, an object that died with its owner or node, or no answer by the deadline."""


def cause_of(error: BaseException) -> str:
    """The error's message in one line: the last of a constructor's remote traceback, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if started_badly(error) else lines[0]


def started_badly(error: BaseException) -> bool:
    """Whether an actor's constructor raised, which a restart would not change."""
    return isinstance(error, RayActorError) and error.actor_init_failed


async def retried(call: Callable[[], Awaitable[T]], max_retries: int, what: str) -> T:
    """The result of `call()`, repeated up to `max_retries` times after LOST errors. Raises PartLostError."""
    for attempt in range(max_retries + 1):
        try:
            return await call()
        except LOST as error:
            if attempt == max_retries or started_badly(error):
                times = f"{what} was lost {attempt + 1} times (max_retries={max_retries})"
                raise PartLostError(f"{times}: {cause_of(error)}") from error
    raise AssertionError
