"""Which errors say that a process was lost, so that what it did can be done again."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from video_opd.errors import DeadlineError, PartLostError

T = TypeVar("T")

LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, DeadlineError)
"""A dead process, an object that died with its owner or node, or no answer by the deadline."""


def cause_of(error: BaseException) -> str:
    """What an error says, in one line: the last of a remote traceback, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if started_badly(error) else lines[0]


def started_badly(error: BaseException) -> bool:
    """An actor whose constructor raised: it would raise again."""
    return isinstance(error, RayActorError) and error.actor_init_failed


async def retried(call: Callable[[], Awaitable[T]], max_retries: int, what: str) -> T:
    """The result of `call()`, made again after LOST errors. Raises PartLostError with the last cause when retries are used up."""
    for attempt in range(max_retries + 1):
        try:
            return await call()
        except LOST as error:
            if attempt == max_retries or started_badly(error):
                times = f"{what} was lost {attempt + 1} times (max_retries={max_retries})"
                raise PartLostError(f"{times}: {cause_of(error)}") from error
    raise AssertionError
