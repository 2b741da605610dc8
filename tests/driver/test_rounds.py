"""Selecting a round: who is asked; what was answered stays when it is interrupted; a checkpoint follows."""

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
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
from tests.fakes import make_group, make_prompt
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.errors import ConfigError, StoppedError
from video_opd.passes import ask_by_video
from video_opd.types import FailedPrompt, Prediction, Prompt, TeacherScores, TrajectoryGroup

POOL = [make_prompt(f"p{i}") for i in range(10)]
PART = 4


class Model:
    """A teacher or the actors: answers every prompt, and notes what it is asked. Hangs at its last call."""

    def __init__(self, *spans: tuple[float, float], num_calls: float = np.inf, broken: Sequence[str] = ()):
        """spans: of the first answers to a prompt; the last one is that of all others, too."""
        self._spans, self._left, self._broken = spans, num_calls, broken
        self.asked: list[str] = []
        self.sampling: set[tuple[int, float]] = set()
        self.hangs = asyncio.Event()

    async def predict(self, prompts: Sequence[Prompt], *arguments: Any) -> list[Any]:
        async def at_once() -> int:
            return 1

        self.sampling.add(arguments[:2])
        answer = partial(self._answer, num_answers=arguments[0])
        return await ask_by_video(prompts, PART, answer, at_once, arguments[-1])

    async def take(self, prompts: Sequence[Prompt]) -> list[FailedPrompt | None]:
        """Begins a call: those of its prompts that are broken."""
        if self._left < 1:
            for _ in range(100):  # calls that began earlier end first
                await asyncio.sleep(0)
            self.hangs.set()
            await asyncio.Event().wait()
        self._left -= 1
        self.asked += [p.prompt_id for p in prompts]
        reasons = [FailedPrompt(prompt_id=p.prompt_id, reason="broken") for p in prompts]
        return [f if f.prompt_id in self._broken else None for f in reasons]

    async def _answer(self, prompts: Sequence[Prompt], num_answers: int) -> list[Any]:
        failed = await self.take(prompts)
        spans = [*self._spans, *[self._spans[-1]] * num_answers][:num_answers]
        answers = [
            [Prediction(prompt_id=p.prompt_id, text="", spans_s=(s,) if s else ()) for s in spans]
            for p in prompts
        ]
        return [f or a for f, a in zip(failed, answers, strict=True)]


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
    student.num_wanted = 1  # type: ignore[attr-defined]
    teacher.stop = lambda: None  # type: ignore[attr-defined]
    run = Run(folder=folder, config=config, progress=Progress(step=step), newest_checkpoint=step, **parts)
    run.published = step
    run.state.enter(Phase.RUNNING)
    return run


def good(**options: Any) -> Model:
    return Model((2.0, 5.0), **options)


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
        asyncio.run(asyncio.wait_for(go(), 60))


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
    answers = config.curriculum.num_student_predictions
    assert rows_of(student_parts(first.folder, 0)) == [PART * answers] * 2 and not written
    resumed = make_run(config, teacher := good(), rest := bad())
    asyncio.run(start_round(resumed))
    assert (teacher.asked, rest.asked) == ([], ["p8", "p9"])
    assert resumed.curriculum.scheduler.records()["student_iou"].to_pylist() == [[0.0]] * 10
    assert not list(student_parts(resumed.folder, 0).parent.iterdir()), "they are used"


def test_a_student_answers_as_often_as_the_teacher_at_the_same_temperature_and_sigma_is_the_mean(config):
    run = make_run(config, good(), student := Model((2.0, 5.0), (2.0, 3.5), (8.0, 9.0)))
    asyncio.run(start_round(run))
    assert student.sampling == run.teacher.sampling == {(4, 1.0)}
    assert run.curriculum.scheduler.records()["student_iou"].to_pylist() == [[(1 + 0.5 + 0 + 0) / 4]] * 10
    assert run.curriculum.scheduler.records()["disagreement"].to_pylist() == [1 - 0.375] * 10
    ones = {"num_student_predictions": 1, "num_teacher_predictions": 1}
    one = config.curriculum.model_copy(update=ones)
    other = make_run(config.model_copy(update={"curriculum": one}), good(), greedy := good(), "other")
    asyncio.run(start_round(other))
    assert greedy.sampling == other.teacher.sampling == {(1, 0.0)}, "the greedy answer"


@pytest.mark.parametrize("change", ["step", "text", "length", "weights", "number", "seed"])
def test_answers_of_another_student_are_not_used(config, change, written):
    first = make_run(config, good(), student := bad(num_calls=1))
    interrupted(first, student)
    if change == "text":
        prompt = config.prompt.model_copy(update={"template": "{query}"})
        config = config.model_copy(update={"prompt": prompt})
    if change == "length":
        rollout = config.rollout.model_copy(update={"max_response_tokens": 3})
        config = config.model_copy(update={"rollout": rollout})
    if change == "number":
        curriculum = config.curriculum.model_copy(update={"num_student_predictions": 1})
        config = config.model_copy(update={"curriculum": curriculum})
    if change == "seed":
        config = config.model_copy(update={"seed": 5})
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


# --- disagreement=reverse_kl, kind=difficulty ---


class Student(Model):
    """A rollout has as many tokens as its prompt's number says, and one more; each of log-prob -1."""

    async def rollout(self, prompts: Sequence[Prompt], for_selection: bool) -> Any:
        assert for_selection
        failed = await self.take(prompts)
        results = [f or self._rolled_out(p) for f, p in zip(failed, prompts, strict=True)]
        for part in (results[:1], results[1:]):
            yield ("a reference", part), part

    def _rolled_out(self, prompt: Prompt) -> TrajectoryGroup:
        (trajectory,) = make_group(prompt.prompt_id, [1 + int(prompt.prompt_id[1:])]).group.trajectories
        ones = np.ones(len(trajectory.response_token_ids), np.float32)
        rollout = replace(trajectory, actor_logprobs=-ones, predicted_spans_s=(self._spans[0],))
        return TrajectoryGroup(prompt=prompt, trajectories=(rollout,))


class Teacher(Model):
    """Gives each token a log-prob of -3."""

    async def score(self, sent: Any, for_selection: bool) -> list[Any]:
        assert for_selection, "no scores on grey frames"
        groups = sent[1] if isinstance(sent, tuple) else sent
        assert all(isinstance(g, TrajectoryGroup) for g in groups), "a reference is to scorable results alone"
        names = [g.prompt.prompt_id for g in groups]
        failed = {n: FailedPrompt(prompt_id=n, reason="unread") for n in names if n in self._broken}
        return [failed.get(n) or (self._scores(g),) for n, g in zip(names, groups, strict=True)]

    def _scores(self, group: TrajectoryGroup) -> TeacherScores:
        (rollout,) = group.trajectories
        logprobs = np.full(len(rollout.actor_logprobs), -3, np.float32)
        name = rollout.trajectory_id
        return TeacherScores(trajectory_id=name, teacher_id="t", teacher_logprobs=logprobs, top_k=None)


def with_reverse_kl(config: Config, **more: Any) -> Config:
    curriculum = config.curriculum.model_copy(update={"disagreement": "reverse_kl", **more})
    rollout = config.rollout.model_copy(update={"prompts_per_call": PART})
    return config.model_copy(update={"curriculum": curriculum, "rollout": rollout})


def test_the_disagreement_is_the_sum_along_one_rollout_and_the_teacher_answers_for_trpv_alone(config):
    run = make_run(with_reverse_kl(config), teacher := Teacher((2.0, 5.0)), student := Student((2.0, 3.5)))
    asyncio.run(start_round(run))
    records = run.curriculum.scheduler.records().to_pylist()
    assert [r["disagreement"] for r in records] == [2.0 * tokens for tokens in range(1, 11)]
    assert [(r["teacher_iou"], r["student_iou"]) for r in records] == [(1.0, [0.5])] * 10
    assert [r["prompt_id"] for r in records if r["selected"]] == ["p6", "p7", "p8", "p9"], "the largest"
    assert not student.sampling and teacher.sampling == {(4, 1.0)}
    assert (run.totals["scored_rollouts"], run.totals["scored_tokens"]) == (10, sum(range(1, 11)))
    without = make_run(with_reverse_kl(config, trpv=False), other := Teacher(), Student((2.0, 5.0)), "other")
    asyncio.run(start_round(without))
    assert not other.asked, "it scores, and gives no answers"
    assert [r["disagreement"] for r in without.curriculum.scheduler.records().to_pylist()] == [
        2.0 * tokens for tokens in range(1, 11)
    ]


def test_an_interrupted_pass_of_rollouts_goes_on_and_a_checkpoint_in_the_round_keeps_its_divergence(
    config, written
):
    config = with_reverse_kl(config)
    first = make_run(config, Teacher((2.0, 5.0)), student := Student((2.0, 3.5), num_calls=1))
    interrupted(first, student)
    assert len(list(student_parts(first.folder, 0).iterdir())) == 1 and not written
    resumed = make_run(config, Teacher((2.0, 5.0)), rest := Student((2.0, 3.5)))
    asyncio.run(start_round(resumed))
    assert sorted(student.asked + rest.asked) == sorted(p.prompt_id for p in POOL) and len(rest.asked) < 10
    whole = make_run(config, Teacher((2.0, 5.0)), Student((2.0, 3.5)), "whole")
    asyncio.run(start_round(whole))
    assert resumed.curriculum.scheduler.records() == whole.curriculum.scheduler.records()
    again = Scheduler(POOL, config)
    again.load_state_dict(written[-1])
    assert again.records() == whole.curriculum.scheduler.records()
    again.retire([FailedPrompt(prompt_id="p9", reason="gone")])
    selected = again.records()["selected"].to_pylist()
    assert selected[5:] == [True] * 5 and not any(selected[:5]), "the next largest takes its place"


@pytest.mark.parametrize("change", ["temperature", "teacher", "iou"])
def test_scored_rollouts_of_other_models_are_not_used(config, change, tmp_path):
    config = with_reverse_kl(config, trpv=False)
    interrupted(make_run(config, Teacher(), student := Student((2.0, 5.0), num_calls=1)), student)
    if change == "temperature":
        rollout = config.rollout.model_copy(update={"temperature": 0.5})
        config = config.model_copy(update={"rollout": rollout})
    if change == "teacher":
        (tmp_path / "teacher" / "config.json").write_text("another")
    if change == "iou":
        config = with_reverse_kl(config, disagreement="iou")
    run = make_run(config, Teacher((2.0, 5.0)), asked := Student((2.0, 5.0)))
    asyncio.run(start_round(run))
    assert sorted(asked.asked) == sorted(p.prompt_id for p in POOL)


def test_prompts_that_neither_can_read_are_dropped(config):
    config = with_reverse_kl(config, trpv=False)
    run = make_run(config, Teacher(broken=["p2"]), Student((2.0, 5.0), broken=["p1"]))
    asyncio.run(start_round(run))
    records = run.curriculum.scheduler.records().to_pylist()
    assert {r["prompt_id"]: r["dropped"] for r in records if r["dropped"]} == {"p1": "broken", "p2": "unread"}
    assert [r["disagreement"] for r in records[1:3]] == [None, None]
    assert run.totals["scored_rollouts"] == 9, "the actor could not read the other"


def test_difficulty_asks_the_student_once_and_resumes_in_its_pass(config, written):
    curriculum = config.curriculum.model_copy(update={"kind": "difficulty"})
    config = config.model_copy(update={"curriculum": curriculum})
    first = make_run(config, teacher := good(), student := bad(num_calls=1))
    interrupted(first, student)
    resumed = make_run(config, good(), rest := bad())
    asyncio.run(start_round(resumed))
    assert not teacher.asked and len(student.asked) == 4 and len(rest.asked) == 6
    records = resumed.curriculum.scheduler.records().to_pylist()
    assert sum(r["selected"] for r in records) == 4 and [r["student_iou"] for r in records] == [[0.0]] * 10
    assert resumed.next_selection is None, "once for the run"
    whole = make_run(config, good(), bad(), "whole")
    asyncio.run(start_round(whole))
    assert whole.curriculum.scheduler.records() == resumed.curriculum.scheduler.records()
