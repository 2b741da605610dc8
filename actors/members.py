"""The members of an actor pool: how actors join, are set aside, drain, are lost and are replaced."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from video_opd.cluster.deadline import with_deadline
from video_opd.cluster.faults import cause_of, retried
from video_opd.config import Config
from video_opd.errors import LearnerLostError, PartLostError
from video_opd.logs import log

DRAIN_POLL_S = 0.1
RETRY_START_S = 60.0  # after an actor could not be started


@dataclass(eq=False)
class Member:
    """One actor."""

    name: str
    handle: Any
    places: PlacementGroup | None = None  # of its shards
    calls: int = 0  # under way
    num_answers: int = 0  # to ActorPool._ask
    busy_s: float = 0.0  # with at least one call under way, since the last metrics
    since_s: float = field(default_factory=time.monotonic)  # up to which busy_s counts

    def end(self) -> None:
        ray.kill(self.handle)
        if self.places:
            remove_placement_group(self.places)

    def advance(self) -> None:
        now = time.monotonic()
        self.busy_s += (now - self.since_s) * bool(self.calls)
        self.since_s = now

    @contextmanager
    def called(self) -> Iterator[None]:
        """Counts a call. Those under way share the engine: a deadline covers all."""
        self.advance()
        self.calls += 1
        try:
            yield
        finally:
            self.advance()
            self.calls -= 1


class Members:
    """Keeps `num_wanted` actors in the pool; replaces those that are lost."""

    def __init__(self, config: Config, create: Callable[[], Member], admit: Callable[[Member], Awaitable]):
        """`admit` loads the current weights into an actor that is up, then calls `add` or `set_aside`."""
        self._config, self._create, self._admit = config, create, admit
        self.ready: list[Member] = []  # hold the current weights and get calls
        self.aside: list[Member] = []  # no whole version, so no calls until the next publication
        self.num_wanted = 0
        self.num_lost = 0
        self.learner_lost: LearnerLostError | None = None  # seen by an actor that asked for weights
        self._start_failure: PartLostError | None = None
        self._num_starting = 0
        self._changed = asyncio.Event()  # wakes those who wait in `choose`
        self._tasks: set[asyncio.Task] = set()

    @property
    def alive(self) -> list[Member]:
        return [*self.ready, *self.aside]

    async def start(self, created: list[Member]) -> None:
        """Returns when all of `created` are ready."""
        self.num_wanted = len(created)
        await asyncio.gather(*(self._join(member) for member in created))

    def scale(self, num_actors: int) -> None:
        """Starts missing actors. Surplus ones get no more calls, finish theirs, and end."""
        self.num_wanted = num_actors
        self.fill_up()
        for member in sorted(self.ready, key=lambda m: m.calls)[: max(0, len(self.ready) - num_actors)]:
            self.ready.remove(member)
            self._spawn(self._drain(member))

    def fill_up(self) -> None:
        """Starts as many actors as are missing."""
        for _ in range(self.num_wanted - len(self.alive) - self._num_starting):
            self._num_starting += 1
            self._spawn(self._replace())

    async def choose(self) -> Member:
        """The actor with the fewest calls, once one joins. PartLostError, LearnerLostError: none will."""
        while not self.ready:
            if self.learner_lost or not (self._num_starting or self.aside):
                raise self.learner_lost or self._start_failure or PartLostError("no rollout actor is left")
            self._changed.clear()
            await with_deadline(self._config.start_timeout_s, self._changed.wait(), "a rollout actor to join")
        return min(self.ready, key=lambda m: m.calls)

    def add(self, member: Member) -> None:
        """Makes an actor with the current weights ready; ends it if enough are."""
        if member in self.ready:
            return
        if member in self.aside:
            self.aside.remove(member)
        if len(self.ready) >= self.num_wanted:
            member.end()
            return
        self.ready.append(member)
        self._changed.set()

    def set_aside(self, member: Member) -> None:
        """No calls until a whole version of the weights is loaded."""
        if member in self.ready:
            self.ready.remove(member)
        if member not in self.aside:
            self.aside.append(member)
        self._changed.set()

    def lose(self, member: Member, error: Exception) -> None:
        """Ends a dead or hanging actor and starts another in its place."""
        if member not in self.alive:  # several calls to it failed at once, or it was draining
            return
        (self.ready if member in self.ready else self.aside).remove(member)
        self.num_lost += 1
        member.end()
        log.warning("%s was lost and is replaced: %s", member.name, cause_of(error))
        self.fill_up()

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for member in self.alive:
            member.end()

    async def _join(self, member: Member) -> None:
        timeout_s, what = self._config.start_timeout_s, f"the start of {member.name}"
        try:
            await with_deadline(timeout_s, member.handle.pid.remote(), what)
            await self._admit(member)
        except BaseException:
            member.end()
            raise

    async def _replace(self) -> None:
        """Adds one actor. While that fails, the others carry on and it is tried again."""
        what = "the start of a rollout actor"
        try:
            while True:
                try:
                    return await retried(lambda: self._join(self._create()), self._config.max_retries, what)
                except Exception as error:  # also what vLLM raises when its memory is gone
                    failed = PartLostError(f"{what} failed: {cause_of(error)}")
                    self._start_failure = error if isinstance(error, PartLostError) else failed
                    log.warning("%s; continuing with %d rollout actors", self._start_failure, len(self.ready))
                if not self.ready:
                    return
                await asyncio.sleep(RETRY_START_S)
                if len(self.alive) >= self.num_wanted:
                    return
        finally:
            self._num_starting -= 1
            self._changed.set()

    async def _drain(self, member: Member) -> None:
        try:
            while member.calls:
                await asyncio.sleep(DRAIN_POLL_S)
        finally:
            member.end()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
