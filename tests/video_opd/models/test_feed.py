"""The feed works ahead of its caller, within its bytes, and callers never wait for each other."""

import threading

import pytest

from video_opd.models.feed import Feed

TIMEOUT_S = 30


def wait_for(event: threading.Event) -> None:
    assert event.wait(TIMEOUT_S)


def test_the_next_items_are_made_before_they_are_asked_for():
    made = [threading.Event() for _ in range(4)]

    def work(i: int) -> int:
        made[i].set()
        return i * i

    results = Feed[int](2, 100, lambda i: 30).ahead(work, range(4))
    for i in range(3):  # begun at the call: nothing was asked for
        wait_for(made[i])
    assert next(results) == 0 and not made[3].is_set(), "a fourth would exceed 100 bytes"
    assert next(results) == 1  # the first was released
    wait_for(made[3])
    assert list(results) == [4, 9]


def test_a_caller_gets_its_first_item_though_another_holds_all_the_bytes():
    feed = Feed[int](1, 10, lambda i: 10)
    held = feed.ahead(lambda i: i, [1, 2])
    assert next(held) == 1
    assert list(feed.ahead(lambda i: i, [3, 4, 5])) == [3, 4, 5]
    assert list(held) == [2]


def test_a_caller_that_stops_early_gives_its_bytes_back():
    feed = Feed[int](2, 20, lambda i: 10)
    for _ in range(5):
        results = feed.ahead(lambda i: i, range(9))
        assert next(results) == 0
        results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert feed._free_bytes == 20


def test_a_caller_that_never_asks_gives_its_bytes_back_and_what_has_not_begun_is_not_made():
    feed, made, free = Feed[int](1, 30, lambda i: 10), [], threading.Event()

    def work(i: int) -> None:
        wait_for(free)
        made.append(i)

    begun = feed.ahead(work, range(9))
    del begun
    assert feed._free_bytes == 30
    free.set()
    assert list(feed.ahead(lambda i: i, [7])) == [7]
    assert made in ([], [0]), "the one thread may have begun the first"


def test_the_error_of_an_item_is_raised_where_its_result_is_asked_for():
    def work(i: int) -> float:
        return 1 / i

    results = Feed[int](2, 100, lambda i: 1).ahead(work, [1, 0, 2])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
