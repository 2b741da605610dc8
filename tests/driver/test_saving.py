"""Saves that fail, and runs that end before their first one."""

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import driver.checkpoints
from curriculum.state import settings_of
from driver.checkpoints import remove_rounds_after, save_at_end, save_if_due, start_over
from driver.command_line import saved_run_to_resume
from driver.held_out import miou_by_step
from driver.records.sinks import MetricSinks, TrajectoryLog, read_metrics
from driver.run import Run
from driver.saving import try_to_save
from tests.driver.test_checkpoint import CURRICULUM, RECORDS, SHAPES, write_checkpoint
from tests.fakes import make_group, make_prompt
from video_opd.config_file import load_demo
from video_opd.datasets.prompts import Split
from video_opd.errors import CheckpointError, DeadlineError, LearnerLostError, SaveError
from video_opd.files.checkpoint import MANIFEST, check_whole, checkpoint_folder, checkpoint_steps
from video_opd.types import StepReport

FULL = OSError(28, "No space left on device")
LATE = SaveError("the learner's save did not end within 1 s")
LATE.__cause__ = DeadlineError("late")


class Learner:
    """Writes a file, then fails with the next of `errors`; None: it does not fail."""

    def __init__(self, *errors: Exception | None):
        self._errors = list(errors)

    async def earlier_saves(self) -> None:
        pass

    async def save(self, folder: Path) -> None:
        await self.export(folder / "student")

    async def export(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
        if self._errors and (error := self._errors.pop(0)):
            raise error


CONFIG = load_demo(["checkpoint_every=1", "eval_every=0"])
PLAN: Any = SimpleNamespace(
    student=SimpleNamespace(shapes=SHAPES),
    eval=Split([], "k"),
    train=Split([make_prompt(name) for name in RECORDS["prompt_id"].to_pylist()], ""),
)


def make_run(folder: Path, *errors: Exception | None, step: int = 3) -> Run:
    async def state_dict() -> dict:
        return CURRICULUM | {"settings": settings_of(CONFIG)}

    parts: Any = {name: None for name in ("control", "actors", "teacher")}
    parts |= {
        "learner": Learner(*errors),
        "curriculum": SimpleNamespace(state_dict=state_dict),
        "rewards": [],
    }
    run = Run(folder=folder, config=CONFIG, given=CONFIG, plan=PLAN, **parts)
    run.progress.step = step
    return run


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [FULL, SaveError("[Errno 13] Permission denied")])
def test_a_save_that_fails_is_said_and_counted_and_leaves_nothing(tmp_path, caplog, error):
    run = make_run(tmp_path, None, error, None)
    asyncio.run(save_if_due(run))
    run.progress.step = 4
    with caplog.at_level(logging.WARNING):
        asyncio.run(save_if_due(run))
    (warning,) = caplog.messages
    assert warning == f"warning: the checkpoint of step 4 was not written: {error}"
    assert run.totals["failed_saves"] == 1 and run.newest_checkpoint == 3
    assert left_in(tmp_path / "checkpoints") == ["step-3"]
    run.progress.step = 5
    asyncio.run(save_if_due(run))
    assert run.newest_checkpoint == 5 and check_whole(checkpoint_folder(tmp_path, 5))


def test_what_a_late_rank_may_still_write_is_removed_by_the_next_save(tmp_path):
    run = make_run(tmp_path, LATE)
    asyncio.run(save_if_due(run))
    assert left_in(tmp_path / "checkpoints") == [".step-3.tmp"] and not checkpoint_steps(tmp_path)
    run.progress.step = 4
    asyncio.run(save_if_due(run))
    assert left_in(tmp_path / "checkpoints") == ["step-4"] and run.totals["failed_saves"] == 1


def test_a_learner_that_is_lost_in_a_save_is_lost(tmp_path):
    with pytest.raises(LearnerLostError):
        asyncio.run(save_if_due(make_run(tmp_path, LearnerLostError("it died"))))


def test_the_last_save_that_fails_is_kept_for_the_end_of_the_run(tmp_path):
    run = make_run(tmp_path, FULL, FULL)
    asyncio.run(save_at_end(run))
    assert run.not_saved == [
        f"the {what} of step 3 was not written: {FULL}" for what in ("checkpoint", "student")
    ]
    assert not checkpoint_steps(tmp_path) and left_in(tmp_path) == ["checkpoints"]
    run = make_run(tmp_path)
    asyncio.run(save_at_end(run))
    assert run.not_saved == [] and left_in(tmp_path) == ["checkpoints", "student"]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_make_the_new_one_a_failure(
    tmp_path, monkeypatch, caplog
):
    def retain(*_: Any) -> None:
        raise OSError(39, "Directory not empty", ".step-1.tmp")

    monkeypatch.setattr(driver.checkpoints.on_disk, "retain", retain)
    run = make_run(tmp_path)
    asyncio.run(save_if_due(run))
    assert run.newest_checkpoint == 3 and check_whole(checkpoint_folder(tmp_path, 3))
    assert not run.totals["failed_saves"]
    (warning,) = caplog.messages
    assert "no longer kept was not removed" in warning and ".step-1.tmp" in warning


def test_a_run_that_starts_over_forgets_what_the_lost_student_reached(tmp_path):
    async def nothing() -> None: ...

    run = make_run(tmp_path)
    run.curriculum = SimpleNamespace(start_over=nothing, next_selection=nothing)  # pyright: ignore
    for name in ("teacher", "student_before", "step_2", "student_after", "no_video"):
        run.evaluations[name], run.progress.examples[name] = {"miou": 0.5}, []
    run.progress.baseline = 0.5
    asyncio.run(start_over(run))
    assert run.progress.baseline is None
    assert [*run.evaluations] == [*run.progress.examples] == ["teacher", "student_before"]
    assert run.step == 0 and miou_by_step(run) == {}


def test_an_error_that_is_none_of_saving_ends_the_run(tmp_path):
    async def save(_: Run) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(try_to_save(make_run(tmp_path), save, "checkpoint"))


# --- a run that ended before its first checkpoint ---


def test_a_run_without_a_checkpoint_begins_anew_and_one_with_a_damaged_one_does_not(tmp_path):
    (tmp_path / "checkpoints" / ".step-2.tmp").mkdir(parents=True)
    assert saved_run_to_resume(tmp_path, CONFIG, PLAN, None) is None
    assert left_in(tmp_path / "checkpoints") == []
    with pytest.raises(CheckpointError, match="no checkpoint of step 2: it has none"):
        saved_run_to_resume(tmp_path, CONFIG, PLAN, 2)
    (write_checkpoint(tmp_path, 2) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        saved_run_to_resume(tmp_path, CONFIG, PLAN, None)


def test_what_an_attempt_without_a_checkpoint_recorded_is_not_there_twice(tmp_path):
    curriculum = tmp_path / "curriculum"
    curriculum.mkdir()
    for name in ("round-1.parquet", "records.parquet", "teacher_answers.parquet"):
        (curriculum / name).touch()
    for _ in range(2):
        sinks, log = MetricSinks(tmp_path, 0), TrajectoryLog(tmp_path / "trajectories", 0)
        for step in range(2):
            sinks.write(StepReport(step=step, policy_version=step + 1, metrics={"loss": 1.0}), 0.0)
            log.write([make_group(f"p{step}")], step)
        sinks.close()
        log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
    assert left_in(tmp_path / "trajectories") == ["from-step-000000.arrows"]
    remove_rounds_after(make_run(tmp_path), 0)
    assert left_in(curriculum) == ["teacher_answers.parquet"], "what the teacher said is kept"
