"""The slots between the sampling tasks and the learner, which bound the policy lag."""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from video_opd.types import ScoredGroup


class TrajectoryBuffer:
    """The slots of a round's steps, handed out and consumed in one order; a step has as many as prompts.

    A slot is handed out only when its step is at most max_policy_lag after the first whose weights are not
    published: then version `step - max_policy_lag` is. So no trajectory is more than max_policy_lag versions
    old, and none is ever evicted for its age, which would favour short answers. At most the slots of
    max_policy_lag + 1 steps are in use.
    """

    def __init__(self, step_sizes: Sequence[int], max_policy_lag: int):
        """step_sizes: prompts of each step of the round. Slots beyond the last step's are not handed out."""
        self._ends = [*accumulate(step_sizes, initial=0)]  # of step i: from _ends[i] to before _ends[i + 1]
        self._lag = max_policy_lag
        self._num_taken = self._num_released = 0  # steps
        self._is_closed = False
        self.asking = asyncio.Lock()  # held from a call of reserve to that of give_back
        self._next_slot = 0
        self._filled: dict[int, ScoredGroup] = {}
        self._changed = asyncio.Condition()

    @property
    def _open_until(self) -> int:
        """The first slot that may not be handed out yet."""
        return self._ends[min(self._num_released + self._lag + 1, len(self._ends) - 1)]

    async def reserve(self, at_most: int | None) -> list[int]:
        """Waits for free slots and takes up to `at_most`; empty when the round needs no more.

        None: all that are left of one step.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._next_slot < self._open_until or self._is_over)
            if self._is_over:
                return []
            first = self._next_slot
            of_step = self._ends[bisect_right(self._ends, first)] - first
            self._next_slot = min(first + (of_step if at_most is None else at_most), self._open_until)
            if self._is_over:
                self._changed.notify_all()
            return list(range(first, self._next_slot))

    @property
    def _is_over(self) -> bool:
        """No more slots are handed out."""
        return self._is_closed or self._next_slot == self._ends[-1]

    async def give_back(self, slots: Sequence[int]) -> None:
        """Frees those of the slots reserved last that nobody fills; they are handed out again."""
        async with self._changed:
            last = range(self._next_slot - len(slots), self._next_slot)
            assert list(slots) == list(last), f"slots {slots} are not the last ones reserved"
            self._next_slot -= len(slots)
            self._changed.notify_all()

    def step_of(self, slot: int) -> int:
        """Which step of the round trains on it, from 0 on."""
        return bisect_right(self._ends, slot) - 1

    async def fill(self, slot: int, group: ScoredGroup) -> None:
        async with self._changed:
            free = slot < self._next_slot and slot not in self._filled
            assert free, f"slot {slot} was not reserved or is filled"
            self._filled[slot] = group
            self._changed.notify_all()

    async def take(self) -> list[ScoredGroup]:
        """Waits until the slots of the next step are filled; returns their groups in slot order."""
        wanted = range(*self._ends[self._num_taken : self._num_taken + 2])
        async with self._changed:
            await self._changed.wait_for(lambda: all(slot in self._filled for slot in wanted))
            self._num_taken += 1
            return [self._filled.pop(slot) for slot in wanted]

    def counts(self) -> dict[str, float]:
        """Slots that are filled, reserved (sampled or scored just now) and free; the learner has the rest."""
        filled, handed_out = len(self._filled), self._next_slot - self._ends[self._num_taken]
        free = self._open_until - self._next_slot
        return {"buffer/filled": filled, "buffer/reserved": handed_out - filled, "buffer/free": free}

    async def close(self) -> None:
        """Hands out no more slots: the run ends earlier than planned."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def release(self) -> None:
        """Frees one step's slots, once the weights of that step are published."""
        async with self._changed:
            self._num_released += 1
            self._changed.notify_all()
