"""How a run's parts start on GPUs that they share, and what their engines are told."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import driver.run
import learner.learner
from driver.run import Run, create_parts, start_parts
from learner.learner import Learner
from preflight.inputs import SHAPES
from preflight.memory import GIB, workload_of_budget
from preflight.memory_fit import MemoryPlan
from preflight.model_shapes import find_shapes
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.errors import RunError, first_error

VLLM = "teacher_pool.engine=vllm"


def config_of(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / name, overrides)


def plan_of(config: Config) -> MemoryPlan:
    student, teacher = find_shapes(config.student, SHAPES), find_shapes(str(config.teacher), SHAPES)
    work = workload_of_budget(config.video, student)
    return MemoryPlan(config, student, teacher, work, work, 80 * GIB, 1 << 50)


class Part:
    """Notes when its start begins and ends; it ends when `waits_for` have begun."""

    def __init__(self, name: str, events: list[str], *waits_for: str):
        self._name, self._events, self._waits_for = name, events, waits_for

    async def start(self) -> None:
        self._events.append(f"{self._name} begins")
        while not all(f"{name} begins" in self._events for name in self._waits_for):
            await asyncio.sleep(0)
        self._events.append(f"{self._name} ends")


def starts(config: Config, learner_first: bool, idle_replicas: int = 0) -> list[str]:
    events: list[str] = []
    of_engines = ["learner"] if learner_first else []
    run: Any = SimpleNamespace(
        config=config,
        idle_replicas=idle_replicas,
        actors=Part("actors", events, "teacher", *of_engines),
        teacher=Part("teacher", events, "actors", *of_engines),
        learner=Part("learner", events),
    )
    asyncio.run(asyncio.wait_for(start_parts(run), 60))
    return events


def test_on_shared_gpus_the_learner_starts_after_the_engines():
    events = starts(config_of("qwen3vl_2b_1gpu.yaml"), learner_first=False)
    assert events[-2:] == ["learner begins", "learner ends"] and len(events) == 6


@pytest.mark.parametrize("name", ["qwen3vl_8b.yaml", "demo.yaml"])
def test_elsewhere_all_start_at_once(name):
    assert len(starts(config_of(name), learner_first=True)) == 6


def test_a_part_that_fails_to_start_ends_the_starts_of_the_others():
    events: list[str] = []

    class Failing(Part):
        async def start(self) -> None:
            await super().start()
            raise RunError("no memory")

    class Waiting(Part):
        async def start(self) -> None:
            try:
                await super().start()
            finally:
                events.append(f"{self._name} is over")

    teacher, ranks = Waiting("teacher", events, "nobody"), Waiting("learner", events, "nobody")
    parts = {"actors": Failing("actors", events, "teacher", "learner"), "teacher": teacher, "learner": ranks}
    run: Any = SimpleNamespace(config=config_of("demo.yaml"), idle_replicas=0, **parts)
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(asyncio.wait_for(start_parts(run), 60))
    assert str(first_error(caught.value)) == "no memory"
    assert {"teacher is over", "learner is over"} <= set(events), "before the parts are stopped"


def test_a_learner_on_whose_gpus_the_teacher_answers_first_is_left_out():
    events = starts(config_of("qwen3vl_8b.yaml"), learner_first=False, idle_replicas=4)
    assert sorted(events) == ["actors begins", "actors ends", "teacher begins", "teacher ends"]


class Ranks:
    """A learner that notes whether its resources are reserved."""

    def __init__(self):
        self.reserved = False

    def reserve(self) -> None:
        self.reserved = True


def create(monkeypatch: pytest.MonkeyPatch, given: Config, idle: int = 0, told: dict | None = None) -> Run:
    """create_parts without processes; `told`: the configs of the parts."""

    def part(name: str, made: Any) -> Callable[[str, Config], Any]:
        return lambda _, config: (told if told is not None else {}).update({name: config}) or made

    for name, made in (("ActorPool", None), ("create_teacher", None), ("Learner", Ranks())):
        monkeypatch.setattr(driver.run, name, part(name, made))
    monkeypatch.setattr(driver.run, "Curriculum", lambda *_: None)
    monkeypatch.setattr(driver.run, "create_control", lambda _: None)
    monkeypatch.setattr(driver.run, "idle_replicas", lambda _: idle)
    plan: Any = SimpleNamespace(train=SimpleNamespace(pool=[]))
    return create_parts(Path("runs/name"), given, plan, plan_of(given))


@pytest.mark.parametrize("idle", [0, 4])
def test_a_learner_that_waits_for_the_teacher_holds_nothing(monkeypatch, idle):
    run: Any = create(monkeypatch, config_of("qwen3vl_8b.yaml"), idle)
    assert run.learner.reserved == (idle == 0) and run.idle_replicas == idle


def test_the_log_warns_of_parts_that_find_nothing_to_do(monkeypatch):
    said = []
    monkeypatch.setattr(driver.run.log, "warning", lambda text, *values: said.append(text % values))
    create(monkeypatch, config_of("qwen3vl_8b.yaml", "rollout.num_actors=99"))
    assert len(said) == 1 and said[0].startswith("warning: rollout.num_actors=99, but "), said


def test_a_learner_reserves_when_it_is_told_or_starts(monkeypatch):
    reserved, removed = [], []

    def placement_group(bundles: list, strategy: str) -> object:
        reserved.append(bundles)
        return object()

    monkeypatch.setattr(learner.learner, "placement_group", placement_group)
    monkeypatch.setattr(learner.learner, "remove_placement_group", removed.append)
    monkeypatch.setattr(Learner, "_create", lambda _: [])
    config = config_of("qwen3vl_8b.yaml")
    unused = Learner("video_opd/r", config)
    unused.stop()
    assert not reserved and not removed
    for reserve_first in (True, False):
        ranks = Learner("video_opd/r", config)
        if reserve_first:
            ranks.reserve()

        async def all_ranks(*_: Any, **__: Any) -> list[str]:
            return ["address"]

        monkeypatch.setattr(ranks, "_all", all_ranks)
        asyncio.run(ranks.start())
        ranks.stop()
    assert reserved == [[{"learner": 1.0, "CPU": 1.0, "GPU": 1.0}] * 4] * 2 and len(removed) == 2


@pytest.mark.parametrize(
    ("name", "overrides", "is_told"),
    [
        (
            "qwen3vl_4b_2gpu.yaml",
            ["teacher_pool.engine=vllm", "teacher_pool.gpu_memory_utilization=0.28"],
            True,
        ),
        ("qwen3vl_8b.yaml", [VLLM], False),
    ],
)
def test_engines_that_share_a_gpu_get_the_kv_cache_of_the_plan(monkeypatch, name, overrides, is_told):
    """Also those that start later: replacements, and replicas of autoscaling, have the same config."""
    given, told = config_of(name, *overrides), {}
    memory, run = plan_of(given), create(monkeypatch, given, told=told)
    planned = {r.role: r.device.held.get("KV cache") for r in memory.roles if r.device}
    assert planned["actors"] and planned["teacher"]
    of_actors, of_teacher = told["ActorPool"].rollout, told["create_teacher"].teacher_pool
    assert of_actors.kv_cache_bytes == (planned["actors"] if is_told else None)
    assert of_teacher.kv_cache_bytes == (planned["teacher"] if is_told else None)
    assert run.given is given and given.rollout.kv_cache_bytes is None, "config.yaml has what the user gave"
