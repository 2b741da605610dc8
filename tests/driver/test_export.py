"""`student/` of a run: which student it is, and that it is one whole folder at any time."""

import asyncio
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.checkpoints import remove_rounds_after, save_if_due, set_aside_after
from driver.export import export_student, exported_step, snapshot_steps
from driver.held_out import best_step
from driver.run_state import RunState
from tests.driver.test_checkpoint import write_checkpoint
from video_opd.files.checkpoint import checkpoint_folder


class Learner:
    """Writes a student folder whose weights name the step."""

    def __init__(self):
        self.step = 0

    async def earlier_saves(self) -> None:
        pass

    async def export(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text(f"learner at {self.step}")


def make_run(
    folder: Path, step: int, miou: dict[int, float], eval_every: int = 1, snapshot_every: int = 0
) -> Any:
    learner = Learner()
    learner.step = step
    config = SimpleNamespace(
        eval_every=eval_every, checkpoint_every=0, snapshot_every=snapshot_every, snapshot_keep_last=2
    )
    evaluations = {f"step_{n}": {"miou": value} for n, value in miou.items()} | {
        "student_before": {"miou": 0.99}
    }
    return SimpleNamespace(
        folder=folder,
        step=step,
        config=config,
        evaluations=evaluations,
        learner=learner,
        state=RunState(),
    )


def exported(run: Any) -> tuple[str, dict]:
    folder = run.folder / "student"
    return (folder / "model.safetensors").read_text(), json.loads((folder / "export.json").read_text())


def test_the_earliest_of_the_best_is_the_best():
    assert best_step({3: 0.5, 1: 0.4, 2: 0.5}) == 2
    assert best_step({}) is None


def test_every_new_best_is_exported_and_nothing_else(tmp_path):
    seen = []
    miou = {}
    for step, value in enumerate((0.2, 0.1, 0.3, 0.3), start=1):
        miou[step] = value
        run = make_run(tmp_path, step, dict(miou))
        asyncio.run(save_if_due(run))
        seen.append(exported(run))
    first, third = ("learner at 1", {"step": 1, "miou": 0.2}), ("learner at 3", {"step": 3, "miou": 0.3})
    assert seen == [first, first, third, third]
    asyncio.run(export_student(run))  # as at the end of the run
    assert exported(run) == third


def test_without_evaluations_it_is_the_last(tmp_path):
    run = make_run(tmp_path, 7, {}, eval_every=0)
    asyncio.run(save_if_due(run))
    assert exported_step(tmp_path) is None
    run.evaluations["step_3"] = {"miou": 0.5}  # of an earlier end of the run
    run.evaluations["student_after"] = {"miou": 0.25}
    asyncio.run(export_student(run))
    assert exported(run) == ("learner at 7", {"step": 7, "miou": 0.25})


def test_weights_are_the_checkpoints_own_and_small_files_are_copies(tmp_path):
    folder = write_checkpoint(tmp_path, 2)
    temporary = folder / "student" / "config.json"
    temporary.write_text("{}")
    run = make_run(tmp_path, 2, {2: 0.5})
    asyncio.run(export_student(run))
    assert os.path.samefile(
        tmp_path / "student" / "model.safetensors", folder / "student" / "model.safetensors"
    )
    (tmp_path / "student" / "config.json").write_text('{"edited": 1}')
    assert temporary.read_text() == "{}"
    shutil.rmtree(folder)
    assert exported(run)[1] == {"step": 2, "miou": 0.5}, "it outlives the checkpoint"


def test_where_links_are_not_to_be_had_weights_are_copied(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, 2)

    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    asyncio.run(export_student(make_run(tmp_path, 2, {2: 0.5})))
    assert (tmp_path / "student" / "model.safetensors").read_text() == (
        folder / "student" / "model.safetensors"
    ).read_text()


def test_a_best_step_is_taken_from_its_checkpoint_where_its_export_is_gone(tmp_path):
    write_checkpoint(tmp_path, 2, "weights of 2")
    run = make_run(tmp_path, 5, {2: 0.5, 5: 0.1})
    asyncio.run(export_student(run))
    assert exported(run) == ("weights of 2", {"step": 2, "miou": 0.5})
    shutil.rmtree(tmp_path / "student")
    shutil.rmtree(checkpoint_folder(tmp_path, 2))
    asyncio.run(export_student(run))
    assert exported(run) == ("learner at 5", {"step": 5, "miou": 0.1})


@pytest.mark.parametrize(("step", "stays"), [(4, False), (2, True)])
def test_a_student_of_a_later_step_is_set_aside(tmp_path, step, stays):
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4)
    run = make_run(tmp_path, step, {step: 0.5})
    asyncio.run(export_student(run))
    folder = set_aside_after(tmp_path, 2)
    assert folder and (exported_step(tmp_path) == step) == stays and (exported_step(folder) == step) != stays


def snapshot(folder: Path, step: int) -> Path:
    """The folder of the snapshot that the run writes at that step."""
    asyncio.run(save_if_due(make_run(folder, step, {}, eval_every=0, snapshot_every=2)))
    return folder / "snapshots" / f"step-{step}"


def test_snapshots_are_whole_students_and_the_newest_ones_stay(tmp_path):
    for step in range(1, 8):
        snapshot(tmp_path, step)
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["step-4", "step-6"]
    folder = tmp_path / "snapshots" / "step-6"
    assert (folder / "model.safetensors").read_text() == "learner at 6"
    assert json.loads((folder / "export.json").read_text()) == {"step": 6, "miou": None}


def test_a_snapshot_beside_a_checkpoint_takes_no_room_and_outlives_it(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 2, "weights of 2")
    weights = snapshot(tmp_path, 2) / "model.safetensors"
    assert os.path.samefile(weights, checkpoint / "student" / "model.safetensors")
    shutil.rmtree(checkpoint)
    assert weights.read_text() == "weights of 2"
    asyncio.run(export_student(make_run(tmp_path, 4, {2: 0.5, 4: 0.1})))
    assert exported(make_run(tmp_path, 4, {})) == ("weights of 2", {"step": 2, "miou": 0.5})


def test_a_snapshot_that_cannot_be_written_leaves_nothing_and_the_run_goes_on(tmp_path):
    run = make_run(tmp_path, 2, {}, eval_every=0, snapshot_every=2)
    run.totals, write = Counter(), run.learner.export

    async def export(folder: Path) -> None:
        await write(folder)
        raise OSError(28, "No space left on device")

    run.learner.export = export
    asyncio.run(save_if_due(run))
    assert run.totals["failed_saves"] == 1 and not os.listdir(tmp_path / "snapshots")


def test_a_run_that_goes_back_writes_later_snapshots_again(tmp_path):
    (tmp_path / "snapshots" / ".step-4.tmp").mkdir(parents=True)
    for step in (2, 4):
        snapshot(tmp_path, step)
    run = make_run(tmp_path, 3, {})
    remove_rounds_after(run, 0)
    assert os.listdir(tmp_path / "snapshots") == ["step-2"]


def test_later_snapshots_are_set_aside_with_later_checkpoints(tmp_path):
    for step in (2, 4):
        write_checkpoint(tmp_path, step)
        snapshot(tmp_path, step)
    folder = set_aside_after(tmp_path, 2)
    assert folder and snapshot_steps(folder) == [4] and snapshot_steps(tmp_path) == [2]
