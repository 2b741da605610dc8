"""One part of the check, in the process that process.py started for it."""

import importlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.command import append_row
from benchmarks.gpu_check.interpreter import use_second_runner
from benchmarks.gpu_check.stage import STAGES, Bench, CheckError, NotHere, module_of, row_name


def run_checks(stage: str, bench: Bench, rows: Path, log: Path) -> None:
    """Writes a row for each check, whatever happened to those before it; without the first, none can run."""
    os.setsid()
    written = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if bench.device == "cpu" and stage in ("rollout", "teacher"):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        use_second_runner()
    part, first = importlib.import_module(module_of(stage)).Stage(bench, stage), STAGES[stage][0]
    broken = False
    for check in STAGES[stage]:
        started = time.perf_counter()
        if broken:
            ok, detail = False, f"not run, since {first} failed"
        else:
            ok, detail = outcome(getattr(part, check))
        broken = broken or (check == first and ok is False)
        row = {"check": row_name(stage, bench, check), "ok": ok, "seconds": time.perf_counter() - started}
        append_row(rows, row | {"detail": detail})


def outcome(check: Callable[[], str]) -> tuple[bool | None, str]:
    """Whether a check passed (None: it does not apply), and what it says."""
    try:
        return True, check()
    except NotHere as reason:
        return None, str(reason)
    except CheckError as error:
        return False, str(error)
    except Exception as error:  # a row, and the next check
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        return False, f"{type(error).__name__}: {lines[0] if lines else ''}"
