"""Selecting a round: what was answered stays when it is interrupted, and a checkpoint follows."""

import asyncio
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import driver.rounds
from curriculum.answers import FILE, PARTS, student_parts
from curriculum.scheduler import Scheduler
from driver.progress import Progress
from driver.rounds import start_round
from driver.run import Run
from driver.run_state import Phase
from driver.stopping import shutdown_at_end
from tests.fakes import make_prompt
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.errors import ConfigError, StoppedError
from video_opd.passes import ask_by_video
from video_opd.types import FailedPrompt, Prediction, Prompt

POOL = [make_prompt(f"p{i}") for i in range(10)]
PART = 4


class Model:
    """A teacher or the actors: answers every prompt, and notes what it is asked. Hangs at its last call."""

    num_wanted = 1

    def __init__(self, span: tuple[float, float], num_calls: float = np.inf, broken: Sequence[str] = ()):
        self._span, self._left, self._broken = span, num_calls, broken
        self.asked: list[str] = []
        self.hangs = asyncio.Event()

    async def predict(self, prompts: Sequence[Prompt], *arguments: Any) -> list[Any]:
        async def at_once() -> int:
            return 1

        answer = partial(self._answer, num_answers=arguments[0] if len(arguments) == 3 else None)
        return await ask_by_video(prompts, PART, answer, at_once, arguments[-1])

    async def _answer(self, prompts: Sequence[Prompt], num_answers: int | None) -> list[Any]:
        if self._left < 1:
            self.hangs.set()
            await asyncio.Event().wait()
        self._left -= 1
        self.asked += [p.prompt_id for p in prompts]
        answers = [Prediction(prompt_id=p.prompt_id, text="", span_s=self._span) for p in prompts]
        results: list[Any] = [[a] * num_answers for a in answers] if num_answers else [*answers]
        failed = [p.prompt_id in self._broken for p in prompts]
        reasons = [FailedPrompt(prompt_id=p.prompt_id, reason="broken") for p in prompts]
        return [f if fails else r for f, fails, r in zip(reasons, failed, results, strict=True)]


class Local:
    """A scheduler without a process."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            return getattr(self.scheduler, method)(*arguments)

        return call


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.setattr(driver.rounds, "ANSWERS_A_PART", PART)
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    models = [f"{name}={tmp_path / name}" for name in ("student", "teacher")]
    sizes = ["groups_per_step=2", "max_policy_lag=0", "curriculum.num_selected=4"]
    return load_demo([*models, *sizes, f"runs_dir={tmp_path / 'runs'}", "curriculum.kind=tvdf"])


@pytest.fixture(autouse=True)
def written(monkeypatch) -> list[dict]:
    """The scheduler's states of the checkpoints that were written."""
    states: list[dict] = []

    async def checkpoint(run: Run) -> None:
        states.append({"step": run.step, "totals": dict(run.totals)} | await run.curriculum.state_dict())

    monkeypatch.setattr(driver.rounds, "checkpoint", checkpoint)
    return states


def make_run(config: Config, teacher: Model, student: Model, name: str = "run", step: int = 0) -> Any:
    folder = Path(config.runs_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    parts: Any = {"plan": SimpleNamespace(train=POOL), "control": None, "rewards": [], "given": config}
    parts |= {"teacher": teacher, "actors": student, "curriculum": Local(Scheduler(POOL, config))}
    parts["learner"] = SimpleNamespace(stop=lambda: None)
    teacher.stop = lambda: None  # type: ignore[attr-defined]
    run = Run(folder=folder, config=config, progress=Progress(step=step), newest_checkpoint=step, **parts)
    run.published = step
    run.state.enter(Phase.RUNNING)
    return run


def good() -> Model:
    return Model((2.0, 5.0))


def bad(**options: Any) -> Model:
    return Model((8.0, 9.0), **options)


def interrupted(run: Any, hangs: Model) -> None:
    """Starts a round, and sends SIGTERM once the model hangs."""

    async def go() -> None:
        async with shutdown_at_end(run), asyncio.TaskGroup() as tasks:
            tasks.create_task(start_round(run))
            await hangs.hangs.wait()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        asyncio.run(asyncio.wait_for(go(), 120))


def rows_of(folder: Path) -> list[int]:
    return [pq.read_metadata(path).num_rows for path in sorted(folder.iterdir())]


def test_a_teacher_that_is_interrupted_is_asked_the_rest_by_the_next_run(config, written):
    first = make_run(config, teacher := Model((2.0, 5.0), num_calls=2), bad())
    interrupted(first, teacher)
    answers = config.curriculum.num_teacher_predictions
    assert rows_of(first.folder / PARTS) == [PART * answers] * 2, "each part is a file of its own"
    assert not (first.folder / FILE).exists() and not written
    second = make_run(config, rest := good(), bad(), "second")
    asyncio.run(start_round(second))
    assert (teacher.asked, rest.asked) == ([f"p{i}" for i in range(8)], ["p8", "p9"])
    assert pq.read_metadata(second.folder / FILE).num_rows == 10 * answers
    assert not (second.folder / PARTS).exists() and second.totals["teacher_answers"] == 2 * answers
    tau = second.curriculum.scheduler.records()["teacher_iou"].to_pylist()
    assert tau == [1.0] * 10


def test_a_student_that_is_interrupted_is_asked_the_rest_by_the_same_run_at_the_same_step(config, written):
    first = make_run(config, good(), student := bad(num_calls=2))
    interrupted(first, student)
    assert rows_of(student_parts(first.folder, 0)) == [PART, PART] and not written
    resumed = make_run(config, teacher := good(), rest := bad())
    asyncio.run(start_round(resumed))
    assert (teacher.asked, rest.asked) == ([], ["p8", "p9"])
    assert resumed.curriculum.scheduler.records()["student_iou"].to_pylist() == [[0.0]] * 10
    assert not list(student_parts(resumed.folder, 0).parent.iterdir()), "they are used"


@pytest.mark.parametrize("change", ["step", "text", "length", "weights"])
def test_answers_of_another_student_are_not_used(config, change, written):
    first = make_run(config, good(), student := bad(num_calls=1))
    interrupted(first, student)
    if change == "text":
        prompt = config.prompt.model_copy(update={"template": "{query}"})
        config = config.model_copy(update={"prompt": prompt})
    if change == "length":
        rollout = config.rollout.model_copy(update={"max_response_tokens": 3})
        config = config.model_copy(update={"rollout": rollout})
    if change == "weights":
        (Path(config.student) / "config.json").write_text("another")
    run = make_run(config, good(), asked := bad(), step=7 if change == "step" else 0)
    if change == "step":
        run.curriculum.scheduler.validate(np.ones(10))
    asyncio.run(start_round(run))
    assert asked.asked == [f"p{i}" for i in range(10)]


def test_a_checkpoint_follows_from_which_nobody_is_asked_again(config, written):
    run = make_run(config, good(), bad())
    asyncio.run(start_round(run))
    (state,) = written
    assert state["totals"]["select_s"] > 0, "what the summary counts is in it"
    resumed = Scheduler(POOL, config)
    resumed.load_state_dict(state)
    assert (state["step"], resumed.next_selection()) == (0, 2), "not at once"
    assert resumed.records() == run.curriculum.scheduler.records()
    nobody = config.curriculum.model_copy(update={"dbtp": False, "trpv": False})
    other = make_run(config.model_copy(update={"curriculum": nobody}), good(), bad(), "other")
    asyncio.run(start_round(other))
    assert len(written) == 1, "that was no work"


def test_prompts_that_a_model_cannot_read_are_dropped_and_not_asked_again(config):
    run = make_run(config, Model((2.0, 5.0), broken=["p1"]), student := bad(broken=["p2"]))
    run.curriculum.scheduler.retire([FailedPrompt(prompt_id="p0", reason="gone")])
    asyncio.run(start_round(run))
    records = {r["prompt_id"]: r for r in run.curriculum.scheduler.records().to_pylist()}
    assert {p: r["dropped"] for p, r in records.items() if r["dropped"]} == {
        "p0": "gone",
        "p1": "broken",
        "p2": "broken",
    }
    assert "p0" not in run.teacher.asked and not {"p0", "p1"} & {*student.asked}
    assert (records["p1"]["teacher_iou"], records["p2"]["student_iou"]) == (None, [None])


def test_answers_arrive_as_calls_end_and_an_interruption_keeps_those_of_less_than_a_part(
    config, written, monkeypatch
):
    monkeypatch.setattr(driver.rounds, "ANSWERS_A_PART", 100)
    run = make_run(config, teacher := Model((2.0, 5.0), num_calls=1), bad())
    interrupted(run, teacher)
    assert rows_of(run.folder / PARTS) == [PART * config.curriculum.num_teacher_predictions]


def test_a_sampled_round_asks_the_teacher_what_it_has_not_answered_and_the_student_what_is_left(
    config, written
):
    curriculum = config.curriculum.model_copy(update={"pool_sample": 6, "num_selected": 3})
    config = config.model_copy(update={"curriculum": curriculum, "groups_per_step": 1})
    run = make_run(config, Model((2.0, 5.0), broken=["p4"]), bad())
    known: set[str] = set()
    for step in (0, 3, 6):
        run.progress.step = run.published = step
        asked = {f"p{i}" for i in run.curriculum.scheduler.to_ask(step)}
        run.teacher.asked, run.actors.asked = [], []
        asyncio.run(start_round(run))
        assert len(asked) == 6 and set(run.teacher.asked) == asked - known
        known |= asked
        assert set(run.actors.asked) == asked - {"p4"}, "the teacher could not read it"
    assert pq.read_metadata(run.folder / FILE).num_rows == len(known - {"p4"}) * 4, "of all rounds"
    again = make_run(config, good(), bad(), "again")
    asyncio.run(start_round(again))
    assert again.teacher.asked in ([], ["p4"])


def test_when_nothing_can_be_selected_the_records_say_why(config, written):
    run = make_run(config, bad(), good())
    with pytest.raises(ConfigError, match=r"0 of 10 prompts are left, .*: 10 dropped, teacher IoU is"):
        asyncio.run(start_round(run))
    dropped = pq.read_table(run.folder / "curriculum" / "round-1.parquet")["dropped"].to_pylist()
    assert dropped == ["teacher IoU is below 0.7"] * 10 and not written
