"""Publications to a real pool that changes. Actors and learner are threads that hang as NCCL does."""

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError

from actors.actor_pool import ActorPool
from actors.members import Member
from tests.fakes import make_group, make_prompt
from video_opd.config import Config
from video_opd.errors import LearnerLostError, WeightsLostError
from video_opd.types import TrajectoryGroup
from video_opd.weights.buckets import check_whole, to_buckets, unpack

SPLIT = {"annotations": "a.txt", "lengths": "l.csv", "videos": "v"}
BUCKET_BYTES = 1 << 14
PATIENCE_S = 60.0
WAYS = ("collective", "object_store")


def weights(version: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"layer.{i}", torch.full((64, 64), float(100 * version + i))) for i in range(6)]


NUM_BYTES = sum(t.nbytes for _, t in weights(0))


def config(
    num_actors: int, way: str = "collective", timeout_s: float = PATIENCE_S, **learner: object
) -> Config:
    num_gpus = 0 if way == "object_store" else 1
    return Config.model_validate(
        {
            "student": "s",
            "teacher": "t",
            "num_steps": 3,
            "data": {"train": SPLIT, "eval": SPLIT},
            "request_timeout_s": timeout_s,
            "video": {"decode_timeout_s": 0.5},
            "rollout": {"num_actors": num_actors, "num_gpus": num_gpus},
            "max_retries": 0,
            "learner": {"num_gpus": num_gpus, "weight_transfer": way} | learner,
        }
    )


class Served:
    """Calls in the order of arrival, one at a time, as a Ray actor serves them."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1)
        self.dead = threading.Event()

    def call(self, name: str, *arguments) -> Future:
        if not self.dead.is_set():
            return self._thread.submit(getattr(self, f"do_{name}"), *arguments)
        failed: Future = Future()
        failed.set_exception(ActorDiedError())
        return failed

    def __getattr__(self, name: str):
        def remote(*arguments):
            return asyncio.wrap_future(self.call(name, *arguments))

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


class Group:
    """A collective: it ends when every member takes part, and hangs when one dies."""

    def __init__(self, size: int):
        self._lock, self._missing = threading.Lock(), size

    def meet(self, member: Served) -> None:
        with self._lock:
            self._missing -= 1
        while self._missing:
            if member.dead.wait(0.005):
                raise ActorDiedError()


class Actor(Served):
    """What a RolloutActor is to the pool. `fails`: in the middle of its next transfer, and how."""

    def __init__(self, fails: str | None = None):
        super().__init__()
        self.fails = fails
        self.version: int | None = -1
        self.held: dict[str, torch.Tensor] = {}

    def do_pid(self) -> int:
        return 0

    def do_abandon_weight_update(self) -> None:
        pass

    def do_wait(self, event: threading.Event) -> None:
        assert event.wait(PATIENCE_S)

    def do_load_weights(self, version: int, buckets) -> None:
        self.version = None
        check_whole(buckets, version)
        self.held = dict(unpack(buckets))
        self.version = version

    def do_start_weight_update(self) -> None:
        self.version = None

    def do_update_weights(self, group: Group, named: list[tuple[str, torch.Tensor]]) -> None:
        self.held |= dict(named[:3])  # a mixture until the rest has come
        if self.fails == "dies":
            self.dead.set()
            raise ActorDiedError()
        if self.fails == "hangs":
            self.dead.wait(PATIENCE_S)
        group.meet(self)
        self.held |= dict(named)

    def do_update_weight_version(self, version: str) -> None:
        self.version = int(version)

    def do_rollout(self, prompts, for_selection):
        if self.version is None:
            raise WeightsLostError("half a version")
        assert self.held == {} or is_whole(self), "sampled from a mixture"
        return [make_group(p.prompt_id, policy_version=self.version).group for p in prompts]


class Learner(Served):
    """What the learner is to a publication. `fails`: it dies in the middle of its next one."""

    def __init__(self):
        super().__init__()
        self.fails, self.version, self.sent = False, None, []
        self.refuses = False  # to send between GPUs

    def restart(self) -> None:
        self.dead.set()
        self._thread.shutdown()
        self._thread = ThreadPoolExecutor(1)
        self.fails = False
        self.dead.clear()

    def holds(self, policy_version: int) -> bool:
        return self.version == policy_version

    async def put_weights(self, policy_version: int):
        return await self._publish("put", policy_version, PATIENCE_S)

    async def send_weights(self, policy_version: int, actors, timeout_s: float) -> int:
        self.sent.append(len(actors))
        return await self._publish("send", policy_version, timeout_s, actors)

    async def _publish(self, name: str, policy_version: int, timeout_s: float, *arguments):
        self.version = policy_version
        call = asyncio.wrap_future(self.call(name, policy_version, *arguments))
        try:
            return await asyncio.wait_for(call, timeout_s)
        except (ActorDiedError, TimeoutError) as error:
            self.version = None
            raise LearnerLostError("dead") from error

    def do_send(self, version: int, actors: list[Actor]) -> int:
        if self.refuses:
            raise WeightsLostError("GPUs do not reach each other")
        try:
            for actor in actors:
                actor.call("start_weight_update").result(PATIENCE_S)
        except ActorDiedError as error:
            raise WeightsLostError("an actor is dead") from error
        group = Group(1 + len(actors))
        updates = [actor.call("update_weights", group, weights(version)) for actor in actors]
        if self.fails:
            raise ActorDiedError()
        group.meet(self)
        for update in updates:
            update.result(PATIENCE_S)
        return NUM_BYTES

    def do_put(self, version: int):
        if self.fails:
            raise ActorDiedError()
        return list(
            to_buckets([(n, t.clone()) for n, t in weights(version)], version, BUCKET_BYTES)
        ), NUM_BYTES


class Pool(ActorPool):
    def __init__(self, config: Config, *actors: Actor):
        self.actors = list(actors)
        self.created: list[Actor] = []
        super().__init__("pool", config)

    def _create(self) -> Member:
        self.created.append(self.actors.pop(0) if self.actors else Actor())
        return Member(f"actor-{next(self._numbers)}", self.created[-1])

    async def names(self, count: int) -> list[str]:
        """Of the actors that may be called, once there are so many."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self._members.ready) != count:
            assert time.monotonic() < deadline, self.counts()
            await asyncio.sleep(0.02)
        return sorted(m.name for m in self._members.ready)

    def holds(self, version: int) -> bool:
        """Every actor that may be called has that version, whole."""
        handles = [m.handle for m in self._members.ready]
        return all(h.version == version and is_whole(h) for h in handles)


def is_whole(actor: Actor) -> bool:
    assert actor.version is not None
    expected = dict(weights(actor.version))
    return actor.held.keys() == expected.keys() and all(
        torch.equal(actor.held[n], t) for n, t in expected.items()
    )


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr("ray.kill", lambda handle: handle.dead.set())
    monkeypatch.setattr("ray.cancel", lambda call: None)
    monkeypatch.setattr("actors.actor_pool._next", one_result)


async def one_result(call):
    """The fake's rollout is one result rather than a stream."""
    if getattr(call, "taken", False):
        return None
    call.taken = True
    return call, await call


async def sampled(pool: Pool) -> list[int]:
    """The versions that one prompt was answered from."""
    results = [r async for _, part in pool.rollout([make_prompt("p")]) for r in part]
    return [r.trajectories[0].policy_version for r in results if isinstance(r, TrajectoryGroup)]


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * PATIENCE_S))


@pytest.mark.parametrize("way", WAYS)
def test_every_actor_gets_every_version_and_one_that_joins_has_it_before_it_is_called(way):
    async def test():
        pool, learner = Pool(config(2, way)), Learner()
        await pool.start()
        for version in (1, 2):
            update = await pool.publish(version, learner)
            assert update.num_bytes == NUM_BYTES and pool.holds(version)
        await pool.scale(3)
        assert await pool.names(3) == ["actor-0", "actor-1", "actor-2"] and pool.holds(2)
        await pool.publish(3, learner)
        assert pool.holds(3)
        assert learner.sent == ([2, 2, 1, 3] if way == "collective" else [])

    run(test)


def test_adapters_go_by_the_object_store_whatever_would_carry_weights():
    async def test():
        pool, learner = Pool(config(2, "collective", lora_rank=4)), Learner()
        await pool.start()
        await pool.publish(1, learner)
        await pool.scale(3)
        assert await pool.names(3) and pool.holds(1) and learner.sent == []

    run(test)
    merged = config(1, "collective", lora_rank=4, lora_publish="merged").learner
    assert not merged.publishes_adapters and not config(1, "collective").learner.publishes_adapters


def test_what_auto_chose_and_fails_at_once_is_given_up_for_the_object_store(caplog):
    async def test():
        pool, learner = Pool(config(2, "auto")), Learner()
        learner.refuses = True
        await pool.start()
        for version in (1, 2):
            assert (await pool.publish(version, learner)).num_bytes == NUM_BYTES and pool.holds(version)
        await pool.scale(3)
        assert await pool.names(3) and pool.holds(2)
        assert learner.sent == [2] and pool.counts()["actors/lost"] == 0

    run(test)
    (said,) = [r.getMessage() for r in caplog.records if "auto" in r.getMessage()]
    assert "auto chose collective, which fails" in said and "GPUs do not reach each other" in said


@pytest.mark.parametrize("way", ["auto", "collective"])
def test_a_way_that_was_told_or_has_worked_is_not_given_up(way):
    async def test():
        pool, learner = Pool(config(2, way)), Learner()
        await pool.start()
        if way == "auto":
            await pool.publish(1, learner)
        learner.refuses = True
        with pytest.raises(WeightsLostError):
            await pool.publish(2, learner)

    run(test)


def test_when_the_learner_is_lost_in_the_first_transfer_it_publishes_in_the_object_store_afterwards():
    async def test():
        pool, learner = Pool(config(2, "auto")), Learner()
        await pool.start()
        learner.fails = True
        for actor in pool.created:  # nobody hangs in the collective when the learner is lost
            vars(actor)["do_update_weights"] = lambda *_: None
        with pytest.raises(LearnerLostError):
            await pool.publish(1, learner)
        learner.restart()
        await pool.publish(1, learner)
        assert pool.holds(1) and learner.sent == [2]

    run(test)


def test_an_actor_that_is_dead_is_replaced_and_the_others_get_the_version():
    async def test():
        pool, learner = Pool(config(3)), Learner()
        await pool.start()
        pool.created[1].dead.set()
        update = await pool.publish(1, learner)
        assert pool.holds(1) and update.num_bytes == NUM_BYTES
        assert await pool.names(3) == ["actor-0", "actor-2", "actor-3"]
        assert pool.holds(1) and pool.counts()["actors/lost"] == 1
        await pool.publish(2, learner)
        assert pool.holds(2) and learner.sent == [3, 2, 1, 3]

    run(test)


@pytest.mark.engine
@pytest.mark.parametrize("fails", ["dies", "hangs"])
def test_an_actor_lost_in_the_middle_takes_the_transfer_with_it_and_all_are_replaced(fails):
    """Nothing ends a collective: the learner and the other actors hang in it until their deadlines."""

    async def test():
        pool, learner = Pool(config(2, timeout_s=3.0), Actor(), Actor(fails)), Learner()
        await pool.start()
        with pytest.raises(LearnerLostError):
            await pool.publish(1, learner)
        assert pool.counts()["actors/running"] == 0 and pool.counts()["actors/lost"] == 2
        sampling = asyncio.ensure_future(sampled(pool))
        await asyncio.sleep(0.3)
        assert not sampling.done(), "it waits; there is nothing to sample from"
        learner.restart()
        await pool.publish(1, learner)
        assert await pool.names(2) == ["actor-2", "actor-3"] and pool.holds(1)
        assert await asyncio.wait_for(sampling, PATIENCE_S) == [1]

    run(test)


def test_an_actor_that_has_rollouts_to_end_when_another_dies_is_not_lost():
    async def test():
        pool, learner = Pool(config(2)), Learner()
        await pool.start()
        busy, dies = pool.created
        end = threading.Event()
        rollouts = busy.wait.remote(end)
        dies.dead.set()
        publication = asyncio.ensure_future(pool.publish(1, learner))
        await asyncio.sleep(0.1)
        assert not publication.done()
        end.set()
        await publication
        assert rollouts.done() and not busy.dead.is_set()
        assert await pool.names(2) == ["actor-0", "actor-2"] and pool.holds(1)
        assert pool.counts()["actors/lost"] == 1

    run(test)


@pytest.mark.engine
def test_when_the_learner_dies_in_the_middle_nobody_is_called_until_there_is_a_whole_version():
    async def test():
        pool, learner = Pool(config(2, timeout_s=3.0)), Learner()
        await pool.start()
        await pool.publish(1, learner)
        learner.fails = True
        with pytest.raises(LearnerLostError):
            await pool.publish(2, learner)
        assert pool.counts()["actors/running"] == 0, "they hang in the transfer"
        learner.restart()
        await pool.publish(1, learner)
        assert await pool.names(2) == ["actor-2", "actor-3"] and pool.holds(1)
        assert await sampled(pool) == [1]

    run(test)


def test_when_the_learner_dies_on_the_way_to_the_store_the_actors_keep_what_they_have():
    async def test():
        pool, learner = Pool(config(2, "object_store")), Learner()
        await pool.start()
        await pool.publish(1, learner)
        learner.fails = True
        with pytest.raises(LearnerLostError):
            await pool.publish(2, learner)
        assert await pool.names(2) == ["actor-0", "actor-1"] and pool.holds(1)
        learner.restart()
        await pool.publish(2, learner)
        assert pool.holds(2) and pool.counts()["actors/lost"] == 0

    run(test)


def test_rollouts_that_reach_an_actor_during_a_transfer_are_done_again():
    async def test():
        pool, learner = Pool(config(2)), Learner()
        await pool.start()
        begun, hold = pool.created[0], threading.Event()
        pool.created[1].do_start_weight_update = partial(pool.created[1].do_wait, hold)
        publication = asyncio.ensure_future(pool.publish(1, learner))
        while begun.version is not None:
            await asyncio.sleep(0.01)
        pool._members.ready.append(pool._members.aside.pop(0))
        with pytest.raises(WeightsLostError):  # as from a call that was sent before the actor was set aside
            await anext(pool._stream([make_prompt("p")], False))
        waiting = [asyncio.ensure_future(sampled(pool)) for _ in range(4)]
        await asyncio.sleep(0.1)
        assert not any(s.done() for s in waiting)
        hold.set()
        await publication
        assert {v for s in waiting for v in await asyncio.wait_for(s, PATIENCE_S)} == {1}
        assert await pool.names(2) == ["actor-0", "actor-1"] and pool.holds(1)

    run(test)


def test_who_joins_while_the_weights_are_about_to_change_waits_for_the_next_publication():
    async def test():
        pool, learner = Pool(config(1)), Learner()
        await pool.start()
        await pool.publish(1, learner)
        learner.version = None  # an update is under way
        await pool.scale(2)
        await asyncio.sleep(0.3)
        assert await pool.names(1) == ["actor-0"]
        await pool.publish(2, learner)
        assert await pool.names(2) == ["actor-0", "actor-1"] and pool.holds(2)

    run(test)


def test_the_store_is_empty_when_a_version_enters_and_who_joins_meanwhile_gets_that_version():
    async def test():
        pool, learner = Pool(config(1, "object_store")), Learner()
        await pool.start()
        await pool.publish(1, learner)
        put, entering, enter = learner.do_put, threading.Event(), threading.Event()

        def put_later(version: int):
            entering.set()
            assert enter.wait(PATIENCE_S)
            return put(version)

        learner.do_put = put_later
        publication = asyncio.ensure_future(pool.publish(2, learner))
        await asyncio.to_thread(entering.wait, PATIENCE_S)
        assert pool._published and pool._published.buckets == []
        await pool.scale(2)
        await asyncio.sleep(0.1)
        assert await pool.names(1) == ["actor-0"] and pool.created[1].version == -1
        enter.set()
        await publication
        assert await pool.names(2) == ["actor-0", "actor-1"] and pool.holds(2)

    run(test)


@pytest.mark.parametrize("way", WAYS)
def test_without_actors_a_publication_waits_for_those_to_come(way):
    async def test():
        pool, learner = Pool(config(1, way)), Learner()
        await pool.start()
        pool._members.ready.clear()
        await pool.publish(2, learner)
        pool._members.fill_up()
        assert await pool.names(1) == ["actor-1"] and pool.holds(2)

    run(test)
