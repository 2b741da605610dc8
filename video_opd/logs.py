"""Events of a run: JSON lines with time, level, run, step, role and message.

The driver's go to RUN/log.jsonl and, as text, to the terminal; other roles' to the logs of their Ray workers.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter

from video_opd.errors import VideoOPDError, first_error

log = logging.getLogger("video_opd")  # ERROR is for the end of the run, which main() prints itself

FILE = "log.jsonl"
_FIELDS = {"levelname": "level", "run": "run", "step": "step", "role": "role", "message": "message"}


@dataclass
class Work:
    """What this process works on."""

    run: str = ""
    role: str = ""  # driver, curriculum, actor-0, learner-0, teacher-NAME, ...
    step: int | None = None  # as known here: an actor's is that of its weights, a teacher has none


work = Work()


class _Terminal(logging.Handler):
    """Prints to the current sys.stdout, which a progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def _add_work(record: logging.LogRecord) -> bool:
    record.run, record.step, record.role = work.run, work.step, work.role
    return True


def _begin(run: str, role: str, step: int | None, lines: logging.Handler, *others: logging.Handler) -> None:
    work.run, work.role, work.step = run, role, step
    lines.setFormatter(JsonFormatter(list(_FIELDS), rename_fields=_FIELDS, timestamp="time"))
    lines.addFilter(_add_work)
    log.handlers, log.propagate = [lines, *others], False
    log.setLevel(logging.DEBUG)


def start_role_log(run: str | None, role: str) -> None:
    """Called first in the process of a role: sends its events to stderr, which Ray keeps."""
    _begin(run or "", role, None, logging.StreamHandler())


@contextmanager
def driver_log(run_dir: Path, step: int) -> Iterator[None]:
    """Logs the driver's events during the run, which starts at `step`. DEBUG goes to the file only."""
    file, terminal = logging.FileHandler(run_dir / FILE), _Terminal(logging.INFO)
    terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    _begin(run_dir.name, "driver", step, file, terminal)
    log.debug("the run resumes" if step else "the run begins")
    try:
        yield
        log.debug("the run is done")
    except BaseException as error:
        first = first_error(error)
        cause = getattr(first, "cause", None) or first
        log.error("the run ended: %s", cause, exc_info=not isinstance(first, VideoOPDError))
        raise
    finally:
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)
        file.close()
