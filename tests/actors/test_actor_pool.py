"""The pool with fake actors that die, hang and join at random: nothing is lost, no weights are old."""

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ObjectLostError

import actors.actor_pool as actor_pool
import actors.members as members
from actors.actor_pool import ActorPool
from tests.fakes import make_prompt
from video_opd.cluster.deadline import waits
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.errors import LearnerLostError, PartLostError
from video_opd.types import FailedPrompt, Prediction, Prompt

DEADLINE_S = 0.03


def make_config(num_actors: int, max_retries: int = 1000) -> Config:
    return load_config(
        "configs/demo.yaml",
        [
            *(
                f"rollout.num_actors={num_actors}",
                f"max_retries={max_retries}",
                f"request_timeout_s={DEADLINE_S}",
            ),
            *("start_timeout_s=5", "video.decode_timeout_s=0.01", "rollout.prompts_per_call=3"),
        ],
    )


class Method:
    """`handle.method.remote(...)`: awaitable or, if streaming, an async iterator of awaitables."""

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def options(self, num_returns: str) -> "Method":
        assert num_returns == "streaming"
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class FakeActor:
    """Answers, dies or hangs as its random numbers say."""

    def __init__(self, name: str, rng: random.Random, faults: float):
        self.name, self._rng, self._faults = name, rng, faults
        self.version, self.killed = -1, False
        self.pid, self.load_weights = Method(self._pid), Method(self._load_weights)
        self.rollout, self.predict = Method(self._rollout), Method(self._predict)

    async def _act(self, can_fail: bool = True) -> None:
        await asyncio.sleep(self._rng.random() * 1e-3)
        if self.killed:
            raise ActorDiedError()
        if can_fail and self._rng.random() < self._faults:
            if self._rng.random() < 0.05:
                await asyncio.sleep(20 * DEADLINE_S)
            self.killed = True
            raise ActorDiedError()

    async def _pid(self) -> int:
        await self._act()
        return 1

    async def _load_weights(self, version: int, buckets: Sequence[Any]) -> float:
        await self._act()
        self.version = version
        return 0.0

    async def _predict(self, prompts: Sequence[Prompt], *_: Any) -> list[list[Prediction]]:
        await self._act()
        return [[Prediction(prompt_id=p.prompt_id, text=str(self.version), spans_s=())] for p in prompts]

    async def _rollout(self, prompts: Sequence[Prompt], for_selection: bool):
        async def value(prompt: Prompt, version: int) -> list[FailedPrompt]:
            return [
                FailedPrompt(prompt_id=prompt.prompt_id, reason=str(version))
            ]  # what the pool needs to know of a result

        for prompt in prompts:
            try:
                await self._act()
            except ActorDiedError as error:  # as Ray: the stream gives a reference, and that the error
                reference = asyncio.get_running_loop().create_future()
                reference.set_exception(error)
                yield reference
            yield asyncio.ensure_future(value(prompt, self.version))


class FakeLearner:
    """Publishes versions without tensors."""

    def __init__(self):
        self.is_dead = False

    def holds(self, policy_version: int) -> bool:
        return True

    async def put_weights(self, policy_version: int) -> tuple[list[Any], int]:
        if self.is_dead:
            raise LearnerLostError(f"version {policy_version} is gone")
        return [], 0

    async def send_weights(self, policy_version: int, actors: list[Any], timeout_s: float) -> int:
        raise AssertionError("the object store brings them")


class FakePool(ActorPool):
    """With FakeActors."""

    def __init__(self, config: Config, rng: random.Random, faults: float):
        self.rng, self.faults, self.made = rng, faults, []
        super().__init__("video_opd/test", config)

    def _create(self) -> Any:
        name = f"actor-{next(self._numbers)}"
        self.made.append(FakeActor(name, self.rng, self.faults))
        return members.Member(name, self.made[-1])


@pytest.fixture(autouse=True)
def cancelled(monkeypatch) -> list[Any]:
    """The calls that were told to end."""
    calls: list[Any] = []
    monkeypatch.setattr(actor_pool.ray, "cancel", calls.append)
    return calls


@pytest.fixture(autouse=True)
def killed(monkeypatch) -> list[FakeActor]:
    dead: list[FakeActor] = []

    def kill(handle: FakeActor) -> None:
        handle.killed = True
        dead.append(handle)

    monkeypatch.setattr(members.ray, "kill", kill)
    return dead


@pytest.mark.parametrize(("num_gpus", "shards"), [(0.5, 1), (1, 2), (0, 2)])
def test_an_actor_in_shards_has_their_bundles_and_gives_them_back(monkeypatch, num_gpus, shards, killed):
    seen: dict[str, Any] = {}
    groups: list[Any] = []

    class Remote:
        def options(self, **options: Any) -> Any:
            seen.update(options)
            return SimpleNamespace(remote=lambda *_: FakeActor("a", random.Random(0), 0.0))

    def group(bundles: list[dict[str, float]], strategy: str) -> str:
        groups.append((bundles, strategy))
        return "a group"

    monkeypatch.setattr(actor_pool.ray, "remote", lambda _: Remote())
    monkeypatch.setattr(actor_pool, "placement_group", group)
    monkeypatch.setattr(actor_pool, "PlacementGroupSchedulingStrategy", lambda group, *_, **__: group)
    monkeypatch.setattr(members, "remove_placement_group", groups.remove)
    config = make_config(1)
    rollout = config.rollout.model_copy(update={"num_gpus": num_gpus, "tensor_parallel": shards})
    pool = ActorPool("video_opd/test", config.model_copy(update={"rollout": rollout}))
    (member,) = pool._created
    if shards == 1:
        assert (seen["num_gpus"], member.places, groups) == (0.5, None, [])
        return
    shard = {"CPU": 0.5, "GPU": 1} if num_gpus else {"CPU": 0.5}
    assert groups == [([shard | {"rollout": 1}, shard], "STRICT_PACK")]
    assert seen["scheduling_strategy"] == member.places == "a group"
    assert (seen["num_gpus"], seen["num_cpus"]) == (0, 0.5), "vLLM's own actors take the GPUs"
    groups[:] = ["a group"]
    member.end()
    assert killed == [member.handle] and groups == []


async def started(pool: FakePool) -> FakePool:
    faults, pool.faults = pool.faults, 0.0
    for actor in pool.made:
        actor._faults = 0.0
    await pool.start()
    pool.faults = faults
    for actor in pool.made:
        actor._faults = faults
    return pool


async def sampled(pool: FakePool, prompts: Sequence[Prompt]) -> list[tuple[str, int]]:
    parts = [results async for _, results in pool.rollout(prompts)]
    return [(r.prompt_id, int(r.reason)) for results in parts for r in results if isinstance(r, FailedPrompt)]


@pytest.mark.engine
@given(seed=st.integers(0, 10_000), num_actors=st.integers(1, 3), faults=st.floats(0, 0.3))
def test_every_prompt_is_sampled_once_from_the_published_weights_whatever_dies(seed, num_actors, faults):
    async def run() -> None:
        rng = random.Random(seed)
        pool = await started(FakePool(make_config(num_actors), rng, faults))
        for version in range(4):
            await pool.publish(version, FakeLearner())
            calls = [[make_prompt(f"p{version}-{i}-{k}") for k in range(3)] for i in range(4)]
            answers = await asyncio.gather(*(sampled(pool, prompts) for prompts in calls))
            for prompts, answer in zip(calls, answers, strict=True):
                assert sorted(answer) == sorted((p.prompt_id, version) for p in prompts)
            predictions = await pool.predict([p for prompts in calls for p in prompts])
            assert [(a.prompt_id, a.text) for p in predictions if isinstance(p, list) for a in p] == [
                (p.prompt_id, str(version)) for prompts in calls for p in prompts
            ]
        counts = pool.take_metrics()
        assert counts["actors/wanted"] == num_actors and counts["actors/lost"] <= len(pool.made)
        pool.stop()

    asyncio.run(run())


def test_predictions_keep_two_calls_at_each_actor_and_a_video_in_one():
    config = make_config(2).model_copy(update={"request_timeout_s": 60.0})
    calls: list[list[str]] = []
    held = asyncio.Event()

    async def predict(prompts: Sequence[Prompt], *asked: Any) -> list[list[Prediction]]:
        assert asked == (4, 1.0, False)
        calls.append([p.clip.clip_id for p in prompts])
        await held.wait()
        return [[Prediction(prompt_id=p.prompt_id, text="", spans_s=())] for p in prompts]

    async def run() -> None:
        pool = await started(FakePool(config, random.Random(0), 0.0))
        for actor in pool.made:
            actor.predict = Method(predict)
        prompts = [make_prompt(f"p{i}", clip_id=f"v{i % 6}") for i in range(12)]
        arrived: list[str] = []
        asked = asyncio.ensure_future(
            pool.predict(prompts, 4, 1.0, arrived=lambda of, _: arrived.extend(p.prompt_id for p in of))
        )
        while len(calls) < 4:
            await asyncio.sleep(0.001)
        assert [m.calls for m in pool._members.ready] == [2, 2] and not arrived
        held.set()
        answers = [a for (a,) in cast(Any, await asked)]
        assert [a.prompt_id for a in answers] == [p.prompt_id for p in prompts] != arrived
        assert sorted(arrived) == sorted(p.prompt_id for p in prompts)
        pool.stop()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert calls == [[f"v{i}"] * 2 for i in range(6)], "3 prompts fit in a call, and two videos do not"


def test_a_joining_actor_has_the_weights_before_it_is_called():
    async def run() -> None:
        pool = await started(FakePool(make_config(1), random.Random(0), 0.0))
        await pool.publish(7, FakeLearner())
        await pool.scale(3)
        while pool.counts()["actors/running"] < 3:
            await asyncio.sleep(0.01)
        assert [a.version for a in pool.made] == [7, 7, 7]

    asyncio.run(run())


def test_more_actors_than_have_work_are_warned_of(caplog):
    """128 prompts in flight, 3 in a call."""

    async def run() -> None:
        pool = await started(FakePool(make_config(1), random.Random(0), 0.0))
        await pool.scale(43)
        assert not caplog.messages
        await pool.scale(44)
        pool.stop()

    asyncio.run(run())
    assert caplog.messages == ["rollout.prompts_per_call leaves work for 43 of 44 actors alone"]


def test_an_actor_that_goes_ends_its_calls_first(killed):
    config = make_config(2).model_copy(update={"request_timeout_s": 60.0})

    async def run() -> None:
        pool = await started(FakePool(config, random.Random(0), 0.0))
        first = [
            asyncio.ensure_future(sampled(pool, [make_prompt(f"p{i}{k}") for k in range(3)]))
            for i in range(2)
        ]
        await asyncio.sleep(0)
        await pool.scale(1)
        assert pool.counts() == {"actors/running": 1, "actors/wanted": 1, "actors/lost": 0}
        assert all(len(answer) == 3 for answer in await asyncio.gather(*first))
        while not killed:
            await asyncio.sleep(0.01)
        assert len(await sampled(pool, [make_prompt("after")])) == 1
        assert len(killed) == 1

    asyncio.run(run())


def test_an_actor_that_goes_during_a_publication_ends_its_calls_first(killed, monkeypatch):
    async def run() -> None:
        config = make_config(2).model_copy(update={"request_timeout_s": 60.0})
        pool = await started(FakePool(config, random.Random(0), 0.0))
        end = asyncio.Event()

        async def load_weights(actor: FakeActor, version: int, buckets: Sequence[Any]) -> float:
            await pool.scale(1)
            actor.version = version
            return 0.0

        async def act(actor: FakeActor, can_fail: bool = True) -> None:
            await end.wait()

        for actor in pool.made:
            actor.load_weights = Method(partial(load_weights, actor))
        monkeypatch.setattr(FakeActor, "_act", act)
        answers = [asyncio.ensure_future(sampled(pool, [make_prompt(f"p{i}")])) for i in range(2)]
        await asyncio.sleep(0)
        await pool.publish(1, FakeLearner())
        assert pool.counts()["actors/running"] == 1 and not killed
        end.set()
        assert [len(a) for a in await asyncio.gather(*answers)] == [1, 1]
        while not killed:
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_an_actor_that_cannot_take_the_weights_is_said_and_tried_again(monkeypatch, caplog):
    """What vLLM raises is no death: the task that starts the actor must not end silently."""

    async def run() -> None:
        pool = await started(FakePool(make_config(1), random.Random(0), 0.0))
        await pool.publish(7, FakeLearner())
        failures = [RuntimeError("no memory left")]
        load = FakeActor._load_weights

        async def load_weights(actor: FakeActor, version: int, buckets: Sequence[Any]) -> float:
            if failures:
                raise failures.pop()
            return await load(actor, version, buckets)

        monkeypatch.setattr(FakeActor, "_load_weights", load_weights)
        await pool.scale(2)
        while pool.counts()["actors/running"] < 2:
            await asyncio.sleep(0.01)
        assert [a.version for a in pool.made] == [7, -1, 7]
        pool.stop()

    monkeypatch.setattr(members, "RETRY_START_S", 0.05)
    asyncio.run(asyncio.wait_for(run(), 200))
    assert (
        "the start of a rollout actor failed: no memory left; continuing with 1 rollout actors" in caplog.text
    )


@pytest.mark.parametrize("what", ["rollout", "predict"])
def test_an_actor_hears_of_a_caller_that_stops_and_of_no_other(what, cancelled, monkeypatch):
    async def run() -> None:
        pool = await started(FakePool(make_config(1), random.Random(0), 0.0))
        assert await sampled(pool, [make_prompt("p")]) and await pool.predict([make_prompt("p")])
        assert not cancelled
        asked = asyncio.Event()

        async def act(actor: FakeActor, can_fail: bool = True) -> None:
            asked.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(FakeActor, "_act", act)
        calls = {"rollout": sampled, "predict": FakePool.predict}
        stopping = asyncio.ensure_future(calls[what](pool, [make_prompt("q")]))
        await asked.wait()
        stopping.cancel()
        await asyncio.wait([stopping])
        assert len(cancelled) == 1 and pool.counts()["actors/lost"] == 0
        assert pool._members.ready[0].calls == 0

    asyncio.run(asyncio.wait_for(run(), 200))


@pytest.mark.engine
def test_a_deadline_covers_the_calls_before_it(killed, monkeypatch):
    """Calls share an actor's engine: three that together outlast a deadline lose nobody."""

    async def run() -> None:
        config = make_config(1).model_copy(update={"request_timeout_s": 4.0})
        pool = await started(FakePool(config, random.Random(0), 0.0))
        turn = asyncio.Lock()

        async def act(actor: FakeActor, can_fail: bool = True) -> None:
            async with turn:
                await asyncio.sleep(1.5)

        monkeypatch.setattr(FakeActor, "_act", act)
        answers = await asyncio.gather(*(sampled(pool, [make_prompt(f"p{i}")]) for i in range(3)))
        assert [len(a) for a in answers] == [1, 1, 1] and not killed

    asyncio.run(run())


def test_retries_that_are_used_up_end_with_the_cause():
    async def run() -> None:
        pool = await started(FakePool(make_config(2, max_retries=2), random.Random(0), 1.0))
        with pytest.raises(PartLostError, match=r"was lost|no rollout actor is left"):
            await sampled(pool, [make_prompt("p")])
        pool.stop()

    asyncio.run(run())
    assert not waits()


def test_a_learner_that_died_unseen_is_noticed_by_those_who_wait_for_an_actor(monkeypatch):
    """While it waits for trajectories, only an actor that joins asks it for anything."""

    load = FakeActor._load_weights

    async def gone(*_: Any) -> float:
        raise ObjectLostError("00" * 28, b"", "")

    async def run() -> None:
        pool = await started(FakePool(make_config(1), random.Random(0), 0.0))
        learner = FakeLearner()
        await pool.publish(1, learner)
        learner.is_dead = True
        monkeypatch.setattr(FakeActor, "_load_weights", gone)
        pool.made[0].killed = True
        with pytest.raises(LearnerLostError, match="version 1 is gone"):
            await asyncio.wait_for(sampled(pool, [make_prompt("p")]), 60)
        pool.made[1].load_weights = Method(partial(load, pool.made[1]))
        await pool.publish(1, FakeLearner())  # as recover does
        assert await sampled(pool, [make_prompt("p")]) == [("p", 1)]

    asyncio.run(run())


def test_weights_that_went_with_the_learner_are_its_loss_and_no_actors():
    async def run() -> None:
        pool = await started(FakePool(make_config(2), random.Random(0), 0.0))

        async def gone(*_: Any) -> float:
            raise ObjectLostError("00" * 28, b"", "")

        for actor in pool.made:
            actor.load_weights = Method(gone)
        with pytest.raises(ObjectLostError):
            await pool.publish(1, FakeLearner())
        assert pool.counts()["actors/lost"] == 0

    asyncio.run(run())
