"""Which answers to the held-out split stay: before and after, of the last step and of the best one."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq

from driver.held_out import AFTER, BEFORE, NO_VIDEO, TEACHER, at_step, evaluate_student, evaluate_teacher
from driver.progress import Progress, write_progress
from driver.run import Run
from tests.driver.test_checkpoint import CURRICULUM, SETUP, read_progress
from tests.fakes import make_prompt
from video_opd.config_data import PromptConfig
from video_opd.datasets.prompts import Split
from video_opd.types import FailedPrompt, Prediction, Prompt

POOL: list[Prompt | FailedPrompt] = [make_prompt(f"e{i}") for i in range(10)]


class Actors:
    """Answers as many prompts right as it is told."""

    num_wanted, num_right = 1, 0

    async def predict(self, prompts: Any, *_: Any, **__: Any) -> list[list[Prediction]]:
        spans = [((2.0, 5.0),) if i < self.num_right else () for i in range(len(prompts))]
        pairs = zip(prompts, spans, strict=True)
        return [[Prediction(prompt_id=p.prompt_id, text=str(s), spans_s=s)] for p, s in pairs]


def make_run(actors: Actors, progress: Progress) -> Any:
    parts: Any = {n: None for n in ("folder", "given", "control", "learner", "curriculum")}
    config: Any = SimpleNamespace(prompt=PromptConfig())
    parts |= {"plan": SimpleNamespace(eval=Split(POOL, ""), train=[]), "config": config, "rewards": []}
    return Run(actors=actors, teacher=Actors(), progress=progress, **parts)  # type: ignore[arg-type]


def evaluate(run: Any, step: int, num_right: int, name: str | None = None) -> None:
    run.progress.step = run.published = step
    run.actors.num_right = num_right
    asyncio.run(evaluate_student(run, name or at_step(step)))


def test_of_many_evaluations_the_answers_of_the_last_and_the_best_stay_and_all_scores(tmp_path):
    run = make_run(Actors(), Progress())
    asyncio.run(evaluate_teacher(run))
    evaluate(run, 0, 1, BEFORE)
    kept = []
    for step, num_right in ((2, 3), (4, 7), (6, 5), (8, 7), (10, 6)):
        evaluate(run, step, num_right)
        kept.append([n for n in run.progress.examples if n.startswith("step_")])
    assert kept == [
        ["step_2"],
        ["step_4"],
        ["step_4", "step_6"],
        ["step_4", "step_8"],
        ["step_4", "step_10"],
    ], "of equal ones the earlier is the best, as for the exported student"
    evaluate(run, 12, 2, AFTER)
    evaluate(run, 12, 0, NO_VIDEO)
    assert {*run.progress.examples} - {NO_VIDEO} == {TEACHER, BEFORE, "step_4", "step_10", AFTER}
    assert len(run.evaluations) == 5 + 4 and run.evaluations["step_6"]["miou"] == 0.5

    write_progress(tmp_path, run.progress, CURRICULUM, SETUP)
    rows = pq.read_metadata(tmp_path / "predictions.parquet").num_rows
    assert rows == len(run.progress.examples) * len(POOL), "what a checkpoint writes does not grow"
    assert read_progress(tmp_path, SETUP).progress == run.progress


def test_a_checkpoint_with_the_answers_of_all_steps_is_read_and_goes_on_with_fewer(tmp_path):
    evaluations = {at_step(n): {"miou": n / 10} for n in (1, 3, 2)}
    answers = {name: [Prediction(prompt_id="e0", text="", spans_s=())] for name in evaluations}
    old = Progress(step=3, evaluations=evaluations, examples=answers)
    write_progress(tmp_path, old, CURRICULUM, SETUP)
    run = make_run(Actors(), read_progress(tmp_path, SETUP).progress)
    assert run.progress == old
    evaluate(run, 4, 1)
    assert [*run.progress.examples] == ["step_3", "step_4"] and len(run.evaluations) == 4
