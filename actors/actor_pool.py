"""The rollout actors of a run, on the driver's side: calls, publications of weights, scaling."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import ObjectLostError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.members import Member, Members
from actors.rollout_actor import Answers, RolloutActor, RolloutResult
from video_opd.cluster.deadline import with_deadline
from video_opd.cluster.faults import LOST, cause_of, retried
from video_opd.cluster.placement import bundles_of
from video_opd.config import Config
from video_opd.errors import LearnerLostError, PartLostError, WeightsLostError
from video_opd.logs import log
from video_opd.passes import CALLS_AN_ENGINE, Arrived, ask_by_video
from video_opd.types import FailedPrompt, Prompt, WeightUpdate

ABANDON = "abandon_weight_update"

T = TypeVar("T")
Streamed = tuple[ray.ObjectRef, list[RolloutResult]]


class WeightPublisher(Protocol):
    """What publications call of learner.learner.Learner. Raises LearnerLostError, WeightsLostError."""

    def holds(self, policy_version: int) -> bool: ...
    async def put_weights(self, policy_version: int) -> tuple[list[ray.ObjectRef], int]: ...
    async def send_weights(self, policy_version: int, actors: list[Any], timeout_s: float) -> int: ...


@dataclass
class Published:
    """The version that the members hold, and where one that joins gets it."""

    policy_version: int
    publisher: WeightPublisher
    buckets: list[ray.ObjectRef] | None  # None: the learner sends it; empty: not in the object store now


class ActorPool:
    """Sends each call to the actor with the fewest; replaces one that dies or misses a deadline."""

    def __init__(self, name: str, config: Config, actor_class: type = RolloutActor):
        self._name, self._config, self._actor_class = name, config, actor_class
        self._numbers = itertools.count()
        self._members = Members(config, self._create, self._load_current)
        self._published: Published | None = None
        self._in_store = config.weight_transfer == "object_store"
        self._may_give_up = config.learner.weight_transfer == "auto"  # until GPUs have sent weights once
        self._publishing = asyncio.Lock()  # nobody joins during a publication
        self._metrics_since_s = time.monotonic()
        self._created = [self._create() for _ in range(config.rollout.num_actors)]  # start in the background

    def _create(self) -> Member:
        name, rollout = f"actor-{next(self._numbers)}", self._config.rollout
        where: dict[str, Any] = {"num_cpus": rollout.num_cpus, "num_gpus": rollout.num_gpus}
        group = None
        if rollout.tensor_parallel > 1:
            group = placement_group(bundles_of(rollout, "rollout"), strategy="STRICT_PACK")
            strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
            where |= {"num_gpus": 0, "scheduling_strategy": strategy}
        options = ray.remote(self._actor_class).options(
            name=f"{self._name}/{name}",
            resources={"rollout": 1},
            max_restarts=0,  # a silent restart would sample from old weights
            runtime_env={"env_vars": self._config.worker_env},
            **where,
        )
        return Member(name, options.remote(name, self._config), group)

    @property
    def num_wanted(self) -> int:
        return self._members.num_wanted

    @property
    def published_buckets(self) -> tuple[ray.ObjectRef, ...]:
        """Of the published version; empty: it is not in the object store."""
        return tuple(self._published.buckets or ()) if self._published else ()

    async def start(self) -> None:
        """Returns when every engine is up."""
        await self._members.start(self._created)

    async def scale(self, num_actors: int) -> None:
        """Changes the number of actors; returns at once. Surplus actors finish their calls first."""
        if self._config.loss.needs.rollouts and num_actors > (most := self._config.most_actors):
            log.warning("rollout.prompts_per_call leaves work for %d of %d actors alone", most, num_actors)
        self._members.scale(num_actors)

    def stop(self) -> None:
        self._members.stop()

    async def rollout(
        self, prompts: Sequence[Prompt], for_selection: bool = False
    ) -> AsyncIterator[Streamed]:
        """RolloutActor.rollout's results as they come, each with its reference, which the teacher can fetch.

        Another actor samples what a lost one did not return. Raises PartLostError: max_retries exceeded.
        """
        left = {p.prompt_id: p for p in prompts}
        failures = 0
        while left:
            try:
                async for reference, results in self._stream(list(left.values()), for_selection):
                    for r in results:
                        del left[r.prompt_id if isinstance(r, FailedPrompt) else r.prompt.prompt_id]
                    failures = 0
                    yield reference, results
            except WeightsLostError:  # the actor is set aside now
                continue
            except LOST as error:
                failures += 1
                if failures > self._config.max_retries:
                    lost = f"a rollout was lost {failures} times in a row"
                    raise PartLostError(f"{lost}: {cause_of(error)}") from error

    async def _stream(self, prompts: Sequence[Prompt], for_selection: bool) -> AsyncIterator[Streamed]:
        member = await self._members.choose()
        with self._calling(member):
            call = member.handle.rollout.options(num_returns="streaming").remote(prompts, for_selection)
            with _cancelled_unless_ended(call):
                while item := await self._in_time(member, _next(call), f"a rollout of {member.name}"):
                    yield item

    async def predict(
        self,
        prompts: Sequence[Prompt],
        num_answers: int = 1,
        temperature: float = 0.0,
        blank_video: bool = False,
        arrived: Arrived | None = None,
    ) -> Answers:
        """The student's answers, by all actors; see RolloutActor.predict and passes.ask_by_video."""
        what = "the student's predictions"

        async def ask(chunk: Sequence[Prompt]) -> Answers:
            member = await self._members.choose()
            with self._calling(member):
                call = member.handle.predict.remote(chunk, num_answers, temperature, blank_video)
                with _cancelled_unless_ended(call):
                    return await self._in_time(member, call, f"{what}, by {member.name}")

        async def answers(chunk: Sequence[Prompt]) -> Answers:
            return await retried(partial(ask, chunk), self._config.max_retries, what)

        async def at_once() -> int:
            return CALLS_AN_ENGINE * len(self._members.ready)

        return await ask_by_video(prompts, self._config.rollout.prompts_per_call, answers, at_once, arrived)

    async def _in_time(self, member: Member, answer: Awaitable[T], what: str) -> T:
        """The member's next answer. It is due when all its calls could have been served one after another."""
        return await with_deadline(member.calls * self._config.request_timeout_s, answer, what)

    @contextmanager
    def _calling(self, member: Member) -> Iterator[None]:
        """Sets aside or replaces a member that does not answer."""
        num_answers = member.num_answers
        try:
            with member.called():
                yield
        except WeightsLostError:
            if member in self._members.ready and member.num_answers == num_answers:  # no load since
                self._members.set_aside(member)
            raise
        except LOST as error:
            self._members.lose(member, error)
            raise

    async def publish(self, policy_version: int, publisher: WeightPublisher) -> WeightUpdate:
        """Every actor takes the learner's weights, after the rollouts that it already has.

        Raises LearnerLostError, or ObjectLostError when the weights are gone.
        """
        async with self._publishing:
            # lets go of the version before first: the object store has room for one
            published = self._published = Published(policy_version, publisher, [] if self._in_store else None)
            started = time.monotonic()
            num_bytes = None if self._in_store else await self._try_to_send(published)
            if num_bytes is None:
                published.buckets, num_bytes = await publisher.put_weights(policy_version)
                self._members.learner_lost = None
                started = time.monotonic()
                load = ("load_weights", policy_version, published.buckets)
                await asyncio.gather(*(self._ask_or_lose(m, *load) for m in self._members.alive))
            for member in self._members.aside.copy():
                self._members.add(member)
        duration_s = time.monotonic() - started
        return WeightUpdate(policy_version=policy_version, num_bytes=num_bytes, duration_s=duration_s)

    async def _load_current(self, member: Member) -> None:
        """Admits an actor with the weights that the others hold; sets it aside if they are gone."""
        async with self._publishing:
            try:
                is_current = self._published is None or await self._load_published(member, self._published)
            except LearnerLostError as error:
                is_current, self._members.learner_lost = False, error
            if is_current:
                self._members.add(member)
            else:  # the learner was lost or is about to change them: it will publish again
                self._members.set_aside(member)

    async def _load_published(self, member: Member, published: Published) -> bool:
        """Returns False where neither the object store nor the learner holds the version any more."""
        version, publisher = published.policy_version, published.publisher
        if published.buckets:
            with suppress(ObjectLostError):  # with the node that held it
                await self._ask(member, "load_weights", version, published.buckets)
                return True
        if not publisher.holds(version):
            return False
        if published.buckets is not None:
            published.buckets = []  # as in `publish`
            published.buckets, _ = await publisher.put_weights(version)
            await self._ask(member, "load_weights", version, published.buckets)
            return True
        try:
            await self._send([member], published)
        except WeightsLostError:
            await self._ask(member, ABANDON)  # raises the actor's own loss, if that is why
            raise
        return True

    async def _try_to_send(self, published: Published) -> int | None:
        """_send_to_all. None: the way that `auto` chose fails at once; the object store takes its place."""
        try:
            return await self._send_to_all(published)
        except (WeightsLostError, LearnerLostError, *LOST) as error:
            if not self._may_give_up:
                raise
            self._in_store, published.buckets = True, []
            way = f"learner.weight_transfer=auto chose {self._config.weight_transfer}, which fails"
            log.warning("%s; weights go through the object store from now on: %s", way, cause_of(error))
            if isinstance(error, LearnerLostError):  # it is restarted, and will publish again
                raise
            return None

    async def _send_to_all(self, published: Published) -> int:
        """One transfer to all actors; if it fails, another without those that were lost. Returns bytes."""
        self._members.learner_lost = None
        for member in self._members.ready.copy():
            self._members.set_aside(member)
        while True:
            members = self._members.aside.copy()
            try:
                num_bytes = await self._send(members, published)
                self._may_give_up &= not members
                return num_bytes
            except (WeightsLostError, LearnerLostError, *LOST) as error:
                await asyncio.gather(*(self._ask_or_lose(member, ABANDON) for member in members))
                is_over = isinstance(error, LearnerLostError) or members == self._members.aside
                if is_over or self._may_give_up:
                    raise
                log.warning("sending weights %d failed: %s", published.policy_version, cause_of(error))

    async def _send(self, members: list[Member], published: Published) -> int:
        """The learner sends to the actors as one group; each then takes the version's number."""
        version, timeout_s = published.policy_version, self._config.request_timeout_s
        timeout_s *= 1 + max((m.calls for m in members), default=0)  # they end their rollouts first
        handles = [m.handle for m in members]
        num_bytes = await published.publisher.send_weights(version, handles, timeout_s)
        for member in members:
            await self._ask(member, "update_weight_version", str(version))
        return num_bytes

    async def _ask_or_lose(self, member: Member, method: str, *arguments: Any) -> None:
        """Ends an actor that does not answer; its successor loads the weights when it joins."""
        try:
            await self._ask(member, method, *arguments)
        except ObjectLostError:  # the learner's loss, not the actor's
            raise
        except LOST as error:
            self._members.lose(member, error)

    async def _ask(self, member: Member, method: str, *arguments: Any) -> None:
        """Waits for one call, which may wait for the rollouts under way."""
        call = getattr(member.handle, method).remote(*arguments)
        with member.called():
            await self._in_time(member, call, f"{method} of {member.name}")
        member.num_answers += 1

    def take_metrics(self) -> dict[str, float]:
        """Since the last call: seconds that an actor was idle and the share of busy time, both on average."""
        now = time.monotonic()
        wall_s, self._metrics_since_s = now - self._metrics_since_s, now
        busy = []
        for member in self._members.ready:
            member.advance()
            busy.append(min(member.busy_s, wall_s))
            member.busy_s = 0.0
        if not busy:
            return self.counts()
        busy_s = sum(busy) / len(busy)
        return self.counts() | {"actors/wait_s": wall_s - busy_s, "actors/utilisation": busy_s / wall_s}

    def counts(self) -> dict[str, float]:
        """How many actors are ready, are wanted, and were lost since the start."""
        return {
            "actors/running": len(self._members.ready),
            "actors/wanted": self._members.num_wanted,
            "actors/lost": self._members.num_lost,
        }


@contextmanager
def _cancelled_unless_ended(call: Any) -> Iterator[None]:
    """Ends the actor's work for a call whose caller stops early."""
    try:
        yield
    except BaseException:
        ray.cancel(call)
        raise


async def _next(references: Any) -> Streamed | None:
    """The next result of a streaming call, after its reference; None at the end."""
    reference = await anext(references, None)
    return None if reference is None else (reference, await reference)
