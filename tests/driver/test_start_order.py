"""How a run's parts start on GPUs that they share, and what their engines are told."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import driver.run
from driver.run import create_parts, start_parts
from preflight.inputs import SHAPES
from preflight.memory import GIB, workload_of_budget
from preflight.memory_fit import MemoryPlan
from preflight.model_shapes import find_shapes
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_file import load_config

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


def starts(config: Config, learner_first: bool) -> list[str]:
    events: list[str] = []
    of_engines = ["learner"] if learner_first else []
    run: Any = SimpleNamespace(
        config=config,
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
    for part in ("ActorPool", "create_teacher", "Learner"):
        monkeypatch.setattr(driver.run, part, lambda _, config, part=part: told.update({part: config}))
    monkeypatch.setattr(driver.run, "Curriculum", lambda *_: None)
    monkeypatch.setattr(driver.run, "create_control", lambda _: None)
    memory, plan = plan_of(given), SimpleNamespace(train=SimpleNamespace(pool=[]))
    run = create_parts(Path("runs/name"), given, plan, memory)  # pyright: ignore[reportArgumentType]
    planned = {r.role: r.device.held.get("KV cache") for r in memory.roles if r.device}
    assert planned["actors"] and planned["teacher"]
    of_actors, of_teacher = told["ActorPool"].rollout, told["create_teacher"].teacher_pool
    assert of_actors.kv_cache_bytes == (planned["actors"] if is_told else None)
    assert of_teacher.kv_cache_bytes == (planned["teacher"] if is_told else None)
    assert run.given is given and given.rollout.kv_cache_bytes is None, "config.yaml has what the user gave"
