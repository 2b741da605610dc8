"""A run's way to disk and back."""

from driver.run import Run
from learner.checkpoint import new_checkpoint, read_state, write_state
from video_opd.errors import RunError
from video_opd.run_folder import latest_checkpoint


async def checkpoint(run: Run) -> None:
    """Learner, student folder, curriculum and progress as one folder that appears whole or not at all."""
    with new_checkpoint(run.folder, run.step) as folder:
        await run.learner.save(folder)
        if not (folder / "student").is_dir():
            raise RunError(f"the learner's checkpoint is not at {folder}: runs_dir must be on storage that all nodes share")
        write_state(folder, run.step, run.plan.student.shapes, await run.curriculum.state_dict(), run.totals)


async def restore(run: Run) -> None:
    """Goes on where the last whole checkpoint stands."""
    folder = latest_checkpoint(run.folder)
    run.step, curriculum, totals = read_state(folder, run.plan.student.shapes)
    run.totals.update(totals)
    await run.learner.load(folder)
    await run.curriculum.load_state_dict(curriculum)
    num_rounds = len(curriculum["records"]["student_iou"][0])
    for snapshot in (run.folder / "curriculum").glob("*.parquet"):  # later than where the run now stands
        number = snapshot.stem.removeprefix("round-")
        if snapshot.stem == "records" or (number.isdigit() and int(number) > num_rounds):
            snapshot.unlink()
