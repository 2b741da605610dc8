"""Checkpoints: whole or not at all, and what is said of those that are not."""

import asyncio
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import video_opd.files.checkpoint
import video_opd.files.durable
from curriculum.answers import student_parts
from curriculum.state import settings_of
from driver.checkpoints import restore, set_aside_after
from driver.held_out import miou_by_step
from driver.progress import (
    Progress,
    SavedRun,
    find_saved_run,
    learner_settings,
    read_progress,
    setup_of,
    write_progress,
)
from driver.run import Run
from driver.run_state import Phase
from video_opd.config_file import load_demo
from video_opd.config_learner import LearnerConfig
from video_opd.content import file_digest
from video_opd.datasets import Split
from video_opd.errors import CheckpointError, PartialCheckpointError
from video_opd.files.checkpoint import (
    FORMAT,
    MANIFEST,
    begin_checkpoint,
    check_whole,
    checkpoint_folder,
    checkpoint_steps,
    find_checkpoint,
    finish_checkpoint,
)
from video_opd.schemas import RECORDS as RECORDS_SCHEMA
from video_opd.types import Prediction

SHAPES = {"model_type": "qwen3_vl", "text.hidden_size": 8, "vision.depth": 1}
LEARNER = learner_settings(LearnerConfig(world_size=2, zero_stage=2))
SETUP = {"shapes": SHAPES, "learner": LEARNER, "eval_key": "the split", "student": None}
RECORDS = pa.Table.from_pylist(
    [
        {
            "prompt_id": "a",
            "teacher_iou": 0.1 + 0.2,
            "student_iou": [None, 0.5],
            "num_rollouts": 3,
            "last_step": -1,
            "selected": True,
        },
        {
            "prompt_id": "ä:2",
            "student_iou": [0.0, 1.0],
            "disagreement": -0.25,
            "num_rollouts": 0,
            "last_step": 7,
            "dropped": "broken",
        },
    ],
    schema=RECORDS_SCHEMA,
)


CURRICULUM = {
    "records": RECORDS,
    "round_end": 12,
    "settings": {"kind": "uniform"},
    "queue": ["a", "ä:2"],
    "in_flight": [3, 1],
    "random_state": np.random.default_rng(5).bit_generator.state,
}


def progress_at(step: int) -> Progress:
    return Progress(
        step=step,
        baseline=0.1 + 0.2,
        totals=Counter(rollouts=7),
        evaluations={"teacher": {"miou": 0.75, "n": 2}, "student_before": {"miou": 0.25, "n": 2}},
        examples={
            "teacher": [Prediction(prompt_id="e", text="From 1 to 2", spans_s=((1.0, 2.0),))],
            "student_before": [Prediction(prompt_id="e", text="ä", spans_s=())],
        },
        failed_eval={"f": "broken"},
    )


def write_checkpoint(run_dir: Path, step: int, weights: str = "weights" * 9) -> Path:
    temporary = begin_checkpoint(run_dir, step)
    (temporary / "student").mkdir()
    (temporary / "student" / "model.safetensors").write_text(weights)
    write_progress(temporary, progress_at(step), CURRICULUM, SETUP)
    return finish_checkpoint(temporary, run_dir, step)


def read_all(folder: Path, **changes: Any) -> SavedRun:
    return read_progress(check_whole(folder), SETUP | changes)


def read(folder: Path, **changes: Any) -> Progress:
    return read_all(folder, **changes).progress


def one_line(error: BaseException, *named: str) -> None:
    assert isinstance(error, CheckpointError) and "\n" not in str(error)
    for name in named:
        assert name in str(error)


# --- what is read back, and what is refused ---


def test_where_a_run_stood_is_read_back_whole(tmp_path):
    saved = read_all(write_checkpoint(tmp_path, 12))
    assert saved.progress == progress_at(12) and saved.curriculum == CURRICULUM
    generator = np.random.default_rng(0)
    generator.bit_generator.state = saved.curriculum["random_state"]
    assert generator.random() == np.random.default_rng(5).random()


@pytest.mark.parametrize(
    "change", [{"text.hidden_size": 16}, {"model_type": "other"}, {"text.vocab_size": 6}]
)
def test_another_model_is_refused_with_what_differs(tmp_path, change):
    folder = write_checkpoint(tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        read(folder, shapes=SHAPES | change)
    ((key, value),) = change.items()
    one_line(caught.value, str(folder), "another model", f"{key} {SHAPES.get(key)} / {value}")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_rank": 4}, "lora_rank 0 / 4"),
        ({"freeze_vision": False}, "freeze_vision True / False"),
        ({"zero_stage": 3}, "zero_files 1 or 2 / 3"),
        ({"dtype": "float32"}, "dtype bfloat16 / float32"),
    ],
)
def test_another_learner_is_refused_with_what_differs(tmp_path, changes, named):
    learner = learner_settings(LearnerConfig(**{"world_size": 2, "zero_stage": 2} | changes))
    with pytest.raises(CheckpointError) as caught:
        read(write_checkpoint(tmp_path, 1), learner=learner)
    one_line(caught.value, "another learner config", named)


def test_another_world_size_and_a_stage_that_writes_the_same_are_no_other_learner(tmp_path):
    learner = learner_settings(LearnerConfig(world_size=8, zero_stage=1))
    assert read_all(write_checkpoint(tmp_path, 1), learner=learner).world_size == 2


def test_adapters_of_another_student_are_refused(tmp_path):
    """Actors add the checkpoint's adapters to the folder's weights."""
    folder = write_checkpoint(tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        read(folder, student="digest")
    one_line(caught.value, str(folder), "adapters of another student")


def test_another_held_out_split_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read(write_checkpoint(tmp_path, 1), eval_key="another")
    one_line(caught.value, "data.eval")


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) + "\n")


def test_a_newer_version_is_named_whatever_else_it_changed(tmp_path):
    folder = write_checkpoint(tmp_path, 1)
    change_manifest(folder, format=FORMAT + 2, files="elsewhere")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path)
    one_line(
        caught.value, f"newer version: format {FORMAT + 2}, this one reads up to {FORMAT}: update video-opd"
    )
    assert not isinstance(caught.value, PartialCheckpointError)


# --- partial and damaged ---


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole"), 3)


NAMES = ["curriculum.parquet", MANIFEST, "predictions.parquet", "state.json", "student/model.safetensors"]


def test_the_manifest_covers_every_file(whole):
    assert files_of(whole) == NAMES
    assert sorted(json.loads((whole / MANIFEST).read_text())["files"]) == [n for n in NAMES if n != MANIFEST]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), where=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_is_a_partial_checkpoint(whole, tmp_path, name, where):
    folder = tmp_path / "step-3"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    size = (folder / name).stat().st_size
    os.truncate(folder / name, int(size * where))
    with pytest.raises(PartialCheckpointError) as caught:
        read(folder)
    one_line(caught.value, str(folder), "partial", name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), where=st.floats(0, 1, exclude_max=True))
def test_a_byte_changed_anywhere_is_never_read_as_whole(whole, tmp_path, name, where):
    folder = tmp_path / "step-3"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    content = bytearray((folder / name).read_bytes())
    content[int(len(content) * where)] ^= 0x10
    (folder / name).write_bytes(content)
    said = ""
    try:
        assert read(folder) == progress_at(
            3
        )  # white space of the manifest, or a file that it no longer names
    except CheckpointError as error:
        said = str(error)
    assert (name == MANIFEST or said) and "\n" not in said


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(whole, tmp_path, name):
    shutil.copytree(whole, tmp_path / "step-3")
    (tmp_path / "step-3" / name).unlink()
    with pytest.raises(PartialCheckpointError) as caught:
        read(tmp_path / "step-3")
    one_line(caught.value, name)


def test_a_longer_file_is_damage(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "step-3")
    with (tmp_path / "step-3" / "state.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "step-3")
    one_line(caught.value, "damaged", "state.json", "--step")


def test_a_state_that_is_not_one_is_damage(tmp_path):
    temporary = begin_checkpoint(tmp_path, 4)
    write_progress(temporary, progress_at(4), CURRICULUM, SETUP)
    (temporary / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        read(finish_checkpoint(temporary, tmp_path, 4))
    one_line(caught.value, "damaged", "state cannot be read")


def test_evaluations_are_by_step_the_last_of_the_run_included():
    evaluations = {
        "teacher": {"miou": 0.9},
        "student_before": {"miou": 0.1},
        "step_2": {"miou": 0.2},
        "step_10": {"miou": 0.3},
    }
    run: Any = SimpleNamespace(step=12, evaluations=evaluations)
    assert miou_by_step(run) == {2: 0.2, 10: 0.3}
    run.evaluations["student_after"] = {"miou": 0.4}
    assert miou_by_step(run) == {2: 0.2, 10: 0.3, 12: 0.4}


# --- going on from an earlier one ---


def test_what_is_later_is_set_aside_with_copies_of_what_will_be_cut_back(tmp_path):
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    (checkpoint_folder(tmp_path, 6) / "state.json").unlink()
    (tmp_path / "metrics.jsonl").write_text("lines")
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories" / "from-step-000000.arrows").write_text("rows")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").write_text("all")
    (tmp_path / "trackers.json").write_text("ids")
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "strict.json").write_text("{}")
    folder = set_aside_after(tmp_path, 2)
    assert folder and checkpoint_steps(tmp_path) == [2, 6], "the partial one is nobody's"
    assert read(folder / "checkpoints" / "step-4").step == 4
    assert (folder / "metrics.jsonl").read_text() == "lines" == (tmp_path / "metrics.jsonl").read_text()
    assert (folder / "trajectories" / "from-step-000000.arrows").read_text() == "rows"
    assert (folder / "tensorboard" / "events").read_text() == "all" and (folder / "trackers.json").exists()
    left = {p.name for p in tmp_path.iterdir()}
    assert not left & {"tensorboard", "trackers.json"}, "trackers get all steps anew: no step comes twice"
    assert not left & {"summary.json", "evaluation"}, "they are of a student that is gone"
    assert (folder / "summary.json").exists() and (folder / "evaluation" / "strict.json").exists()
    assert set_aside_after(tmp_path, 2) is None
    write_checkpoint(tmp_path, 4)
    second = set_aside_after(tmp_path, 2)
    assert second and second != folder


class Parts:
    """Stands in for a run's learner and curriculum: notes what it is asked."""

    def __init__(self):
        self.asked: list[tuple] = []

    def __getattr__(self, name: str) -> Any:
        async def ask(*arguments: Any) -> int:
            self.asked.append((name, *arguments))
            return 12

        return ask


def test_a_checkpoint_is_verified_once_by_a_resume_and_once_when_the_learner_is_lost(tmp_path, monkeypatch):
    config = load_demo([])
    prompts: Any = [SimpleNamespace(prompt_id=name) for name in RECORDS["prompt_id"].to_pylist()]
    plan: Any = SimpleNamespace(
        student=SimpleNamespace(shapes=SHAPES), eval=Split([], "key"), train=Split(prompts, "")
    )
    curriculum, setup = CURRICULUM | {"settings": settings_of(config)}, setup_of(config, plan)
    temporary, ended = begin_checkpoint(tmp_path, 12), progress_at(12)
    ended.evaluations |= {"student_after": {"miou": 0.5}, "no_video": {"miou": 0.1}}
    write_progress(temporary, ended, curriculum, setup)
    folder = finish_checkpoint(temporary, tmp_path, 12)
    digested: list[str] = []

    def digest(path: Path) -> str:
        digested.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(video_opd.files.checkpoint, "file_digest", digest)
    saved = find_saved_run(tmp_path, config, plan)
    answered = [student_parts(tmp_path, step) for step in (2, 12, 14)]  # 14: by weights that are lost
    for parts_of_step in answered:
        parts_of_step.mkdir(parents=True)
    every_file = sorted(name for name in files_of(folder) if name != MANIFEST)
    parts: Any = {"control": None, "actors": None, "teacher": None, "rewards": []}
    parts |= {"learner": Parts(), "curriculum": Parts(), "plan": plan, "config": config, "given": config}
    run = Run(folder=tmp_path, resume_from=saved, newest_checkpoint=12, **parts)
    asyncio.run(restore(run))
    assert sorted(digested) == every_file and parts["learner"].asked == [("load", folder, 1)]
    assert (run.step, run.newest_checkpoint, run.next_selection) == (12, 12, 12)
    assert run.totals == {"rollouts": 7} and run.progress.failed_eval == {"f": "broken"}
    assert run.evaluations.keys() == {"teacher", "student_before", "step_12"}, "it is not the last any more"
    assert [f for f in answered if f.exists()] == [student_parts(tmp_path, 12)], "those of its weights"
    assert (
        run.resume_from is None and run.state.phase is Phase.RUNNING and (tmp_path / "config.yaml").exists()
    )
    run.progress.step = 14
    asyncio.run(restore(run))
    assert sorted(digested) == sorted(every_file * 2) and run.step == 12
