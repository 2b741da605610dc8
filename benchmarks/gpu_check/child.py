"""One part of the check in a process of its own: `python -m benchmarks.gpu_check.child NAME BENCH ROWS`."""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.command import append_row
from benchmarks.gpu_check.interpreter import use_second_runner_on_cpu
from benchmarks.gpu_check.stage import STAGES, Bench, CheckError, NotHere, name_of


def run(stage: Any, name: str, checks: tuple[str, ...], rows: Path) -> None:
    """Writes a row for each check, whatever happened to those before it; without the first, none can run."""
    first_failed = ""
    for check in checks:
        started, ok = time.perf_counter(), None
        try:
            if first_failed:
                raise CheckError(f"not run: {first_failed}")
            detail, ok = getattr(stage, check)(), True
        except NotHere as reason:
            detail = str(reason)
        except Exception as error:  # a row, and the next check
            traceback.print_exc()
            what = str(error).strip().splitlines() or [""]
            detail, ok = what[0] if isinstance(error, CheckError) else f"{type(error).__name__}: {what[0]}", False
            first_failed = f"{check} failed" if check == checks[0] else ""
        seconds = time.perf_counter() - started
        append_row(rows, {"check": f"{name} {check.replace('_', ' ')}", "ok": ok, "seconds": seconds, "detail": detail})


def main(name: str, bench: Bench, rows: Path) -> None:
    if bench.device == "cpu" and name in ("rollout", "teacher"):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        use_second_runner_on_cpu()
    module = "transfer" if name in ("object_store", "ipc", "collective") else name
    stage = importlib.import_module(f"benchmarks.gpu_check.{module}").Stage(bench, name)
    run(stage, name_of(name, bench), STAGES[name], rows)


if __name__ == "__main__":
    main(sys.argv[1], Bench(**json.loads(sys.argv[2])), Path(sys.argv[3]))
