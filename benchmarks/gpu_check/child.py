"""One part of the check, in the process that process.py started for it."""

import importlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.command import append_row
from benchmarks.gpu_check.interpreter import use_second_runner
from benchmarks.gpu_check.part import Bench, CheckError, NotHere, Part, row_name

Outcome = tuple[bool | None, str]
"""Whether a check passed (None: it does not apply), and what it says."""


def run_checks(part: Part, bench: Bench, rows: Path, log: Path) -> None:
    """Writes a row for each check, whatever happened to those before it; without the first, none can run."""
    os.setsid()
    written = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if bench.device == "cpu" and part.name in ("rollout", "teacher"):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        use_second_runner()
    checks = importlib.import_module(part.module).Checks(bench, part.name)
    first_failed = False
    for check in part.checks:
        started = time.perf_counter()
        if first_failed:
            ok, detail = False, f"not run, since {part.checks[0]} failed"
        else:
            ok, detail = outcome(getattr(checks, check))
        first_failed = first_failed or (check == part.checks[0] and ok is False)
        row = {"check": row_name(part, bench, check), "ok": ok, "seconds": time.perf_counter() - started}
        append_row(rows, row | {"detail": detail})


def outcome(check: Callable[[], str]) -> Outcome:
    try:
        return True, check()
    except NotHere as reason:
        return None, str(reason)
    except CheckError as error:
        return False, str(error)
    except Exception as error:  # a row, and the next check
        traceback.print_exc()
        return False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
