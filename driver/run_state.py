"""What a run is doing, and whether a signal asked it to stop."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum


class Phase(StrEnum):
    """A run's phase, as far as checkpoints are concerned."""

    STARTING = "starting"  # nothing is done yet
    RUNNING = "running"  # learner, curriculum and step fit each other: a checkpoint can be written
    UPDATING = "updating"  # they do not, until the step is done
    RESTORING = "restoring"  # they do not, until a checkpoint is loaded
    SAVING = "saving"  # a checkpoint or an export is being written


class RunState:
    """The phase of a run and the signal that asked it to stop; other tasks can wait for both."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.stopped_by: signal.Signals | None = None
        self.stopped_at_s = 0.0  # monotonic clock
        self._changed = asyncio.Event()

    @property
    def is_settled(self) -> bool:
        """Learner, curriculum and step fit each other."""
        return self.phase in (Phase.STARTING, Phase.RUNNING)

    def enter(self, phase: Phase) -> None:
        self.phase = phase
        self._wake()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The block is Phase.SAVING; then the phase is what it was."""
        before = self.phase
        self.enter(Phase.SAVING)
        try:
            yield
        finally:
            self.enter(before)

    def stop(self, which: signal.Signals) -> None:
        self.stopped_by, self.stopped_at_s = which, time.monotonic()
        self._wake()

    async def wait_until(self, reached: Callable[[], object]) -> None:
        """Waits for a phase or a stop, until `reached()` is true."""
        while not reached():
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
