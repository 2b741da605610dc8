"""Events of a run: one JSON object a line with time, level, run, step, role and message.

The driver's are in RUN/log.jsonl, and as plain text on the terminal. A role's are in the log of its Ray worker, which the
Ray dashboard shows beside the actor.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter

from video_opd.errors import VideoOPDError

log = logging.getLogger("video_opd")
"""Where every part says what happened. What it says of a run's end is ERROR: main() prints that itself."""

FILE = "log.jsonl"
_FIELDS = {"levelname": "level", "run": "run", "step": "step", "role": "role", "message": "message"}


@dataclass
class Work:
    """What this process works on."""

    run: str = ""
    role: str = ""  # driver, curriculum, or the name of an actor, a learner's rank or a teacher: actor-0, learner-0, teacher-NAME
    step: int | None = None  # as far as this process knows: an actor that of its weights, a teacher none


work = Work()


class _Terminal(logging.Handler):
    """print() finds today's sys.stdout, which a progress bar puts itself in place of."""

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
    """For the process of a role, before it does anything: its lines go to its stderr, which Ray keeps."""
    _begin(run or "", role, None, logging.StreamHandler())


@contextmanager
def driver_log(run_dir: Path, step: int) -> Iterator[None]:
    """For the driver, around the run, which begins at `step`. A resumed run appends. DEBUG is for the file alone."""
    file, terminal = logging.FileHandler(run_dir / FILE), _Terminal(logging.INFO)
    terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    _begin(run_dir.name, "driver", step, file, terminal)
    log.debug("the run goes on" if step else "the run begins")
    try:
        yield
        log.debug("the run is done")
    except BaseException as error:
        first = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        log.error(
            "the run ended: %s",
            getattr(first, "cause", None) or first,
            exc_info=not isinstance(first, VideoOPDError),
        )
        raise
    finally:
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)
        file.close()
