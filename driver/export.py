"""`student/` of a run: the trained model, a whole transformers folder at any time."""

import asyncio
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from driver.held_out import best_step, miou_by_step
from driver.run import Run
from driver.saving import removed_if_unfinished
from video_opd.files.checkpoint import checkpoint_folder
from video_opd.files.durable import fsync_tree, replace_folder

STUDENT, CARD = "student", "export.json"


async def export_student(run: Run) -> None:
    """Makes RUN/student the best student so far; without eval_every the current one.

    Raises OSError, SaveError when it cannot be written.
    """
    miou = miou_by_step(run)
    best = best_step(miou) if run.config.eval_every else None
    step = run.step if best is None else best
    if step != run.step and exported_step(run.folder) == step:
        return
    if not (checkpoint_folder(run.folder, step) / STUDENT).is_dir():  # resumed from a copy without it
        step = run.step
    temporary = run.folder / f".{STUDENT}.tmp"
    with run.state.saving(), removed_if_unfinished(temporary):
        await run.learner.earlier_saves()
        shutil.rmtree(temporary, ignore_errors=True)
        source = checkpoint_folder(run.folder, step) / STUDENT
        if source.is_dir():
            await asyncio.to_thread(shutil.copytree, source, temporary, copy_function=_link_or_copy)
        else:
            await run.learner.export(temporary)
        (temporary / CARD).write_text(json.dumps({"step": step, "miou": miou.get(step)}) + "\n")
        await asyncio.to_thread(fsync_tree, temporary)
        await asyncio.to_thread(replace_folder, temporary, run.folder / STUDENT)


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
