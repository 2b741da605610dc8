"""Waits have names and deadlines; lost calls are repeated a bounded number of times, other errors are not."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from video_opd.cluster.deadline import waits, with_deadline
from video_opd.cluster.faults import cause_of, retried
from video_opd.errors import DeadlineError, PartLostError

BAD_START = ActorDiedError(
    RayTaskError(
        "__init__", 'Traceback\n  File "x"\nValueError: no such model\n', ValueError("no such model")
    )
)


def failing(*errors: BaseException):
    left = list(errors)

    async def call() -> str:
        if left:
            raise left.pop(0)
        return f"answered, {len(left)} left"

    return call


def test_waits_are_named_while_they_last_and_end_at_their_deadline():
    async def run() -> None:
        long = asyncio.ensure_future(with_deadline(500, asyncio.sleep(400), "the long one"))
        await asyncio.sleep(0.01)
        short = asyncio.ensure_future(with_deadline(0.01, asyncio.sleep(400), "the short one"))
        await asyncio.sleep(0)
        assert [w.what for w in waits()] == ["the long one", "the short one"]
        with pytest.raises(DeadlineError, match="the short one did not end within 0 s"):
            await short
        assert [w.what for w in waits()] == ["the long one"]
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert not waits()

    asyncio.run(run())


def test_a_timeout_of_what_is_waited_for_is_not_the_deadlines():
    async def nfs() -> None:
        raise TimeoutError("Connection timed out")

    with pytest.raises(TimeoutError, match="Connection timed out"):
        asyncio.run(with_deadline(5, nfs(), "a checkpoint"))


@pytest.mark.parametrize("error", [ActorDiedError(), DeadlineError("late")])
def test_what_is_lost_is_done_again_so_often_and_no_more(error):
    assert asyncio.run(retried(failing(error, error), 2, "a call")) == "answered, 0 left"
    with pytest.raises(PartLostError, match=r"a call was lost 3 times \(max_retries=2\): ") as caught:
        asyncio.run(retried(failing(error, error, error), 2, "a call"))
    assert caught.value.__cause__ is error


def test_other_errors_are_not_done_again():
    with pytest.raises(ZeroDivisionError):
        asyncio.run(retried(failing(ZeroDivisionError()), 5, "a call"))


def test_an_actor_whose_constructor_raises_is_not_started_again_and_its_cause_is_told():
    assert cause_of(BAD_START) == "ValueError: no such model"
    with pytest.raises(PartLostError, match=r"a start was lost 1 times .*: ValueError: no such model"):
        asyncio.run(retried(failing(BAD_START), 5, "a start"))


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("a\nb"), "a"), (ValueError(), "ValueError"), (OSError(2, "gone"), "[Errno 2] gone")],
)
def test_causes_are_one_line(error, line):
    assert cause_of(error) == line
