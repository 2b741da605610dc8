"""The student alone: `student/` of a run, and `snapshots/step-N`; whole transformers folders at any time."""

import asyncio
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from driver.held_out import best_step, miou_by_step
from driver.run import Run
from driver.saving import removed_if_unfinished
from video_opd.files.checkpoint import checkpoint_folder, steps_in
from video_opd.files.durable import finish_interrupted_writes, fsync_tree, remove_folder, replace_folder

STUDENT, SNAPSHOTS, CARD = "student", "snapshots", "export.json"


async def export_student(run: Run) -> None:
    """Makes RUN/student the best student so far; without eval_every the current one.

    Raises OSError, SaveError when it cannot be written.
    """
    best = best_step(miou_by_step(run)) if run.config.eval_every else None
    step = run.step if best is None else best
    if step != run.step and exported_step(run.folder) == step:
        return
    if not _written(run.folder, step):  # resumed from a copy without it
        step = run.step
    await _export(run, step, run.folder / STUDENT)


async def export_snapshot(run: Run) -> None:
    """Writes the current student to RUN/snapshots/step-N; removes all but the newest snapshot_keep_last.

    Raises OSError, SaveError when it cannot be written.
    """
    folder = run.folder / SNAPSHOTS / f"step-{run.step}"
    folder.parent.mkdir(exist_ok=True)
    finish_interrupted_writes(folder.parent)
    await _export(run, run.step, folder)
    for step in snapshot_steps(run.folder)[: -run.config.snapshot_keep_last]:
        await asyncio.to_thread(remove_folder, folder.with_name(f"step-{step}"))


def snapshot_steps(run_dir: Path) -> list[int]:
    """The steps of all snapshots of a run, in order."""
    return steps_in(folder.name for folder in (run_dir / SNAPSHOTS).glob("step-*"))


async def _export(run: Run, step: int, folder: Path) -> None:
    """Makes `folder` the student of `step`, which is the current one or was written before."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    with run.state.saving(), removed_if_unfinished(temporary):
        await run.learner.earlier_saves()
        shutil.rmtree(temporary, ignore_errors=True)
        if source := _written(run.folder, step):
            await asyncio.to_thread(shutil.copytree, source, temporary, copy_function=_link_or_copy)
        else:
            await run.learner.export(temporary)
        card = {"step": step, "miou": miou_by_step(run).get(step)}
        (temporary / CARD).write_text(json.dumps(card) + "\n")
        await asyncio.to_thread(fsync_tree, temporary)
        await asyncio.to_thread(replace_folder, temporary, folder)


def _written(run_dir: Path, step: int) -> Path | None:
    """Where that step's student is already; None: nowhere."""
    places = checkpoint_folder(run_dir, step) / STUDENT, run_dir / SNAPSHOTS / f"step-{step}"
    return next((place for place in places if place.is_dir()), None)


def exported_step(run_dir: Path) -> int | None:
    """The step of RUN/student; None: there is none."""
    with suppress(FileNotFoundError):
        return json.loads((run_dir / STUDENT / CARD).read_text())["step"]
    return None


def _link_or_copy(source: str, target: str) -> str:
    """Copies, but hard-links weights where possible: people may edit the other, small files."""
    if source.endswith(".safetensors"):
        with suppress(OSError):
            os.link(source, target)
            return target
    return shutil.copy2(source, target)
