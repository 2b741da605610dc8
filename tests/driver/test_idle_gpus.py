"""More teacher replicas on the GPUs of a learner that has not started: when, how many, and in what order."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import driver.idle_gpus as idle_gpus
import driver.rounds
import driver.start_ray
from driver.idle_gpus import FEWEST_PROMPTS, more_replicas
from driver.rounds import validate_first
from driver.start_ray import idle_replicas
from teacher_service.pool import TeacherPool, deployment_options
from video_opd import ROOT
from video_opd.cluster.deadline import waits
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.config_teachers import TeacherModel
from video_opd.errors import RunError

ROLES = {"rollout": 64.0, "teacher": 64.0, "learner": 4.0}
MACHINE = {"CPU": 128.0, "GPU": 8.0} | ROLES
CPUS_ONLY = {"CPU": 64.0}


def paper(*overrides: str) -> Config:
    """Four ranks, two actors, two replicas, a GPU each."""
    return load_config(ROOT / "configs" / "qwen3vl_8b.yaml", ["curriculum.kind=tvdf", *overrides])


SHARDS = ["teacher_pool.engine=vllm", "teacher_pool.tensor_parallel=2", "teacher_pool.num_replicas=1"]


@pytest.mark.parametrize(
    ("overrides", "nodes", "number"),
    [
        ([], [MACHINE], 4),
        ([], [MACHINE, CPUS_ONLY], 4),
        ([], [MACHINE | {"GPU": 6.0}], 2),  # another run has its own
        (SHARDS, [MACHINE], 2),
        ([], [MACHINE | {"teacher": 2.0}], 0),  # the learner's node is no teacher's
        ([], [MACHINE | {"CPU": 4.0}], 0),
        ([], [{"GPU": 4.0, "learner": 4.0, "CPU": 64.0}, {"GPU": 8.0, "CPU": 64.0} | ROLES], 0),
        (["curriculum.kind=uniform"], [MACHINE], 0),
        (["curriculum={trpv: false, dbtp: false}"], [MACHINE], 0),
        (["teacher_pool.max_replicas=3"], [MACHINE], 0),  # Serve decides
        (["rollout.num_gpus=0.5", "teacher_pool.num_gpus=0.5"], [MACHINE], 0),
        (["learner.num_gpus=0", "teacher_pool.num_gpus=0"], [MACHINE], 0),
    ],
)
def test_as_many_more_replicas_as_fit_on_the_learners_gpus(monkeypatch, overrides, nodes, number):
    said = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": MACHINE}
    monkeypatch.setattr(driver.start_ray.ray, "nodes", lambda: [*said, dead])
    assert idle_replicas(paper(*overrides)) == number


class Serve:
    """Replicas that end some time after they were told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, events: list[str], answers: list[Any]):
        self._events, self._answers = events, answers
        monkeypatch.setattr(idle_gpus, "set_replicas", self.set_replicas)
        monkeypatch.setattr(idle_gpus, "read_pool", self.read_pool)
        monkeypatch.setattr(idle_gpus, "POLL_S", 0.0)

    def set_replicas(self, app: str, number: int) -> None:
        assert app == "video_opd/r/teacher/t"
        self._events.append(f"{number} replicas")

    def read_pool(self, app: str) -> Any:
        if isinstance(answer := self._answers.pop(0), Exception):
            raise answer
        if answer:
            self._events.append("they have ended")
        return SimpleNamespace(has=lambda number: answer)


def make_run(events: list[str], number: int = 4) -> Any:
    teacher = TeacherPool("video_opd/r", paper(), TeacherModel(name="t", model="t"))

    async def start() -> None:
        events.append("learner starts")

    totals = SimpleNamespace(update=lambda of: None)
    parts = {"teacher": teacher, "learner": SimpleNamespace(start=start), "totals": totals}
    return SimpleNamespace(config=paper(), idle_replicas=number, **parts)


def test_they_answer_and_have_ended_before_the_learner_starts(monkeypatch):
    events: list[str] = []
    Serve(monkeypatch, events, [RunError("busy"), False, True])
    run = make_run(events)

    async def validate(run: Any) -> bool:
        async with more_replicas(run, FEWEST_PROMPTS):
            events.append("answers")
        return True

    monkeypatch.setattr(driver.rounds, "validate", validate)
    asyncio.run(validate_first(run))
    assert events == ["6 replicas", "answers", "2 replicas", "they have ended", "learner starts"]
    assert run.idle_replicas == 0 and not waits(), "later rounds have no idle GPUs"
    asyncio.run(validate_first(run))
    assert len(events) == 5, "the learner started with the others"


def test_a_replica_that_hangs_has_the_time_that_serve_gives_it(monkeypatch):
    Serve(monkeypatch, events := [], [True])
    run = make_run(events)
    times = {"request_timeout_s": 5000.0, "start_timeout_s": 900.0}
    run.config, waited = run.config.model_copy(update=times), []

    async def with_deadline(timeout_s: float, end: Any, _: str) -> None:
        waited.append(timeout_s)
        await end

    monkeypatch.setattr(idle_gpus, "with_deadline", with_deadline)

    async def go() -> None:
        async with more_replicas(run, FEWEST_PROMPTS):
            pass

    asyncio.run(go())
    assert waited[0] > deployment_options(run.config)["graceful_shutdown_timeout_s"] == 5000


@pytest.mark.parametrize(("number", "num_prompts"), [(0, 10_000), (4, FEWEST_PROMPTS - 1)])
def test_none_start_without_idle_gpus_or_for_a_few_prompts(monkeypatch, number, num_prompts):
    Serve(monkeypatch, events := [], [])

    async def go() -> None:
        async with more_replicas(make_run(events, number), num_prompts):
            pass

    asyncio.run(go())
    assert not events


def test_nobody_waits_for_them_when_the_pass_fails(monkeypatch):
    Serve(monkeypatch, events := [], [])

    async def go() -> None:
        async with more_replicas(make_run(events), FEWEST_PROMPTS):
            raise RunError("the pass")

    with pytest.raises(RunError, match="the pass"):
        asyncio.run(go())
    assert events == ["6 replicas"], "the end of the run deletes the service"
