"""One step of the loop, around parts that only say when they are called."""

import asyncio
import math
from dataclasses import replace
from typing import Any, ClassVar

import launch
from driver.records.step import cache_metrics
from driver.run import Run
from tests.fakes import make_group
from video_opd import ROOT
from video_opd.config_file import load_config
from video_opd.types import CacheHits, StepReport, TrajectoryGroup


class Part:
    """Answers every call, and notes it."""

    answers: ClassVar = {
        "take": [make_group("p")],
        "update": StepReport(
            step=0, policy_version=1, metrics={"learner/loss": 0.5, "learner/grad_norm": 1.0}
        ),
    }

    def __init__(self, called: list[str]):
        self._called = called

    def __getattr__(self, name: str) -> Any:
        async def call(*_: Any) -> Any:
            self._called.append(name)
            return self.answers.get(name)

        return call


def test_cache_hits_are_shares_of_the_tokens_and_clips_of_what_actors_sampled():
    def sampled(name: str, rollouts: int, cached: int, processed: bool) -> TrajectoryGroup:
        hits = CacheHits(num_cached_tokens=cached, was_clip_processed=processed)
        return replace(make_group(name, [2] * rollouts, suspended=[1]).group, cache_hits=hits)

    groups = [sampled("p", 3, 8, False), sampled("q", 1, 4, True)]  # 5 tokens a prompt
    metrics = cache_metrics([*groups, make_group("truth").group])
    assert metrics == {"actors/prefix_cache_hit_frac": 12 / 30, "actors/mm_cache_hit_frac": 0.5}
    assert all(math.isnan(value) for value in cache_metrics([make_group("truth").group]).values())


def test_the_curriculum_observes_while_the_weights_travel_and_both_end_before_new_prompts(monkeypatch):
    called: list[str] = []
    part: Any = Part(called)

    async def learn_step() -> None:
        meet = asyncio.Barrier(2)  # each of the two waits until the other is under way

        class Curriculum(Part):
            async def observe(self, *_: Any) -> None:
                await meet.wait()
                called.append("observe")

        async def publish(run: Run, policy_version: int) -> None:
            await meet.wait()
            called.append("publish")

        monkeypatch.setattr(launch, "publish_weights", publish)
        parts: Any = {"folder": None, "plan": None, "control": None, "actors": None, "teacher": None}
        parts |= {"learner": part, "curriculum": Curriculum(called), "rewards": []}
        config = load_config(ROOT / "configs" / "demo.yaml")
        run = Run(config=config, given=config, **parts)
        await asyncio.wait_for(launch.learn_step(run, part, part), 60)
        assert run.step == 1

    for name in ("record", "save_if_due"):
        monkeypatch.setattr(launch, name, getattr(part, name))
    asyncio.run(learn_step())
    assert called[:3] == ["take", "update", "retire"] and called[5:] == ["release", "record", "save_if_due"]
    assert sorted(called[3:5]) == ["observe", "publish"]
