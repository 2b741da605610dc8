"""A run's way to disk and back."""

import asyncio
import shutil
from pathlib import Path

from curriculum.scheduler import check_state
from driver.export import STUDENT, best_step, export_student, exported_step
from driver.held_out import AFTER, NO_VIDEO, at_step, eval_key, miou_by_step
from driver.progress import Progress, learner_settings, read_progress, write_progress
from driver.run import Run
from preflight.inputs import Plan
from video_opd.config import Config
from video_opd.files.checkpoint import (
    begin_checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    find_checkpoint,
    finish_checkpoint,
    is_partial,
    retain,
)
from video_opd.files.run_folder import write_config
from video_opd.logs import log, work

SET_ASIDE = "set-aside"


async def checkpoint(run: Run) -> None:
    """Learner, student folder, curriculum and progress as one folder that appears whole or not at all; then old ones go."""
    run.saving = True
    try:
        temporary = begin_checkpoint(run.folder, run.step)
        await run.learner.save(temporary)
        write_progress(temporary, progress_of(run, await run.curriculum.state_dict()))
        await asyncio.to_thread(finish_checkpoint, temporary, run.folder, run.step)
        run.checkpointed = run.step
        log.debug("checkpoint of step %d written", run.step)
        keep_last, keep_best = run.config.checkpoint_keep_last, run.config.checkpoint_keep_best
        spare = run.uploads.needed if run.uploads else ()
        await asyncio.to_thread(retain, run.folder, run.step, keep_last, keep_best, miou_by_step(run), spare)
        if run.uploads:
            run.uploads.start(run.step)
    finally:
        run.saving = False


async def save_if_due(run: Run) -> None:
    """The checkpoint that the config asks for at this step, and RUN/student where it is the best so far."""
    if run.config.checkpoint_every and run.step % run.config.checkpoint_every == 0:
        await checkpoint(run)
    if run.config.eval_every and best_step(miou_by_step(run)) == run.step:
        await export_student(run)


def progress_of(run: Run, curriculum: dict) -> Progress:
    """`curriculum`: the scheduler's state_dict."""
    return Progress(
        step=run.step,
        shapes=run.plan.student.shapes,
        learner=learner_settings(run.config.learner),
        curriculum=curriculum,
        totals=dict(run.totals),
        eval_key=eval_key(run.plan.eval),
        evaluations=run.evaluations,
        examples=run.examples,
        failed_eval=run.failed_eval,
    )


def find_progress(run_dir: Path, config: Config, plan: Plan, step: int | None = None) -> Progress:
    """Of the newest whole checkpoint, or that of `step`. Raises CheckpointError if `config` cannot go on from it."""
    folder = find_checkpoint(run_dir, step)
    progress = read_progress(
        folder, plan.student.shapes, learner_settings(config.learner), eval_key(plan.eval)
    )
    check_state(progress.curriculum, [p.prompt_id for p in plan.train], config)
    return progress


async def restore(run: Run) -> None:
    """Goes on where the newest whole checkpoint stands.

    Or that of run.resume_from: once all is loaded, what is later is set aside, and config.yaml is that of this run.
    """
    step = run.resume_from
    run.settled.clear()
    progress = find_progress(run.folder, run.config, run.plan, step)
    await run.learner.load(checkpoint_folder(run.folder, progress.step), progress.learner["world_size"])
    await run.curriculum.load_state_dict(progress.curriculum)
    await run.curriculum.reissue()
    run.next_selection = await run.curriculum.next_selection()
    run.step = run.checkpointed = work.step = progress.step
    run.totals.clear()
    run.totals.update(progress.totals)
    run.evaluations, run.examples, run.failed_eval = (
        dict(progress.evaluations),
        dict(progress.examples),
        dict(progress.failed_eval),
    )
    for of in (run.evaluations, run.examples):  # what was last is so no longer
        of.pop(NO_VIDEO, None)
        if AFTER in of:
            of.setdefault(at_step(run.step), of.pop(AFTER))
    if step is not None:
        if folder := set_aside_after(run.folder, step):
            log.info(
                "what the run had after step %d is kept in %s: delete it when it is not needed", step, folder
            )
        write_config(run.folder, run.given)
        run.resume_from = None
    _forget_rounds_after(run, len(progress.curriculum["records"]["student_iou"][0]))
    run.settled.set()


async def start_over(run: Run) -> None:
    """Goes on from the beginning, with a learner that has just started."""
    run.settled.clear()
    run.step = work.step = 0
    run.totals.clear()
    await run.curriculum.start_over()
    run.next_selection = await run.curriculum.next_selection()
    _forget_rounds_after(run, 0)
    run.settled.set()


def _forget_rounds_after(run: Run, num_rounds: int) -> None:
    """Removes snapshots of the curriculum that are later than where the run now stands."""
    for snapshot in (run.folder / "curriculum").glob("*.parquet"):
        number = snapshot.stem.removeprefix("round-")
        if snapshot.stem == "records" or (number.isdigit() and int(number) > num_rounds):
            snapshot.unlink()


def set_aside_after(run_dir: Path, step: int) -> Path | None:
    """Moves later checkpoints away, with copies of what will be cut back; returns where to. None: there are none."""
    later = [
        s for s in checkpoint_steps(run_dir) if s > step and not is_partial(checkpoint_folder(run_dir, s))
    ]
    if not later:
        return None
    parent = run_dir / SET_ASIDE
    folder = parent / f"{len(list(parent.glob('*'))) + 1:02d}-after-step-{step}"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "summary.json", "report.html"):
        if (run_dir / name).exists():
            shutil.copy2(run_dir / name, folder / name)
    for name in ("trajectories", "curriculum"):
        if (run_dir / name).exists():
            shutil.copytree(run_dir / name, folder / name)
    if (exported_step(run_dir) or 0) > step:
        (run_dir / STUDENT).rename(folder / STUDENT)
    for number in later:
        source = checkpoint_folder(run_dir, number)
        source.rename(folder / "checkpoints" / source.name)
    return folder
