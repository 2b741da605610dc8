"""Which evaluations a run makes, and under which names."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.held_out import evaluate_end, evaluate_start
from driver.progress import Progress
from driver.records.report import COLUMNS, print_summary
from driver.run import Run
from tests.fakes import make_prompt
from video_opd.config_data import PromptConfig, VideoConfig
from video_opd.datasets.prompts import Split
from video_opd.types import Prediction

PROMPTS = [make_prompt(name) for name in ("a", "b")]


class Answering:
    """Actors or a teacher: every answer is the truth. Counts how often it was asked."""

    def __init__(self, num_wanted: int = 1):
        self.num_wanted, self.asked = num_wanted, []

    async def predict(
        self, prompts: list, num_answers=1, temperature=0.0, blank_video=False, arrived: Any = None
    ) -> list:
        assert (num_answers, temperature) == (1, 0.0), "evaluation is greedy"
        self.asked.append(blank_video)
        return [[Prediction(prompt_id=p.prompt_id, text="", spans_s=p.answer_spans_s[:1])] for p in prompts]


def make_run(step: int, num_actors: int = 1, evaluated: tuple[str, ...] = ()) -> Any:
    parts: Any = {name: None for name in ("learner", "curriculum", "control")}
    parts |= {"plan": SimpleNamespace(eval=Split(list(PROMPTS), "")), "rewards": [], "published": step}
    parts |= {"actors": Answering(num_actors), "teacher": Answering()}
    config: Any = SimpleNamespace(max_scored_tokens=None, prompt=PromptConfig())
    run = Run(folder=None, config=config, given=config, progress=Progress(step=step), **parts)  # pyright: ignore
    for name in evaluated:
        run.evaluations[name], run.progress.examples[name] = {"miou": 0.25}, [name]  # pyright: ignore
    return run


@pytest.mark.parametrize(
    ("step", "num_actors", "evaluated", "now"),
    [
        (0, 1, (), {"teacher", "student_before"}),
        (0, 0, (), {"teacher"}),
        (0, 1, ("teacher", "student_before"), set()),
        (4, 1, ("teacher",), set()),  # it began without actors: the student of step 4 is not that of before
        (4, 0, (), {"teacher"}),
    ],
)
def test_the_start_is_evaluated_once_and_only_at_the_start(step, num_actors, evaluated, now):
    run = make_run(step, num_actors, evaluated)
    asyncio.run(evaluate_start(run))
    assert set(run.evaluations) == {*evaluated, *now}
    assert len(run.teacher.asked) == ("teacher" in now) and len(run.actors.asked) == ("student_before" in now)


def test_the_end_is_what_the_last_step_was_evaluated_as():
    run = make_run(4, evaluated=("step_2", "step_4"))
    asyncio.run(evaluate_end(run))
    assert run.actors.asked == [True], "without video alone"
    assert run.evaluations["student_after"] == {"miou": 0.25} == run.evaluations["step_4"]
    assert run.progress.examples["student_after"] == ["step_4"]


def test_the_end_is_evaluated_where_the_last_step_was_not():
    run = make_run(5, evaluated=("step_4",))
    asyncio.run(evaluate_end(run))
    assert run.actors.asked == [False, True] and run.evaluations["student_after"]["miou"] == 1.0


@pytest.mark.parametrize(("before", "said"), [(0.25, "mIoU +0.500"), (None, "mIoU 0.750")])
def test_a_run_that_has_no_student_before_says_what_the_trained_one_reaches(capsys, before, said):
    def scores(miou: float) -> dict:
        return dict.fromkeys(COLUMNS, miou) | {"unparsed": 0, "n": 8}

    summary = {"teacher": None, "student_before": before and scores(before), "student_after": scores(0.75)}
    summary |= {"baselines": {name: scores(0.1) for name in ("no_video", "best_constant", "random")}}
    summary |= {
        "steps": 4,
        "seed": 0,
        "loss": "sft",
        "seconds": {"total": 60.0},
        "dropped": {},
        "tokens": {},
        "video": VideoConfig().budget,
        "odd_truth": {},
    }
    print_summary(Path("runs/name"), summary)
    assert f"{said}, after 4 steps in 1.0 min" in capsys.readouterr().out
