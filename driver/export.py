"""`student/` of a run: the model it is for, one whole transformers folder at any time."""

import asyncio
import json
import os
import shutil
from pathlib import Path

from driver.held_out import miou_by_step
from driver.run import Run
from video_opd.files.checkpoint import checkpoint_folder
from video_opd.files.durable import fsync_tree, replace_folder

STUDENT, CARD = "student", "export.json"


def best_step(miou: dict[int, float]) -> int | None:
    """The earliest with the highest mIoU; None: nothing was evaluated."""
    return min(miou, key=lambda step: (-miou[step], step), default=None)


async def export_student(run: Run) -> None:
    """Makes RUN/student the best by the evaluations so far; without eval_every the student as it is now."""
    miou = miou_by_step(run)
    step = best_step(miou) if run.config.eval_every else None
    if step is None:
        step = run.step
    if step != run.step:
        if exported_step(run.folder) == step:
            return
        if not (checkpoint_folder(run.folder, step) / STUDENT).is_dir():  # resumed from a copy without them
            step = run.step
    run.saving = True
    try:
        temporary = run.folder / f".{STUDENT}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        source = checkpoint_folder(run.folder, step) / STUDENT
        if source.is_dir():
            await asyncio.to_thread(shutil.copytree, source, temporary, copy_function=link_or_copy)
        else:
            await run.learner.export(temporary)
        await asyncio.to_thread(
            _publish, temporary, run.folder / STUDENT, {"step": step, "miou": miou.get(step)}
        )
    finally:
        run.saving = False


def exported_step(run_dir: Path) -> int | None:
    """Of RUN/student; None: there is none."""
    try:
        return json.loads((run_dir / STUDENT / CARD).read_text())["step"]
    except FileNotFoundError:
        return None


def link_or_copy(source: str, target: str) -> str:
    """A second name of the same weights, where the file system has such; a copy of the small files, which people may edit."""
    try:
        if not source.endswith(".safetensors"):
            return shutil.copy2(source, target)
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _publish(temporary: Path, folder: Path, card: dict) -> None:
    (temporary / CARD).write_text(json.dumps(card) + "\n")
    fsync_tree(temporary)
    replace_folder(temporary, folder)
