"""Checkpoint folders: which one is used, how one gets to disk, which ones are kept."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import video_opd.files.durable
from tests.driver.test_checkpoint import NAMES, one_line, progress_at, read, write_checkpoint
from video_opd.errors import CheckpointError, PartialCheckpointError
from video_opd.files.checkpoint import (
    MANIFEST,
    begin_checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    find_checkpoint,
    retain,
)
from video_opd.files.durable import finish_interrupted_writes

# --- which one is used ---


def test_the_newest_is_the_highest_step_not_the_last_name(tmp_path, capsys):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    kept = tmp_path / "checkpoints" / "step-300-kept-by-hand"
    kept.mkdir()
    assert find_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 100)
    assert capsys.readouterr().out == ""


def test_a_partial_newest_gives_way_to_the_whole_one_before_it_and_it_is_said(tmp_path, capsys):
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step)
    for step in (6, 8):
        (checkpoint_folder(tmp_path, step) / "state.json").unlink()
    assert find_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 4)
    (line,) = capsys.readouterr().out.splitlines()
    assert str(checkpoint_folder(tmp_path, 8)) in line and "state.json is missing" in line
    assert line.endswith("the whole one before it, of step 4")


def test_a_damaged_newest_gives_way_only_when_another_is_asked_for(tmp_path):
    for step in (2, 4):
        write_checkpoint(tmp_path, step)
    (checkpoint_folder(tmp_path, 4) / "student" / "model.safetensors").write_text("nothing" * 9)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path)
    one_line(caught.value, "damaged", "model.safetensors", "--step")
    assert find_checkpoint(tmp_path, 2) == checkpoint_folder(tmp_path, 2)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    for step in (2, 4):
        write_checkpoint(tmp_path, step)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, 3)
    one_line(caught.value, "no checkpoint of step 3", "2, 4")


def test_a_partial_one_that_is_asked_for_is_refused(tmp_path):
    (write_checkpoint(tmp_path, 2) / "state.json").unlink()
    with pytest.raises(PartialCheckpointError):
        find_checkpoint(tmp_path, 2)


def test_no_checkpoint_is_an_error_that_names_the_run(tmp_path):
    (tmp_path / "torn" / "checkpoints" / "step-7").mkdir(parents=True)
    for run_dir in (tmp_path, tmp_path / "none", tmp_path / "torn"):
        with pytest.raises(CheckpointError) as caught:
            find_checkpoint(run_dir)
        one_line(caught.value, str(run_dir), "no whole checkpoint")


# --- how it gets to disk ---


class Failing:
    """Stands in for a call: the n-th of all that share `calls` fails, as at a power cut."""

    def __init__(self, calls: list[str], fail_at: int | None, name: str, real: Any):
        self._calls, self._fail_at, self._name, self._real = calls, fail_at, name, real

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        target = arguments[-1] if self._name == "rename" else arguments[0]
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        self._calls.append(f"{self._name} {Path(path).name}")
        if len(self._calls) - 1 == self._fail_at:
            raise KeyboardInterrupt
        return self._real(*arguments, **options)


def watch(patch: pytest.MonkeyPatch, fail_at: int | None = None, exchanges: bool = True) -> list[str]:
    """The calls that follow, in order, on their way to disk."""
    calls: list[str] = []
    patch.setattr(os, "fsync", Failing(calls, fail_at, "fsync", os.fsync))
    patch.setattr(os, "rename", Failing(calls, fail_at, "rename", os.rename))
    patch.setattr(shutil, "rmtree", Failing(calls, fail_at, "rmtree", shutil.rmtree))
    exchange = video_opd.files.durable._exchange if exchanges else lambda *_: False
    patch.setattr(video_opd.files.durable, "_exchange", Failing(calls, fail_at, "exchange", exchange))
    return calls


def test_every_file_is_durable_before_the_manifest_and_the_manifest_before_the_name(tmp_path, monkeypatch):
    calls = watch(monkeypatch)
    write_checkpoint(tmp_path, 5)
    manifest, name = calls.index(f"fsync {MANIFEST}"), calls.index("rename step-5")
    files = [calls.index(f"fsync {Path(n).name}") for n in NAMES if n != MANIFEST]
    folders = [i for i, call in enumerate(calls) if call == "fsync .step-5.tmp"]
    assert max(files) < folders[0] < manifest < folders[1] < name < calls.index("fsync checkpoints")


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_crash_at_any_moment_of_a_replacement_leaves_the_old_one_or_the_new_one(tmp_path, exchanges):
    with pytest.MonkeyPatch.context() as patch:
        write_checkpoint(tmp_path / "count", 5, "old")
        calls = watch(patch, exchanges=exchanges)
        write_checkpoint(tmp_path / "count", 5, "new")
    assert ("rename step-5" in calls) != exchanges
    seen = []
    for fail_at in range(len(calls)):
        run_dir = tmp_path / str(fail_at)
        write_checkpoint(run_dir, 5, "old")
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, fail_at, exchanges)
            with pytest.raises(KeyboardInterrupt):
                write_checkpoint(run_dir, 5, "new")
        finish_interrupted_writes(run_dir / "checkpoints")
        folder = find_checkpoint(run_dir)
        assert read(folder) == progress_at(5)
        assert [p.name for p in folder.parent.iterdir()] == ["step-5"]
        seen.append((folder / "student" / "model.safetensors").read_text())
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_a_checkpoint_that_fails_while_it_is_written_leaves_nothing_of_its_name(tmp_path):
    (begin_checkpoint(tmp_path, 5) / "weights").write_text("half")
    assert checkpoint_steps(tmp_path) == []
    write_checkpoint(tmp_path, 6)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-6"]


# --- which are kept ---


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "miou", "kept"),
    [
        (3, 1, {}, [4, 5, 6]),
        (1, 0, {1: 0.9}, [6]),
        (1, 1, {1: 0.1, 2: 0.9, 3: 0.9, 6: 0.3}, [2, 6]),
        (2, 2, {6: 0.9, 5: 0.8, 2: 0.7}, [5, 6]),
        (2, 2, {6: 0.1, 3: 0.8, 2: 0.7, 9: 1.0}, [2, 3, 5, 6]),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, keep_last, keep_best, miou, kept):
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
    retain(tmp_path, keep_last, keep_best, miou, spare=())
    assert checkpoint_steps(tmp_path) == kept
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {f"step-{s}" for s in kept}


def test_partial_ones_go_and_do_not_count_and_what_is_spared_stays(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    (checkpoint_folder(tmp_path, 3) / MANIFEST).unlink()
    retain(tmp_path, 2, 0, {}, spare=[1])
    assert checkpoint_steps(tmp_path) == [1, 2, 4]
