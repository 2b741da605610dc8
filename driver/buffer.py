"""The slots between the sampling tasks and the learner, which bound the policy lag."""

import asyncio
from collections.abc import Sequence

from video_opd.types import ScoredGroup


class TrajectoryBuffer:
    """(max_policy_lag + 1) * groups_per_step slots, handed out and consumed in one order.

    A slot is handed out only when one is free, and slots become free only after the weights of the step that
    consumed them are published. So the n-th slot is handed out when at least version n // groups_per_step -
    max_policy_lag is published, and it is consumed by step n // groups_per_step: no trajectory is more than
    max_policy_lag versions old, and none is ever evicted for its age, which would favour short answers.
    """

    def __init__(self, groups_per_step: int, max_policy_lag: int, num_steps: int):
        """num_steps: slots beyond the last step's are never handed out."""
        self._groups_per_step = groups_per_step
        self._free = (max_policy_lag + 1) * groups_per_step
        self._left = num_steps * groups_per_step
        self._is_closed = False
        self.asking = asyncio.Lock()  # held from a call of reserve to that of give_back
        self._next_slot = 0
        self._first_slot = 0  # of the step that take() waits for
        self._filled: dict[int, ScoredGroup] = {}
        self._changed = asyncio.Condition()

    async def reserve(self, at_most: int | None) -> list[int]:
        """Waits for free slots and takes up to `at_most`; empty when the round needs no more.

        None: all that are left of one step.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._free > 0 or self._left == 0 or self._is_closed)
            if self._is_closed:
                return []
            if at_most is None:
                at_most = self._groups_per_step - self._next_slot % self._groups_per_step
            num_slots = min(at_most, self._free, self._left)
            slots = list(range(self._next_slot, self._next_slot + num_slots))
            self._next_slot += num_slots
            self._free -= num_slots
            self._left -= num_slots
            if self._left == 0:
                self._changed.notify_all()
            return slots

    async def give_back(self, slots: Sequence[int]) -> None:
        """Frees those of the slots reserved last that nobody fills; they are handed out again."""
        async with self._changed:
            last = range(self._next_slot - len(slots), self._next_slot)
            assert list(slots) == list(last), f"slots {slots} are not the last ones reserved"
            self._next_slot -= len(slots)
            self._free += len(slots)
            self._left += len(slots)
            self._changed.notify_all()

    async def fill(self, slot: int, group: ScoredGroup) -> None:
        async with self._changed:
            free = slot < self._next_slot and slot not in self._filled
            assert free, f"slot {slot} was not reserved or is filled"
            self._filled[slot] = group
            self._changed.notify_all()

    async def take(self) -> list[ScoredGroup]:
        """Waits until the slots of the next step are filled; returns their groups in slot order."""
        wanted = range(self._first_slot, self._first_slot + self._groups_per_step)
        async with self._changed:
            await self._changed.wait_for(lambda: all(slot in self._filled for slot in wanted))
            self._first_slot += self._groups_per_step
            return [self._filled.pop(slot) for slot in wanted]

    def counts(self) -> dict[str, float]:
        """Slots that are filled, reserved (sampled or scored just now) and free; the learner has the rest."""
        filled, handed_out = len(self._filled), self._next_slot - self._first_slot
        return {"buffer/filled": filled, "buffer/reserved": handed_out - filled, "buffer/free": self._free}

    async def close(self) -> None:
        """Hands out no more slots: the run ends earlier than planned."""
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def release(self) -> None:
        """Frees one step's slots, once the weights of that step are published."""
        async with self._changed:
            self._free += self._groups_per_step
            self._changed.notify_all()
