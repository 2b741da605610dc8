"""Copies of a run's checkpoints at any URL that fsspec knows, and the way back."""

import asyncio
import concurrent.futures
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from video_opd.cluster.faults import cause_of
from video_opd.content import is_inside
from video_opd.errors import CheckpointError, ConfigError, InputError, PartialCheckpointError
from video_opd.files.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    check_whole,
    checkpoint_folder,
    checkpoint_steps,
    choose_checkpoint,
    parse_manifest,
    steps_in,
)
from video_opd.logs import FILE as LOG_FILE
from video_opd.logs import log

T = TypeVar("T")
# What a resume needs besides a checkpoint.
_BESIDE = ("config.yaml", "metrics.jsonl", "trajectories", "curriculum", "tensorboard", LOG_FILE)
_FIRST_WAIT_S = 1.0


@contextmanager
def _as_config_error(what: str) -> Iterator[None]:
    """Turns any error of the library behind a URL into a ConfigError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {cause_of(error)}") from error


def open_url(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Raises ConfigError if the protocol is unknown or not installed."""
    with _as_config_error(f"{url} cannot be opened"):
        return fsspec.core.url_to_fs(url)


def check_writable(url: str) -> None:
    """Writes and removes a small file. Raises ConfigError: better now than at the first checkpoint."""
    system, root = open_url(url)
    probe = f"{root}/.video-opd"
    with _as_config_error(f"checkpoint_url={url} cannot be written to"):
        system.makedirs(root, exist_ok=True)
        system.pipe_file(probe, b"")
        system.rm_file(probe)


class Uploads:
    """Copies checkpoints to `URL/NAME` beside the run, one at a time; of the others only the newest waits."""

    def __init__(self, url: str, run_dir: Path, max_retries: int, timeout_s: float):
        self._system, root = open_url(url)
        self._url, self._run_dir, self._root = url, run_dir, f"{root}/{run_dir.name}"
        self._max_retries, self._timeout_s = max_retries, timeout_s
        self._waiting: int | None = None
        self._under_way: int | None = None
        self._task: asyncio.Task | None = None

    @property
    def needed(self) -> set[int]:
        """The steps whose checkpoints must stay: the one being read, and the one that waits."""
        return {step for step in (self._under_way, self._waiting) if step is not None}

    def start(self, step: int) -> None:
        """Returns at once. A failure is a printed warning."""
        self._waiting = step
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())

    async def finish(self) -> None:
        """Waits until everything that was started is uploaded, or has failed."""
        if self._task:
            await self._task

    async def _run(self) -> None:
        while self._waiting is not None:
            step = self._under_way = self._waiting
            self._waiting = None
            deadline = asyncio.timeout(self._timeout_s)
            try:
                async with deadline:
                    await self._upload_with_retries(step)
            except Exception as error:  # of any library behind fsspec; the checkpoint is still here
                late = f"not done within upload_timeout_s={self._timeout_s:g}"
                why = late if deadline.expired() else cause_of(error)
                not_copied = f"warning: the checkpoint of step {step} was not copied to {self._url} ({why})"
                log.warning("%s; it stays in %s", not_copied, self._run_dir)
            self._under_way = None

    async def _upload_with_retries(self, step: int) -> None:
        for attempt in range(self._max_retries + 1):
            try:
                return await in_daemon(lambda: self.upload(step))
            except Exception:  # of any library behind fsspec
                if attempt == self._max_retries:
                    raise
                await asyncio.sleep(_FIRST_WAIT_S * 2**attempt)

    def upload(self, step: int) -> None:
        """Copies one checkpoint, then removes there what the run no longer keeps.

        The old manifest is removed first and the new one comes last: no reader takes a part for the whole.
        """
        for path in (self._run_dir / name for name in _BESIDE):
            for file in [path] if path.is_file() else _files_below(path):
                self._put_whole(file, f"{self._root}/{file.relative_to(self._run_dir)}")
        folder, there = checkpoint_folder(self._run_dir, step), self._remote_folder(step)
        manifest = (folder / MANIFEST).read_bytes()
        self._remove(there)
        for file in _files_below(folder):
            if file != folder / MANIFEST:
                self._put(file, f"{there}/{file.relative_to(folder)}")
        if (folder / MANIFEST).read_bytes() != manifest:  # replaced meanwhile: the new one is copied next
            return
        self._put_whole(folder / MANIFEST, f"{there}/{MANIFEST}")
        for other in set(remote_steps(self._system, self._root)) - {*checkpoint_steps(self._run_dir), step}:
            self._remove(self._remote_folder(other))

    def _remote_folder(self, step: int) -> str:
        return f"{self._root}/{CHECKPOINTS}/step-{step}"

    def _put(self, source: Path, target: str) -> None:
        self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._system.put_file(str(source), target)

    def _put_whole(self, source: Path, target: str) -> None:
        """A reader sees the whole new file, or what was there before."""
        self._put(source, f"{target}.part")
        self._system.mv(f"{target}.part", target)

    def _remove(self, folder: str) -> None:
        if self._system.exists(f"{folder}/{MANIFEST}"):
            self._system.rm_file(f"{folder}/{MANIFEST}")
        if self._system.exists(folder):
            self._system.rm(folder, recursive=True)


def _files_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def remote_steps(system: Any, root: str) -> list[int]:
    """The steps of all checkpoints below `root`, whole or not, in order."""
    system.invalidate_cache()
    folder = f"{root}/{CHECKPOINTS}"
    paths = system.ls(folder, detail=False) if system.exists(folder) else []
    return steps_in(path.rstrip("/").rpartition("/")[2] for path in paths)


def fetch_config(url: str, folder: Path) -> Path:
    """Copies the config.yaml of the run at `url` into `folder`. Raises CheckpointError, ConfigError."""
    system, root = open_url(url)
    with _as_config_error(f"{url} cannot be read"):
        try:
            system.get_file(f"{root.rstrip('/')}/config.yaml", str(folder / "config.yaml"))
        except FileNotFoundError:
            raise CheckpointError(f"{url} is not a run: it has no config.yaml") from None
    return folder / "config.yaml"


def fetch_run(url: str, runs_dir: Path, step: int | None = None) -> Path:
    """Copies the run at `url` with its newest whole checkpoint, or that of `step`, to runs_dir/NAME.

    The folder appears whole or not at all. Raises CheckpointError, ConfigError.
    """
    system, root = open_url(url)
    root = root.rstrip("/")
    name = root.rpartition("/")[2]
    if not is_inside(name):
        raise ConfigError(f"{url} does not end with the name of a run: write it as URL/NAME")
    folder = runs_dir / name
    if folder.exists():
        raise ConfigError(f"{folder} exists: continue there with --resume {folder}, or set another runs_dir")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _as_config_error(f"{url} cannot be copied to {folder}"):
            files = _files_of_checkpoint(system, root, url, step)
            found = [path for name in _BESIDE for path in system.find(f"{root}/{name}")]
            beside = [path.removeprefix(root).lstrip("/") for path in found if not path.endswith(".part")]
            if outside := [name for name in beside if not is_inside(name)]:
                raise ConfigError(f"{url} has a file {outside[0]!r}, which is not inside it: remove it")
            targets = [temporary / name for name in (*beside, *files)]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            system.get([f"{root}/{name}" for name in (*beside, *files)], [str(t) for t in targets])
            check_whole(targets[-1].parent)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _files_of_checkpoint(system: Any, root: str, url: str, step: int | None) -> list[str]:
    """A checkpoint's files as paths below `root`, the manifest last; see choose_checkpoint."""

    def files(candidate: int) -> list[str]:
        folder = f"{CHECKPOINTS}/step-{candidate}"
        manifest = f"{root}/{folder}/{MANIFEST}"
        if not system.exists(manifest):
            raise PartialCheckpointError(f"checkpoint {url}/{folder} is partial: it has no {MANIFEST}")
        names = parse_manifest(system.cat_file(manifest), f"{url}/{folder}")["files"]
        return [f"{folder}/{name}" for name in (*names, MANIFEST)]

    return choose_checkpoint(remote_steps(system, root), step, url, files)


def in_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
    """`work`'s result, from a thread that does not keep the process alive when it hangs."""
    result: concurrent.futures.Future[T] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()  # whoever waits may give up, the thread does not

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="upload").start()
    return asyncio.wrap_future(result)
