"""Publications by broadcast to a pool that changes: the pool, the conductor and gloo are real, actors and learner are threads."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError

import actors.weight_broadcast
from actors.actor_pool import ActorPool, _Member
from actors.weight_receiver import split, unpack
from learner.weight_sender import tensor_buckets, to_buckets, to_flat
from tests.fakes import make_group, make_prompt
from video_opd.broadcast import BroadcastGroup, in_order
from video_opd.config import Config
from video_opd.errors import LearnerLostError, WeightsLostError
from video_opd.types import TrajectoryGroup

SPLIT = {"annotations": "a.txt", "lengths": "l.csv", "videos": "v"}
BUCKET_BYTES = 1 << 14
TIMEOUT_S = 30.0
PATIENCE_S = 15.0


def weights(version: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"layer.{i}", torch.full((64, 64), float(100 * version + i))) for i in range(6)]


def config(num_actors: int, **changes) -> Config:
    tree = {
        "student": "s",
        "teacher": "t",
        "num_steps": 3,
        "data": {"train": SPLIT, "eval": SPLIT},
        "request_timeout_s": TIMEOUT_S,
    }
    tree |= {
        "video": {"decode_timeout_s": 0.5},
        "rollout": {"num_actors": num_actors, "num_gpus": 0},
        "max_retries": 0,
    }
    return Config.model_validate(
        tree | {"learner": {"num_gpus": 0, "weight_transfer": "collective"}} | changes
    )


class Served:
    """Calls in the order of arrival, one at a time, as a Ray actor serves them."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1)
        self.dead = threading.Event()

    def __getattr__(self, name: str):
        def remote(*arguments):
            if self.dead.is_set():
                future = asyncio.get_running_loop().create_future()
                future.set_exception(ActorDiedError())
                return future
            return asyncio.wrap_future(self._thread.submit(getattr(self, f"do_{name}"), *arguments))

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


class Actor(Served):
    """What a RolloutActor is to the pool. `fails`: in the middle of its next broadcast, and how."""

    def __init__(self, fails: str | None = None):
        super().__init__()
        self.fails, self.places = fails, []
        self.version: int | None = -1
        self.held: dict[str, torch.Tensor] = {}
        self.group: BroadcastGroup | None = None

    def do_pid(self) -> int:
        return 0

    def do_work(self, seconds: float) -> None:
        time.sleep(seconds)

    def do_load_weights(self, version: int, buckets) -> None:
        self.held = dict(unpack(buckets))
        self.version = version

    def do_receive_weights(self, version: int, place) -> None:
        self.version = None
        self.places.append(place)
        if place is not None:
            self.group = BroadcastGroup(place, TIMEOUT_S)
        assert self.group
        self.group.meet()
        held = {}
        for name, tensor in split(in_order(self.buckets(), version)):
            held[name] = tensor
            self.held |= held  # a mixture until the last has come
        self.version = version

    def buckets(self):
        assert self.group
        yield self.group.receive()
        fails, self.fails = self.fails, None
        if fails == "dies":
            self.dead.set()
            self.group.close()
            raise ActorDiedError()
        if fails == "hangs":
            self.dead.wait(60)
        yield from iter(self.group.receive, None)

    def do_rollout(self, prompts):
        if self.version is None:
            raise WeightsLostError("half a version")
        assert self.held == {} or is_whole(self), "sampled from a mixture"
        return [make_group(p.prompt_id, policy_version=self.version).group for p in prompts]


class Learner(Served):
    """What the learner is to a publication. `fails`: it dies in the middle of its next broadcast."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.generation, self.fails, self.version, self.num_puts = 1, fails, None, 0

    def restart(self) -> None:
        self.generation += 1
        self.dead.clear()

    async def _call(self, name: str, *arguments):
        try:
            return await asyncio.wait_for(getattr(self, name).remote(*arguments), PATIENCE_S)
        except ActorDiedError as error:
            raise LearnerLostError("dead") from error

    async def meet_actors(self, place) -> None:
        await self._call("meet", place)

    async def send_weights(self, policy_version: int) -> int:
        self.version = policy_version
        return await self._call("send", policy_version)

    async def put_weights(self, policy_version: int):
        self.version = policy_version
        return await self._call("put", policy_version)

    async def put_published_weights(self, policy_version: int):
        if self.version != policy_version:
            raise WeightsLostError("about to change")
        return (await self._call("put", policy_version))[0]

    def do_meet(self, place) -> None:
        if place is not None:
            self.group = BroadcastGroup(place, TIMEOUT_S)
        self.group.meet()

    def do_send(self, version: int) -> int:
        fails, self.fails = self.fails, False
        for header, tensors in tensor_buckets(weights(version), version, BUCKET_BYTES):
            self.group.send(header, to_flat(tensors))
            if fails:
                self.dead.set()
                self.group.close()
                raise ActorDiedError()
        return sum(t.nbytes for _, t in weights(version))

    def do_put(self, version: int):
        self.num_puts += 1
        return list(to_buckets([(n, t.clone()) for n, t in weights(version)], version, BUCKET_BYTES)), 1


class Pool(ActorPool):
    def __init__(self, config: Config, actors):
        self.actors = list(actors)
        self.created: list[Actor] = []
        super().__init__("pool", config)

    def _create(self) -> _Member:
        name = f"actor-{next(self._numbers)}"
        self.created.append(self.actors.pop(0) if self.actors else Actor())
        return _Member(name, self.created[-1])

    async def names(self, count: int) -> list[str]:
        """Of the members, once there are so many."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self._members) != count:
            assert time.monotonic() < deadline, self.counts()
            await asyncio.sleep(0.02)
        return sorted(m.name for m in self._members)

    def holds(self, version: int) -> bool:
        """Every actor that may be called has that version, whole."""
        handles = [m.handle for m in self._members]
        return all(h.version == version and is_whole(h) for h in handles)


def is_whole(actor: Actor) -> bool:
    assert actor.version is not None
    expected = dict(weights(actor.version))
    return actor.held.keys() == expected.keys() and all(
        torch.equal(actor.held[n], t) for n, t in expected.items()
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("ray.kill", lambda handle: handle.dead.set())
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr("actors.actor_pool._next", one_result)
    monkeypatch.setattr(actors.weight_broadcast, "ABANDON_S", 4.0)


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * PATIENCE_S))


def test_a_group_lasts_as_long_as_its_members_do():
    async def test():
        pool, learner = Pool(config(2), [Actor(), Actor()]), Learner()
        await pool.start()
        for version in (1, 2):
            update = await pool.receive_weights(version, learner)
            assert update.num_bytes == sum(t.nbytes for _, t in weights(version)) and pool.holds(version)
        assert [p and p.rank for p in pool.created[0].places] == [1, None]
        await pool.scale(3)
        assert await pool.names(3) == ["actor-0", "actor-1", "actor-2"]
        assert pool.holds(2), "who joins has the current version before it is called"
        assert learner.num_puts == 1
        await pool.receive_weights(3, learner)
        assert pool.holds(3) and learner.num_puts == 1
        assert [p and p.size for p in pool.created[0].places] == [3, None, 4]

    run(test)


@pytest.mark.parametrize("fails", ["dies", "hangs"])
def test_an_actor_lost_in_the_middle_is_replaced_and_the_others_get_the_version(fails):
    async def test():
        timeout_s = (
            30.0 if fails == "dies" else 8.0
        )  # torch looks up the name of who connects, which may take 5 s
        pool, learner = (
            Pool(config(3, request_timeout_s=timeout_s), [Actor(), Actor(fails), Actor()]),
            Learner(),
        )
        await pool.start()
        started = time.monotonic()
        await pool.receive_weights(1, learner)
        assert time.monotonic() - started < TIMEOUT_S
        assert pool.holds(1)
        assert await pool.names(3) == ["actor-0", "actor-2", "actor-3"]
        assert pool.holds(1) and pool.counts()["actors/lost"] == 1
        puts = learner.num_puts
        await pool.receive_weights(2, learner)
        assert pool.holds(2) and learner.num_puts == puts, "the next publication is a broadcast again"

    run(test)


def test_an_actor_that_has_rollouts_to_end_when_another_dies_is_not_lost(monkeypatch):
    monkeypatch.setattr(actors.weight_broadcast, "ABANDON_S", 1.5)

    async def test():
        pool, learner = Pool(config(2), [Actor(), Actor()]), Learner()
        await pool.start()
        busy, dies = pool.created
        rollouts = busy.work.remote(4.0)
        dies.dead.set()
        await pool.receive_weights(1, learner)
        assert rollouts.done() and not busy.dead.is_set()
        assert await pool.names(2) == ["actor-0", "actor-2"] and pool.holds(1)
        assert pool.counts()["actors/lost"] == 1

    run(test)


def test_when_the_learner_dies_in_the_middle_nobody_is_called_until_there_is_a_whole_version():
    async def test():
        pool, learner = Pool(config(2), [Actor(), Actor()]), Learner()
        await pool.start()
        await pool.receive_weights(1, learner)
        learner.fails = True
        with pytest.raises(LearnerLostError):
            await pool.receive_weights(2, learner)
        assert pool.counts()["actors/running"] == 0 and pool.counts()["actors/lost"] == 0
        sampling = asyncio.ensure_future(sampled(pool))
        await asyncio.sleep(0.3)
        assert not sampling.done(), "it waits; there is nothing to sample from"
        learner.restart()
        await pool.receive_weights(1, learner)
        assert await pool.names(2) == ["actor-0", "actor-1"] and pool.holds(1)
        assert await asyncio.wait_for(sampling, PATIENCE_S) == [1]

    run(test)


async def one_result(call):
    """The fake's rollout is one result rather than a stream."""
    if call.done():
        return None if getattr(call, "taken", False) else take(call)
    await asyncio.wait([call])
    return take(call)


def take(call):
    call.taken = True
    return call, call.result()


async def sampled(pool: Pool) -> list[int]:
    """The versions that one prompt was answered from."""
    groups = [
        g
        async for _, results in pool.rollout([make_prompt("p")])
        for g in results
        if isinstance(g, TrajectoryGroup)
    ]
    return [g.trajectories[0].policy_version for g in groups]


def test_rollouts_that_reach_an_actor_between_a_failure_and_its_mending_are_done_again():
    async def test():
        pool, learner = Pool(config(2), [Actor(), Actor("dies")]), Learner()
        await pool.start()
        publication = asyncio.ensure_future(pool.receive_weights(1, learner))
        await asyncio.sleep(0)
        sampling = [asyncio.ensure_future(sampled(pool)) for _ in range(4)]  # queued behind the broadcast
        await publication
        assert {v for s in sampling for v in await asyncio.wait_for(s, PATIENCE_S)} == {1}
        assert "actor-0" in await pool.names(2) and pool.holds(1)

    run(test)


def test_who_joins_while_the_weights_are_about_to_change_waits_for_the_next_publication():
    async def test():
        pool, learner = Pool(config(1), [Actor()]), Learner()
        await pool.start()
        await pool.receive_weights(1, learner)
        learner.version = None  # an update is under way
        await pool.scale(2)
        await asyncio.sleep(0.3)
        assert await pool.names(1) == ["actor-0"]
        await pool.receive_weights(2, learner)
        assert await pool.names(2) == ["actor-0", "actor-1"] and pool.holds(2)

    run(test)


def test_without_actors_a_publication_waits_in_the_store_for_those_to_come():
    async def test():
        pool, learner = Pool(config(1), [Actor("dies")]), Learner()
        await pool.start()
        await pool.receive_weights(1, learner)
        assert await pool.names(1) == ["actor-1"] and pool.holds(1)
        pool._members.clear()
        await pool.receive_weights(2, learner)
        pool._fill_up()
        assert await pool.names(1) == ["actor-2"] and pool.holds(2)

    run(test)
