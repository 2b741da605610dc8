"""Work done ahead of an engine that needs its results one after another."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Begun = tuple[Future[Result], int]
"""A result under way and its bytes."""


def _nothing() -> None:
    pass


class Feed(Generic[Item]):
    """A pool of threads for all callers of a process. At most `max_bytes` of results wait for their callers.

    Each caller may always have one item under way, however large, so callers never wait for each other.
    """

    def __init__(self, num_threads: int, max_bytes: int, size_of: Callable[[Item], int]):
        """size_of: the bytes of an item's result, known before it is made."""
        self._threads = ThreadPoolExecutor(num_threads, "feed")
        self._free_bytes, self._size_of = max_bytes, size_of
        self._lock = threading.RLock()  # the garbage collector may drop an Ahead while it is held

    def ahead(
        self, work: Callable[[Item], Result], items: Sequence[Item], on_ready: Callable[[], None] = _nothing
    ) -> "Ahead[Item, Result]":
        """work(item) for each, in order. The next ones are made while the caller uses one.

        The first ones are begun at the call, before the first result is asked for. A thread of the feed calls
        `on_ready` after each result. Raises what work raises.
        An iterator that is dropped, even before its first result, gives its bytes back.
        """
        return Ahead(self, work, items, on_ready)

    def begin(self, work: Callable[[Item], Result], item: Item, must: bool) -> Begun[Result] | None:
        """None if its bytes are not free, unless it `must` begin."""
        size = self._size_of(item)
        with self._lock:
            if size > self._free_bytes and not must:
                return None
            self._free_bytes -= size
        return self._threads.submit(work, item), size

    def release(self, size: int) -> None:
        with self._lock:
            self._free_bytes += size


class Ahead(Iterator[Result], Generic[Item, Result]):
    """The results of Feed.ahead. For one thread at a time."""

    def __init__(
        self,
        feed: Feed[Item],
        work: Callable[[Item], Result],
        items: Sequence[Item],
        on_ready: Callable[[], None],
    ):
        self._feed, self._work, self._left, self._on_ready = feed, work, deque(items), on_ready
        self._begun: deque[Begun[Result]] = deque()
        self._used_bytes = 0  # of the result that the caller has
        self._begin()

    def is_ready(self) -> bool:
        """Whether next() would not wait. The caller is done with the result before."""
        self._begin()
        return not self._begun or self._begun[0][0].done()

    def is_over(self) -> bool:
        """Whether there is no next result."""
        return not self._left and not self._begun

    def peek(self) -> Result | None:
        """The result that next() will return; None at the end. Raises what its work raised."""
        self._begin()
        return self._begun[0][0].result() if self._begun else None

    def __next__(self) -> Result:
        self._begin()
        if not self._begun:
            raise StopIteration
        future, self._used_bytes = self._begun.popleft()
        try:
            return future.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives all bytes back; a caller may stop early."""
        self._left.clear()
        for future, size in self._begun:
            future.cancel()
            self._feed.release(size)
        self._begun.clear()
        self._give_back()

    def __del__(self) -> None:
        self.close()

    def _begin(self) -> None:
        """Gives the bytes of the result before back, and begins what has room."""
        self._give_back()
        on_ready = self._on_ready  # a callback that held `self` would keep it alive
        while self._left:
            begun = self._feed.begin(self._work, self._left[0], must=not self._begun)
            if begun is None:
                return
            self._left.popleft()
            self._begun.append(begun)
            begun[0].add_done_callback(lambda _: on_ready())

    def _give_back(self) -> None:
        self._feed.release(self._used_bytes)
        self._used_bytes = 0
