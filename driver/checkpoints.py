"""A run's way to disk and back."""

from collections import Counter

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
    run.totals = Counter(totals)
    await run.learner.load(folder)
    await run.curriculum.load_state_dict(curriculum)
    await run.curriculum.reissue()
    run.round_end = await run.curriculum.round_end()
    _forget_rounds_after(run, len(curriculum["records"]["student_iou"][0]))


async def start_over(run: Run) -> None:
    """Goes on from the beginning, with a learner that has just started."""
    run.step, run.totals = 0, Counter()
    await run.curriculum.start_over()
    run.round_end = await run.curriculum.round_end()
    _forget_rounds_after(run, 0)


def _forget_rounds_after(run: Run, num_rounds: int) -> None:
    """Removes snapshots of the curriculum that are later than where the run now stands."""
    for snapshot in (run.folder / "curriculum").glob("*.parquet"):
        number = snapshot.stem.removeprefix("round-")
        if snapshot.stem == "records" or (number.isdigit() and int(number) > num_rounds):
            snapshot.unlink()
