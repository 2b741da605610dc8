"""The rollout actors of a run, as the driver sees them: started, replaced, added and removed while it goes on."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from actors.rollout_actor import RolloutActor
from actors.weight_broadcast import WeightBroadcast, WeightSource
from video_opd.cluster.deadline import with_deadline
from video_opd.cluster.faults import LOST, cause_of, retried
from video_opd.config import Config
from video_opd.errors import LearnerLostError, PartLostError, WeightsLostError
from video_opd.logs import log
from video_opd.types import FailedPrompt, Prediction, Prompt, TrajectoryGroup, WeightUpdate

RolloutResult = TrajectoryGroup | FailedPrompt
DRAIN_POLL_S = 0.1
START_AGAIN_S = 60.0  # after the start of an actor was given up


@dataclass(eq=False)
class _Member:
    """An actor that may be called."""

    name: str
    handle: Any
    calls: int = 0  # under way
    num_loads: int = 0  # versions that it took whole
    busy_s: float = 0.0  # with at least one call under way, since the last lap
    since_s: float = field(default_factory=time.monotonic)  # up to which busy_s counts

    def advance(self) -> None:
        now = time.monotonic()
        self.busy_s += (now - self.since_s) * bool(self.calls)
        self.since_s = now

    @contextmanager
    def called(self) -> Iterator[int]:
        """A call, which yields how many there are with it: an actor serves one at a time, a deadline covers them all."""
        self.advance()
        self.calls += 1
        try:
            yield self.calls
        finally:
            self.advance()
            self.calls -= 1


class ActorPool:
    """Calls go to the actor that has the fewest. One that dies, or misses a deadline, is replaced and its work is done again.

    Every actor that joins has loaded the current weights before its first prompt. One that is alive without a whole version
    of them (a broadcast broke off, or they cannot be had when it joins) is set aside: it gets no calls until a publication
    has loaded one into it. An actor itself refuses to sample from anything but a whole version.
    """

    def __init__(self, name: str, config: Config, actor_class: type = RolloutActor):
        self._name, self._config, self._actor_class = name, config, actor_class
        self._numbers = itertools.count()
        self._members: list[_Member] = []
        self._wanted = 0
        self._aside: list[_Member] = []
        self._weights: tuple[int, list[ray.ObjectRef] | None] | None = (
            None  # what the members have; None: not in the store
        )
        self._source: WeightSource | None = None  # of weights that are not in the store, or not any more
        self._broadcast = WeightBroadcast(config)
        self._loading = asyncio.Lock()  # nobody joins while a version is handed out
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task] = set()
        self._starting = 0
        self._failure: PartLostError | None = None  # why the last start was given up
        self._learner_lost: LearnerLostError | None = None  # seen by an actor that wanted weights
        self._num_lost = 0
        self._lap_since_s = time.monotonic()
        self._created = [
            self._create() for _ in range(config.rollout.num_actors)
        ]  # on their way while other parts start

    def _create(self) -> _Member:
        name, rollout = f"actor-{next(self._numbers)}", self._config.rollout
        options = ray.remote(self._actor_class).options(
            name=f"{self._name}/{name}",
            num_cpus=rollout.num_cpus,
            num_gpus=rollout.num_gpus,
            resources={"rollout": 1},
            max_restarts=0,  # a silent restart would sample from old weights
            runtime_env={"env_vars": self._config.worker_env},
        )
        return _Member(name, options.remote(name, self._config))

    @property
    def num_wanted(self) -> int:
        return self._wanted

    async def start(self) -> None:
        """Returns when every engine is up."""
        self._wanted = len(self._created)
        await asyncio.gather(*(self._join(member) for member in self._created))

    async def scale(self, num_actors: int) -> None:
        """Asks for so many actors. More join when they are up; those beyond get no more calls, end theirs, and go."""
        self._wanted = num_actors
        self._fill_up()
        for member in sorted(self._members, key=lambda m: m.calls)[: max(0, len(self._members) - num_actors)]:
            self._members.remove(member)
            self._spawn(self._drain(member))

    def _fill_up(self) -> None:
        """Starts as many actors as are missing."""
        for _ in range(self._wanted - len(self._members) - len(self._aside) - self._starting):
            self._starting += 1
            self._spawn(self._replace())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self) -> None:
        """One more member. While it cannot be had the others go on without it, and it is tried again."""
        try:
            while not await self._try_to_replace() and self._members:
                await asyncio.sleep(START_AGAIN_S)
                if len(self._members) + len(self._aside) >= self._wanted:
                    return
        finally:
            self._starting -= 1
            await self._notify()

    async def _try_to_replace(self) -> bool:
        what = "the start of a rollout actor"
        try:
            await retried(lambda: self._join(self._create()), self._config.max_retries, what)
        except Exception as error:  # also what vLLM raises where its memory is gone
            self._failure = (
                error
                if isinstance(error, PartLostError)
                else PartLostError(f"{what} failed: {cause_of(error)}")
            )
            log.warning("%s; %d rollout actors go on", self._failure, len(self._members))
            return False
        return True

    async def _join(self, member: _Member) -> None:
        """Among the members once it is up and has the current weights; not if fewer are wanted by then."""
        try:
            await with_deadline(
                self._config.start_timeout_s, member.handle.pid.remote(), f"the start of {member.name}"
            )
            await self._load_current(member)
        except BaseException:
            ray.kill(member.handle)
            raise
        await self._notify()

    async def _load_current(self, member: _Member) -> None:
        """Takes the member in with the weights that the others have; sets it aside if they cannot be had any more.

        They went with the learner, or it is about to change them: either way it will publish again.
        """
        async with self._loading:
            try:
                if self._weights is not None and len(self._members) < self._wanted:
                    await self._load_published(member, *self._weights)
            except LearnerLostError as error:
                self._learner_lost = error
                self._aside.append(member)
            except (ObjectLostError, WeightsLostError):
                self._aside.append(member)
            else:
                self._take_in(member)

    async def _load_published(
        self, member: _Member, policy_version: int, buckets: list[ray.ObjectRef] | None
    ) -> None:
        """From the object store, into which the learner puts them again if they are not there."""
        if buckets is not None:
            try:
                return await self._load(member, policy_version, buckets)
            except ObjectLostError:
                if self._source is None:
                    raise
        assert self._source
        again = await self._source.put_published_weights(policy_version)
        self._weights = (policy_version, again)
        await self._load(member, policy_version, again)

    def _take_in(self, member: _Member) -> None:
        """Among those who may be called; not if fewer are wanted by now."""
        if len(self._members) >= self._wanted:
            ray.kill(member.handle)
            return
        member.since_s = time.monotonic()
        self._members.append(member)

    def _set_aside(self, member: _Member) -> None:
        if member in self._members:
            self._members.remove(member)
            self._aside.append(member)

    async def _load(self, member: _Member, policy_version: int, buckets: list[ray.ObjectRef]) -> None:
        call = member.handle.load_weights.remote(policy_version, buckets)
        with member.called() as num_calls:
            await with_deadline(
                num_calls * self._config.request_timeout_s, call, f"loading weights into {member.name}"
            )
        member.num_loads += 1

    async def _load_into(
        self, members: Sequence[_Member], policy_version: int, buckets: list[ray.ObjectRef]
    ) -> None:
        """Those that were aside are taken in."""

        async def load(member: _Member) -> None:
            try:
                await self._load(member, policy_version, buckets)
            except ObjectLostError:
                raise
            except LOST as error:  # its successor loads them when it joins
                self._lose(member, error)
            if member in self._aside:
                self._aside.remove(member)
                self._take_in(member)

        await asyncio.gather(*(load(member) for member in members))

    async def _drain(self, member: _Member) -> None:
        try:
            while member.calls:
                await asyncio.sleep(DRAIN_POLL_S)
        finally:
            ray.kill(member.handle)

    def _lose(self, member: _Member, error: Exception) -> None:
        """Takes a dead or hanging actor out, and starts another in its place."""
        among = next((those for those in (self._members, self._aside) if member in those), None)
        if among is None:  # several calls to it fail at once; or it was draining
            return
        among.remove(member)
        self._num_lost += 1
        ray.kill(member.handle)
        log.warning("%s was lost and is replaced: %s", member.name, cause_of(error))
        self._fill_up()

    async def _choose(self) -> _Member:
        """The actor with the fewest calls, waiting for one to join.

        Raises PartLostError when none will, LearnerLostError when none can before the learner publishes again.
        """
        async with self._changed:
            while not self._members:  # one that joined may be lost again before its turn
                if self._learner_lost or not (self._starting or self._aside):
                    raise self._learner_lost or self._failure or PartLostError("no rollout actor is left")
                await with_deadline(
                    self._config.start_timeout_s, self._changed.wait(), "a rollout actor to join"
                )
            return min(self._members, key=lambda m: m.calls)

    @contextmanager
    def _calling(self, member: _Member) -> Iterator[float]:
        """Yields the seconds within which an answer is to come."""
        num_loads = member.num_loads
        try:
            with member.called() as num_calls:
                yield num_calls * self._config.request_timeout_s
        except WeightsLostError:
            if member.num_loads == num_loads:  # else it holds a whole version again
                self._set_aside(member)
            raise
        except LOST as error:
            self._lose(member, error)
            raise

    async def rollout(
        self, prompts: Sequence[Prompt]
    ) -> AsyncIterator[tuple[ray.ObjectRef, list[RolloutResult]]]:
        """RolloutActor.rollout's results as they come, each with its reference, which the teacher can fetch past the driver.

        What a lost actor had not handed on is sampled by another. Raises PartLostError after max_retries such losses in a row.
        """
        left = {p.prompt_id: p for p in prompts}
        failures = 0
        while left:
            try:
                async for reference, results in self._stream(list(left.values())):
                    for result in results:
                        del left[
                            result.prompt_id if isinstance(result, FailedPrompt) else result.prompt.prompt_id
                        ]
                    failures = 0
                    yield reference, results
            except WeightsLostError:  # of an actor that was set aside
                continue
            except LOST as error:
                failures += 1
                if failures > self._config.max_retries:
                    raise PartLostError(
                        f"a rollout was lost {failures} times in a row: {cause_of(error)}"
                    ) from error

    async def _stream(
        self, prompts: Sequence[Prompt]
    ) -> AsyncIterator[tuple[ray.ObjectRef, list[RolloutResult]]]:
        member = await self._choose()
        with self._calling(member) as timeout_s:
            references = member.handle.rollout.options(num_returns="streaming").remote(prompts)
            while item := await with_deadline(timeout_s, _next(references), f"a rollout of {member.name}"):
                timeout_s = self._config.request_timeout_s  # it is this call's turn
                yield item

    async def predict(
        self, prompts: Sequence[Prompt], blank_video: bool = False
    ) -> list[Prediction | FailedPrompt]:
        """The student's greedy answers, the work spread over the actors; see RolloutActor.predict."""
        size = self._config.rollout.prompts_per_call
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        answers: list[list[Prediction | FailedPrompt]] = [[] for _ in chunks]
        waiting_chunks = iter(enumerate(chunks))

        async def ask(chunk: Sequence[Prompt]) -> list[Prediction | FailedPrompt]:
            member = await self._choose()
            with self._calling(member) as timeout_s:
                call = member.handle.predict.remote(chunk, blank_video)
                return await with_deadline(timeout_s, call, f"the student's predictions, by {member.name}")

        async def work() -> None:  # as many calls as actors
            for i, chunk in waiting_chunks:
                answers[i] = await retried(
                    partial(ask, chunk), self._config.max_retries, "the student's predictions"
                )

        await asyncio.gather(*(work() for _ in range(max(1, len(self._members)))))
        return [answer for chunk in answers for answer in chunk]

    async def load_weights(
        self,
        policy_version: int,
        buckets: list[ray.ObjectRef],
        num_bytes: int,
        source: WeightSource | None = None,
    ) -> WeightUpdate:
        """Every actor takes the version, after the rollouts it already has. Raises ObjectLostError when the weights are gone.

        `source`: who can put them into the object store again, for actors that join.
        """
        started = time.monotonic()
        async with self._loading:
            self._weights, self._source, self._learner_lost = (policy_version, buckets), source, None
            await self._load_into([*self._members, *self._aside], policy_version, buckets)
        await self._notify()
        return WeightUpdate(
            policy_version=policy_version, num_bytes=num_bytes, duration_s=time.monotonic() - started
        )

    async def receive_weights(self, policy_version: int, source: WeightSource) -> WeightUpdate:
        """The same, by a broadcast from the learner. Raises LearnerLostError, or ObjectLostError.

        Actors that the broadcast left without a whole version, those set aside before, and those that join later take it
        from the object store: a group of fixed members is of no use to them.
        """
        started = time.monotonic()
        async with self._loading:
            members = list(self._members)
            self._weights, self._source, self._learner_lost = (policy_version, None), source, None
            num_bytes = await self._broadcast_to(members, policy_version, source) if members else 0
            if self._aside or not members:
                buckets, num_bytes = await source.put_weights(policy_version)
                self._weights = (policy_version, buckets)
                await self._load_into(list(self._aside), policy_version, buckets)
        await self._notify()
        return WeightUpdate(
            policy_version=policy_version, num_bytes=num_bytes, duration_s=time.monotonic() - started
        )

    async def _broadcast_to(
        self, members: Sequence[_Member], policy_version: int, source: WeightSource
    ) -> int:
        """Bytes sent. Who did not take the version whole is lost, or set aside."""
        with ExitStack() as calls:
            for member in members:
                calls.enter_context(member.called())
            outcome = await self._broadcast(source, policy_version, {m.name: m.handle for m in members})
        for member in members:
            error = outcome.lost.get(member.name)
            if error is None:
                member.num_loads += 1
            elif isinstance(error, LOST):
                self._lose(member, error)
            elif isinstance(error, WeightsLostError):
                self._set_aside(member)
            else:
                raise error
        if outcome.source_error is not None and not isinstance(outcome.source_error, WeightsLostError):
            raise outcome.source_error
        if outcome.lost:
            error = min(
                outcome.lost.values(), key=lambda e: not isinstance(e, LOST)
            )  # a death says more than what it broke off
            cause = cause_of(getattr(error, "cause", None) or error)
            log.warning(
                "the broadcast of weights %d broke off, the object store brings them: %s",
                policy_version,
                cause,
            )
        return outcome.num_bytes

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last lap: seconds that an actor had nothing to do, on average, and the share in which it had."""
        now = time.monotonic()
        wall_s, self._lap_since_s = now - self._lap_since_s, now
        busy = []
        for member in self._members:
            member.advance()
            busy.append(min(member.busy_s, wall_s))
            member.busy_s = 0.0
        if not busy:
            return self.counts()
        busy_s = sum(busy) / len(busy)
        return self.counts() | {"actors/wait_s": wall_s - busy_s, "actors/utilisation": busy_s / wall_s}

    def counts(self) -> dict[str, float]:
        """How many there are, are wanted, and were lost since the start."""
        return {
            "actors/running": len(self._members),
            "actors/wanted": self._wanted,
            "actors/lost": self._num_lost,
        }

    def stop(self) -> None:
        """Ends the actors, and what the pool does by itself."""
        for task in self._tasks:
            task.cancel()
        for member in [*self._members, *self._aside]:
            ray.kill(member.handle)


async def _next(references: Any) -> tuple[ray.ObjectRef, list[RolloutResult]] | None:
    """The next result of a streaming call, after its reference; None at the end."""
    reference = await anext(references, None)
    return None if reference is None else (reference, await reference)
