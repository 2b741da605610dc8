"""Saving a run, restoring it, and setting aside what is later than a resumed step."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

from curriculum.answers import forget_student_answers
from driver.export import SNAPSHOTS, STUDENT, export_snapshot, export_student, exported_step, snapshot_steps
from driver.held_out import AFTER, BEFORE, NO_VIDEO, TEACHER, at_step, best_step, miou_by_step
from driver.progress import find_saved_run, setup_of, write_progress
from driver.records.tracker_kinds import TENSORBOARD
from driver.records.trackers import STATE as TRACKERS
from driver.run import Run
from driver.run_state import Phase
from driver.saving import removed_if_unfinished, try_to_save
from video_opd.files import checkpoint as on_disk
from video_opd.files.durable import remove_folder
from video_opd.files.run_folder import write_config
from video_opd.logs import log, work


async def checkpoint(run: Run) -> None:
    """Writes learner, student, curriculum and progress as one whole folder; removes old ones.

    Raises OSError, SaveError when it cannot be written. Old ones that cannot be removed are a warning.
    """
    with run.state.saving():
        await run.learner.earlier_saves()
        temporary = on_disk.begin_checkpoint(run.folder, run.step)
        with removed_if_unfinished(temporary):
            await run.learner.save(temporary)
            curriculum = await run.curriculum.state_dict()
            write_progress(temporary, run.progress, curriculum, setup_of(run.config, run.plan))
            await asyncio.to_thread(on_disk.finish_checkpoint, temporary, run.folder, run.step)
        run.newest_checkpoint = run.step
        log.debug("checkpoint of step %d written", run.step)
        kept = run.config.checkpoint_keep_last, run.config.checkpoint_keep_best
        spare = tuple(run.uploads.needed) if run.uploads else ()
        try:
            await asyncio.to_thread(on_disk.retain, run.folder, *kept, miou_by_step(run), spare)
        except OSError as error:
            log.warning("warning: a checkpoint that is no longer kept was not removed: %s", error)
        if run.uploads:
            run.uploads.start(run.step)


async def save_if_due(run: Run) -> None:
    """Writes the checkpoint and the snapshot that are due, and RUN/student if it is the best so far."""
    if run.config.checkpoint_every and run.step % run.config.checkpoint_every == 0:
        await try_to_save(run, checkpoint, "checkpoint")
    if run.config.snapshot_every and run.step % run.config.snapshot_every == 0:
        await try_to_save(run, export_snapshot, "snapshot")
    if run.config.eval_every and best_step(miou_by_step(run)) == run.step:
        await try_to_save(run, export_student, STUDENT)


async def save_at_end(run: Run) -> None:
    """Writes the last checkpoint and RUN/student; notes in run.not_saved what could not be written."""
    saves = (checkpoint, "checkpoint"), (export_student, STUDENT)
    run.not_saved = [failed for save in saves if (failed := await try_to_save(run, *save))]


async def restore(run: Run) -> None:
    """Goes back to run.resume_from or, once that is done, to the newest whole checkpoint."""
    run.state.enter(Phase.RESTORING)
    saved = run.resume_from or find_saved_run(run.folder, run.config, run.plan)
    await run.learner.load(saved.folder, saved.world_size)
    await run.curriculum.load_state_dict(saved.curriculum)
    await run.curriculum.reissue()
    run.next_selection = await run.curriculum.next_selection()
    run.progress = saved.progress
    run.newest_checkpoint = work.step = run.step
    results: list[dict[str, Any]] = [run.evaluations, run.progress.examples]
    for of in results:  # the checkpoint's final evaluation is no longer the run's final one
        of.pop(NO_VIDEO, None)
        if AFTER in of:
            of.setdefault(at_step(run.step), of.pop(AFTER))
    if run.resume_from:
        if folder := set_aside_after(run.folder, run.step):
            log.info("what followed step %d is kept in %s: delete it when it is not needed", run.step, folder)
        write_config(run.folder, run.given)
        run.resume_from = None
    remove_rounds_after(run, len(saved.curriculum["records"]["student_iou"][0]))
    run.state.enter(Phase.RUNNING)


async def start_over(run: Run) -> None:
    """Goes back to the beginning, with a learner that has just started. Evaluations of the start stay."""
    run.state.enter(Phase.RESTORING)
    run.progress.step, run.progress.baseline, work.step = 0, None, 0
    run.totals.clear()
    for of in (run.evaluations, run.progress.examples):
        for name in of.keys() - {TEACHER, BEFORE}:
            del of[name]
    await run.curriculum.start_over()
    run.next_selection = await run.curriculum.next_selection()
    remove_rounds_after(run, 0)
    run.state.enter(Phase.RUNNING)


def remove_rounds_after(run: Run, num_rounds: int) -> None:
    """Removes snapshots, of the curriculum and of the student, that the run will write again."""
    forget_student_answers(run.folder, but_of=run.step)
    for step in snapshot_steps(run.folder):
        if step > run.step:
            remove_folder(run.folder / SNAPSHOTS / f"step-{step}")
    for snapshot in (run.folder / "curriculum").glob("*.parquet"):
        number = snapshot.stem.removeprefix("round-")
        if snapshot.stem == "records" or (number.isdigit() and int(number) > num_rounds):
            snapshot.unlink()


def set_aside_after(run_dir: Path, step: int) -> Path | None:
    """Moves what is of later steps alone, and copies what the resumed run cuts back, to a new folder.

    Without later checkpoints nothing is set aside: None.
    """
    steps = on_disk.checkpoint_steps(run_dir)
    later = [s for s in steps if s > step and not on_disk.is_partial(run_dir, s)]
    if not later:
        return None
    number = len(list(run_dir.glob("set-aside/*"))) + 1
    folder = run_dir / "set-aside" / f"{number:02d}-after-step-{step}"
    (folder / on_disk.CHECKPOINTS).mkdir(parents=True)
    for name in ("metrics.jsonl", "trajectories", "curriculum"):
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, folder / name)
        elif (run_dir / name).exists():
            shutil.copy2(run_dir / name, folder / name)
    trackers = (TRACKERS, TENSORBOARD)  # what follows is another run there
    for name in (*trackers, "summary.json", "report.html", "evaluation"):
        if (run_dir / name).exists():
            (run_dir / name).rename(folder / name)
    if (exported_step(run_dir) or 0) > step:
        (run_dir / STUDENT).rename(folder / STUDENT)
    for number in later:
        source = on_disk.checkpoint_folder(run_dir, number)
        source.rename(folder / on_disk.CHECKPOINTS / source.name)
    for number in [s for s in snapshot_steps(run_dir) if s > step]:
        (folder / SNAPSHOTS).mkdir(exist_ok=True)
        (run_dir / SNAPSHOTS / f"step-{number}").rename(folder / SNAPSHOTS / f"step-{number}")
    return folder
