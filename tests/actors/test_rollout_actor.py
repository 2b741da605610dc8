"""A rollout actor's calls overlap, with publications in between. Its engine checks what it is asked."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
import torch

import actors.engine
import actors.rollout_actor as rollout_actor
from actors.rollout_actor import RolloutActor
from tests.engines import MOST, TIMEOUT_S, FakeEncoder, FakeEngine, wait_for
from tests.fakes import make_prompt
from video_opd.cluster.faults import LOST
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.errors import WeightsLostError
from video_opd.models.vllm_engine import Completion
from video_opd.types import FinishReason, Prediction, Trajectory, TrajectoryGroup
from video_opd.weights.buckets import to_buckets

GREEDY = 1, 0.0, False


class Engine(FakeEngine):
    """Its version is what was loaded last; it says so in its answers."""

    def __init__(self, config: Config, pad_ids: Any):
        super().__init__()
        self.version = -1
        self.fails = False
        self.loaded: list[Any] = []
        self.asked: list[tuple] = []

    def add(self, rendered: Any, *sampling: Any) -> Any:
        self.asked.append(sampling)
        return super().add(rendered, *sampling)

    def load_weights(self, version: int, buckets: Any) -> None:
        assert not self.inside
        if self.fails:
            raise RuntimeError("no memory left")
        self.version = version

    def start_weight_update(self) -> None:
        assert not self.inside
        self.version = -9  # a mixture

    def update_weights(self, request: int) -> None:
        assert self.version == -9
        self.loaded.append(request)

    def finish_weight_update(self) -> None:
        self.version = self.loaded[-1]

    def init_weight_transfer_engine(self, request: Any) -> None:
        pass

    def completions(self, prompt: Any, output: Any) -> list[Any]:
        ids, text = np.array([1], np.int32), str(output.request.version)
        logprobs = np.zeros(1, np.float32)
        made = ids, logprobs, FinishReason.STOP, text, np.array([[int(text)]], np.int32)
        return [Completion(*made) for _ in range(output.request.n)]


class Encoder(FakeEncoder):
    def prepare_ahead(self, prompts, prepare, blank_video, on_ready):
        def encoded(prompt: Any) -> Any:
            prompt.token_ids, prompt.fingerprint = np.zeros(3, np.int32), "f"
            return prepare(prompt)

        return super().prepare_ahead(prompts, encoded, blank_video, on_ready)


@pytest.fixture
def actor(monkeypatch):
    monkeypatch.setattr(actors.engine, "PolicyEngine", Engine)
    monkeypatch.setattr(rollout_actor, "PromptEncoder", lambda *_: Encoder())
    monkeypatch.setattr(rollout_actor, "start_role_log", lambda *_: None)
    sizes = [f"rollout.max_num_seqs={MOST}", "rollout.rollouts_per_prompt=2"]
    actor: Any = RolloutActor("actor-0", load_config("configs/demo.yaml", [*sizes, "seed=3"]))
    yield actor
    actor._loop.close()


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(test, TIMEOUT_S))


async def sampled(actor, *names: str) -> list[Trajectory]:
    results = [r async for part in actor.rollout([make_prompt(n) for n in names]) for r in part]
    return [t for group in results if isinstance(group, TrajectoryGroup) for t in group.trajectories]


async def refused(actor) -> bool:
    with pytest.raises(WeightsLostError, match="actor-0 holds no whole version"):
        await sampled(actor, "late")
    with pytest.raises(WeightsLostError):
        await actor.predict([make_prompt("late")], *GREEDY)
    return True


def version_of(trajectories: list[Trajectory]) -> set[int]:
    """Of the weights that answered; everything else about them is of the same version."""
    for t in trajectories:
        assert t.policy_version == int(t.text) and f"@{t.policy_version}#" in t.trajectory_id
        assert t.top_k_ids is not None and t.top_k_ids.tolist() == [[t.policy_version]]
    return {t.policy_version for t in trajectories}


async def until(is_so) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


def buckets(version: int, missing: int = 0) -> list[Any]:
    """As references to the object store: awaitables."""

    async def fetched(bucket: Any) -> Any:
        return bucket

    named = [(f"{i}", torch.zeros(8)) for i in range(4)]
    made = list(to_buckets(named, version, 64))
    return [fetched(bucket) for bucket in made[: len(made) - missing]]


def hold_at(actor, num_prompts: int) -> threading.Event:
    """With so many prompts in it the engine's step waits until this is set. Before, none is answered."""
    go_on, engine = threading.Event(), actor._engine

    def before_step() -> None:
        if len(engine.inside) == num_prompts:
            wait_for(go_on)
        elif not go_on.is_set():
            for request in engine.inside.values():
                request.left += 1

    engine.before_step = before_step
    return go_on


def test_trajectories_and_seeds_are_those_of_the_version_at_which_a_prompt_enters(actor):
    """A publication comes while one prompt is in the engine and another waits."""
    go_on = hold_at(actor, MOST // 2)
    many = [f"p{i}" for i in range(MOST)]

    async def test() -> None:
        call = asyncio.ensure_future(sampled(actor, *many))
        await until(lambda: len(actor._engine.inside) == MOST // 2)
        loading = asyncio.ensure_future(actor.load_weights(7, buckets(7)))
        await until(lambda: actor._loop._commands)
        later = asyncio.ensure_future(sampled(actor, "q"))
        await until(lambda: len(actor._loop._calls) == 2)
        assert actor._policy_version == -1, "sampling goes on"
        go_on.set()
        await loading
        first = await call
        assert version_of(first) == {-1, 7} and version_of(await later) == {7}
        ids = sorted(t.trajectory_id for t in first)
        assert ids == [
            *("p0@-1#0", "p0@-1#1", "p1@-1#0", "p1@-1#1"),
            *("p2@7#0", "p2@7#1", "p3@7#0", "p3@7#1"),
        ]

    run(test())
    seed = rollout_actor.zlib.crc32
    assert actor._engine.entered[0] == ("p0", seed(b"3:p0@-1#0"))
    assert ("p2", seed(b"3:p2@7#0")) in actor._engine.entered


def test_prompts_wait_from_the_start_of_a_transfer_to_its_new_version(actor):
    async def test() -> None:
        await actor.init_weight_transfer_engine(None)
        await actor.start_weight_update()
        call = asyncio.ensure_future(sampled(actor, "p"))
        predicted = asyncio.ensure_future(actor.predict([make_prompt("p")], *GREEDY))
        stops = asyncio.ensure_future(sampled(actor, "q"))
        await until(lambda: len(actor._loop._calls) == 3)
        await until(lambda: all(c.prompts.is_ready() for c in actor._loop._calls))
        stops.cancel()
        await until(lambda: len(actor._loop._calls) == 2)
        await actor.update_weights(5)
        await actor.finish_weight_update()
        assert not actor._engine.entered and not call.done()
        await actor.update_weight_version("5")
        assert version_of(await call) == {5}
        assert await predicted == [[Prediction(prompt_id="p", text="5", spans_s=())]]

    run(test())
    assert ("p", None) in actor._engine.entered, "predictions are greedy"


def test_answers_and_rollouts_for_a_selection_have_seeds_of_their_own_that_a_resumed_pass_has_again(actor):
    """A vLLM request each: seed, number of answers, temperature."""
    prompts = [make_prompt("p")]

    async def asked() -> list[tuple]:
        actor._engine.asked.clear()
        four = await actor.predict(prompts, 4, 1.0, False)
        assert [len(answers) for answers in four] == [4]
        (one,) = [group async for part in actor.rollout(prompts, for_selection=True) for group in part]
        assert len(one.trajectories) == 1
        assert len(await sampled(actor, "p")) == 2
        await actor.predict(prompts, *GREEDY)
        return list(actor._engine.asked)

    async def test() -> None:
        first = await asked()
        seed = rollout_actor.zlib.crc32
        assert first == [
            (seed(b"3:answers:p@-1#0"), 4, 1.0),
            (seed(b"3:selection:p@-1#0"), 1, None),
            (seed(b"3:p@-1#0"), 2, None),
            (None, 1, None),
        ]
        assert await asked() == first
        await actor.load_weights(7, buckets(7))
        assert not {s for s, *_ in await asked() if s} & {s for s, *_ in first}, "of another step: others"

    run(test())


def test_who_waits_for_a_transfer_that_never_ends_hears_of_it(actor):
    """As when the learner dies in the middle: the pool then says so."""

    async def test() -> None:
        await actor.start_weight_update()
        waiting = asyncio.ensure_future(refused(actor))
        await until(lambda: actor._loop._calls and actor._loop._calls[0].prompts.is_ready())
        await actor.abandon_weight_update()
        assert await waiting and await refused(actor)
        await actor.start_weight_update()  # another one, to its end
        await actor.update_weights(2)
        await actor.finish_weight_update()
        await actor.update_weight_version("2")
        assert version_of(await sampled(actor, "p")) == {2}
        await actor.abandon_weight_update()
        assert version_of(await sampled(actor, "q")) == {2}, "a whole version stays"

    run(test())


def test_a_version_that_is_not_whole_changes_nothing_and_one_that_fails_leaves_none(actor):
    async def test() -> None:
        with pytest.raises(WeightsLostError, match="before its last bucket"):
            await actor.load_weights(7, buckets(7, missing=1))
        assert version_of(await sampled(actor, "p")) == {-1}
        actor._engine.fails = True
        with pytest.raises(RuntimeError, match="no memory left"):
            await actor.load_weights(7, buckets(7))
        await refused(actor)
        actor._engine.fails = False
        await actor.load_weights(8, buckets(8))
        assert version_of(await sampled(actor, "p")) == {8}

    run(test())


def test_a_version_that_does_not_come_is_the_loss_of_its_actor_and_not_the_end_of_the_run(actor):
    """The pool's own deadline is longer while rollouts are under way."""
    actor._config = actor._config.model_copy(update={"request_timeout_s": 0.01})

    async def never() -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        with pytest.raises(LOST, match="the fetch of weights 7 did not end"):
            await actor.load_weights(7, [never()])
        assert version_of(await sampled(actor, "p")) == {-1}

    run(test())


@pytest.mark.parametrize(
    ("clips", "sizes"),
    [
        (range(20), [16, 4]),  # before the last four are answered
        ([0] * 10 + [1] * 8 + [2] * 2, [18, 2]),
        ([0, 1] * 9 + [2, 2], [18, 2]),
        ([0] * 17 + [1] * 3, [16, 4]),
    ],
)
def test_results_come_while_other_prompts_are_answered_and_those_of_a_clip_together(actor, clips, sizes):
    """The demo's prompts_per_result is 16."""
    prompts = [make_prompt(f"p{i}", clip_id=f"v{clip}") for i, clip in enumerate(clips)]

    async def test() -> list[list[str]]:
        parts = [part async for part in actor.rollout(prompts)]
        return [[group.prompt.prompt_id for group in part] for part in parts]

    found = run(test())
    assert [len(part) for part in found] == sizes
    assert sorted(name for part in found for name in part) == sorted(p.prompt_id for p in prompts)
