"""Work done ahead of an engine that needs its results one after another."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")


class Feed(Generic[Item]):
    """A pool of threads for all callers of a process. At most `max_bytes` of results wait for their callers.

    Each caller may always have one item under way, however large, so callers never wait for each other.
    """

    def __init__(self, num_threads: int, max_bytes: int, size_of: Callable[[Item], int]):
        """size_of: the bytes of an item's result, known before it is made."""
        self._threads = ThreadPoolExecutor(num_threads, "feed")
        self._free_bytes, self._size_of = max_bytes, size_of
        self._lock = threading.Lock()

    def ahead(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """work(item) for each, in order. The next ones are made while the caller uses one.

        The first ones are begun at the call, before the first result is asked for. Raises what work raises.
        An iterator that is dropped, even before its first result, gives its bytes back.
        """
        results = self._results(work, deque(items))
        next(results)  # a generator that has not started would clean nothing up
        return cast(Iterator[Result], results)

    def _begin(
        self, work: Callable[[Item], Result], left: deque[Item], begun: deque[tuple[Future[Result], int]]
    ) -> None:
        while left:
            size = self._size_of(left[0])
            with self._lock:
                if begun and size > self._free_bytes:
                    return
                self._free_bytes -= size
            begun.append((self._threads.submit(work, left.popleft()), size))

    def _results(self, work: Callable[[Item], Result], left: deque[Item]) -> Iterator[Result | None]:
        """None when the first ones are begun, then the results."""
        begun = deque[tuple[Future[Result], int]]()
        try:
            self._begin(work, left, begun)
            yield None
            while begun:
                result = begun[0][0].result()
                yield result
                self._release(begun.popleft())
                self._begin(work, left, begun)
        finally:  # a caller may stop early
            for unused in begun:
                self._release(unused)

    def _release(self, begun: tuple[Future[Result], int]) -> None:
        future, size = begun
        future.cancel()
        with self._lock:
            self._free_bytes += size
