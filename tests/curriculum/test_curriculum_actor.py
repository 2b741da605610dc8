"""A scheduler actor that dies at random calls: the curriculum answers as with one that never does."""

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

import curriculum.curriculum as module
from curriculum.curriculum import Curriculum
from curriculum.scheduler import Scheduler
from tests.curriculum.test_scheduler import make_config
from tests.fakes import make_group, make_prompt
from video_opd.errors import FailureKind, PartLostError
from video_opd.types import FailedPrompt

POOL = [make_prompt(f"p{i}") for i in range(12)]


class Call:
    def __init__(self, actor: "MortalActor", method: str):
        self._actor, self._method = actor, method

    async def remote(self, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        return self._actor.call(self._method, arguments)


class MortalActor:
    """A real scheduler that may die before or after it did what it was told."""

    def __init__(self, rng: random.Random, faults: float):
        self._scheduler, self._rng, self._faults = Scheduler(POOL, make_config(seed=3)), rng, faults
        self._dead = False

    def __getattr__(self, method: str) -> Call:
        return Call(self, method)

    def call(self, method: str, arguments: tuple) -> Any:
        before, after = (self._rng.random() < self._faults / 2 for _ in range(2))
        self._dead = self._dead or before
        if self._dead:
            raise ActorDiedError()
        answer = getattr(self._scheduler, method)(*arguments)
        self._dead = after
        if after:
            raise ActorDiedError()
        return answer


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(module.ray, "put", lambda value: value)
    monkeypatch.setattr(module.ray, "kill", lambda actor: None)
    monkeypatch.setattr(module, "CHANGES_A_STATE", 7)


def make_curriculum(rng: random.Random, faults: float, max_retries: int = 1000) -> Curriculum:
    class Mortal(Curriculum):
        def _create(self) -> Any:
            self._num_starts += 1
            return MortalActor(rng, faults)

    config = make_config(seed=3).model_copy(update={"max_retries": max_retries})
    return Mortal("video_opd/test", POOL, config)


async def story(curriculum: Curriculum, seed: int) -> list[Any]:
    """Issues, trains on and retires prompts, some calls at once; returns all answers of the scheduler."""
    rng, waiting, seen = random.Random(seed), [], []
    for step in range(20):
        if len(waiting) < 6:
            issued = await asyncio.gather(*(curriculum.next_prompts(n) for n in (1, 2)))
            waiting += [p for prompts in issued for p in prompts]
            seen.append([p.prompt_id for prompts in issued for p in prompts])
        done = [waiting.pop(rng.randrange(len(waiting))) for _ in range(2)]
        await curriculum.observe([make_group(p.prompt_id, [2]) for p in done], step)
        of_scheduler = curriculum.take_metrics()
        seen.append({name: of_scheduler[f"curriculum/{name}"] for name in ("in_flight", "seen_frac")})
        assert of_scheduler["curriculum/in_flight"] == len(waiting)
        if step == 9:
            await curriculum.retire([FailedPrompt(prompt_id=waiting.pop().prompt_id, reason="broken")])
        if step == 12:
            await curriculum.load_state_dict(await curriculum.state_dict())
    seen.append((await curriculum.records()).to_pylist())
    return seen


@given(seed=st.integers(0, 10_000), faults=st.floats(0, 0.3))
def test_a_curriculum_that_dies_again_and_again_answers_as_one_that_never_does(seed, faults):
    calm = asyncio.run(story(make_curriculum(random.Random(seed), 0.0), seed))
    assert asyncio.run(story(make_curriculum(random.Random(seed), faults), seed)) == calm


def test_starting_over_forgets_everything():
    async def run() -> None:
        curriculum = make_curriculum(random.Random(0), 0.0)
        first = [p.prompt_id for p in await curriculum.next_prompts(5)]
        await curriculum.state_dict()
        await curriculum.start_over()
        assert [p.prompt_id for p in await curriculum.next_prompts(5)] == first

    asyncio.run(run())


def test_retired_prompts_are_counted_by_kind():
    async def run() -> dict[str, int]:
        curriculum = make_curriculum(random.Random(0), 0.0)
        gone, slow = (p.prompt_id for p in await curriculum.next_prompts(2))
        await curriculum.retire([FailedPrompt(prompt_id=gone, reason="gone", kind=FailureKind.MISSING)])
        await curriculum.retire([FailedPrompt(prompt_id=slow, reason="slow", kind=FailureKind.TOO_SLOW)])
        return curriculum.num_failed()

    assert asyncio.run(run()) == dict.fromkeys(FailureKind, 0) | {"missing": 1, "too_slow": 1}


def test_of_many_prompts_retired_at_once_a_few_are_named_and_all_are_counted(caplog):
    async def run() -> Curriculum:
        curriculum = make_curriculum(random.Random(0), 0.0)
        failed = [FailedPrompt(prompt_id=p.prompt_id, reason=f"{p.prompt_id} is broken") for p in POOL[:9]]
        await curriculum.retire(failed)
        return curriculum

    curriculum = asyncio.run(run())
    assert curriculum.num_failed()["other"] == 9
    said = caplog.messages
    assert said[:3] == [f"prompt p{i} is dropped: p{i} is broken" for i in range(3)]
    assert said[3:] == ["6 more prompts are dropped: `dropped` of summary.json will say why"]


def test_a_curriculum_that_cannot_live_ends_with_the_cause():
    with pytest.raises(PartLostError, match=r"next_prompts was lost 4 times"):
        asyncio.run(make_curriculum(random.Random(0), 2.0, max_retries=3).next_prompts(1))
