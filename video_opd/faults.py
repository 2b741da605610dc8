"""Which errors say that a process was lost, so that what it did can be done again."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from video_opd.errors import DeadlineError, PartLostError

T = TypeVar("T")

LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, DeadlineError)
"""A dead process, an object that died with its owner or node, or no answer by the deadline."""


def one_line(error: BaseException) -> str:
    """The first line of an error's text, for people."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


async def retried(call: Callable[[], Awaitable[T]], max_retries: int, what: str) -> T:
    """The result of `call()`, made again after LOST errors. Raises PartLostError with the last cause when retries are used up."""
    for attempt in range(max_retries + 1):
        try:
            return await call()
        except LOST as error:
            if attempt == max_retries:
                raise PartLostError(
                    f"{what} was lost {attempt + 1} times (max_retries={max_retries}): {one_line(error)}"
                ) from error
    raise AssertionError
