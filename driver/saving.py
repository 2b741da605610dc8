"""A save that fails is said and counted; it leaves nothing half-written, and the run goes on."""

import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from driver.run import Run
from video_opd.cluster.faults import cause_of
from video_opd.errors import DeadlineError, SaveError
from video_opd.logs import log


async def try_to_save(run: Run, save: Callable[[Run], Awaitable[None]], what: str) -> str | None:
    """Why `save(run)` failed, also as a warning and in the run's totals; None: it did not."""
    try:
        await save(run)
    except (OSError, SaveError) as error:
        run.totals["failed_saves"] += 1
        failed = f"the {what} of step {run.step} was not written: {cause_of(error)}"
        log.warning("warning: %s", failed)
        return failed
    return None


@contextmanager
def removed_if_unfinished(folder: Path) -> Iterator[None]:
    """Removes the folder that the block fails to write; the next save removes one that a late rank writes."""
    try:
        yield
    except (OSError, SaveError) as error:
        if not isinstance(error.__cause__, DeadlineError):
            shutil.rmtree(folder, ignore_errors=True)
        raise
