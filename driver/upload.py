"""Copies of a run's checkpoints at any URL that fsspec knows, and the way back."""

import asyncio
import concurrent.futures
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.dirfs import DirFileSystem

from driver.copied_files import put_together, read_list, send_new
from driver.records.tracker_kinds import TENSORBOARD
from driver.records.trackers import STATE as TRACKERS
from video_opd.cluster.faults import cause_of
from video_opd.content import is_inside
from video_opd.errors import CheckpointError, ConfigError, InputError, PartialCheckpointError
from video_opd.files import checkpoint as on_disk
from video_opd.files.checkpoint import CHECKPOINTS, MANIFEST, files_below
from video_opd.files.run_folder import COMMANDS
from video_opd.logs import FILE as LOG_FILE
from video_opd.logs import log

T = TypeVar("T")
CONFIG = "config.yaml"
# What a resume needs besides a checkpoint.
_BESIDE = (CONFIG, "metrics.jsonl", "trajectories", "curriculum", TENSORBOARD, TRACKERS, LOG_FILE, COMMANDS)
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


def open_url(url: str) -> Any:
    """A DirFileSystem at `url`. Raises ConfigError if the protocol is unknown or not installed."""
    with _as_config_error(f"{url} cannot be opened"):
        system, root = fsspec.core.url_to_fs(url)
        return DirFileSystem(root.rstrip("/"), system)


def check_writable(url: str) -> None:
    """Writes and removes a small file. Raises ConfigError: better now than at the first checkpoint."""
    remote = open_url(url)
    with _as_config_error(f"checkpoint_url={url} cannot be written to"):
        remote.makedirs("", exist_ok=True)
        remote.pipe_file(".video-opd", b"")
        remote.rm_file(".video-opd")


class Uploads:
    """Copies checkpoints to `URL/NAME` beside the run, one at a time; of the others only the newest waits."""

    def __init__(self, url: str, run_dir: Path, max_retries: int, timeout_s: float):
        self._url, self._run_dir, self._max_retries, self._timeout_s = url, run_dir, max_retries, timeout_s
        self._remote = open_url(f"{url.rstrip('/')}/{run_dir.name}")
        self.needed: list[int] = []  # steps whose checkpoints stay: the one being read, the one that waits
        self._task: asyncio.Task | None = None

    def start(self, step: int) -> None:
        """Returns at once. A failure is a warning in the log."""
        self.needed[1:] = [step]
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())

    async def finish(self) -> None:
        """Waits until everything that was started is uploaded, or has failed."""
        if self._task:
            await self._task

    async def _run(self) -> None:
        while self.needed:
            step = self.needed[0]
            deadline = asyncio.timeout(self._timeout_s)
            try:
                async with deadline:
                    await self._upload_with_retries(step)
            except Exception as error:  # of any library behind fsspec; the checkpoint is still here
                late = f"not done within upload_timeout_s={self._timeout_s:g}"
                why = late if deadline.expired() else cause_of(error)
                not_copied = f"the checkpoint of step {step} was not copied to {self._url} ({why})"
                log.warning("warning: %s; it stays in %s", not_copied, self._run_dir)
            del self.needed[0]

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
        Of what is beside checkpoints only the new bytes travel.
        """
        send_new(self._remote, self._run_dir, _files_beside(self._run_dir))
        self._put_whole(self._run_dir / CONFIG)  # fetch_config reads it there
        folder = on_disk.checkpoint_folder(self._run_dir, step)
        manifest = (folder / MANIFEST).read_bytes()
        self._remove(step)
        for file in files_below(folder):
            if file != folder / MANIFEST:
                self._put(file)
        if (folder / MANIFEST).read_bytes() != manifest:  # replaced meanwhile: the new one is copied next
            return
        self._put_whole(folder / MANIFEST)
        for other in set(remote_steps(self._remote)) - {*on_disk.checkpoint_steps(self._run_dir), step}:
            self._remove(other)

    def _put(self, source: Path, suffix: str = "") -> str:
        target = f"{source.relative_to(self._run_dir)}{suffix}"
        self._remote.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._remote.put_file(str(source), target)
        return target

    def _put_whole(self, source: Path) -> None:
        """A reader sees the whole new file, or what was there before."""
        part = self._put(source, ".part")
        self._remote.mv(part, part.removesuffix(".part"))

    def _remove(self, step: int) -> None:
        folder = f"{CHECKPOINTS}/step-{step}"
        if self._remote.exists(f"{folder}/{MANIFEST}"):
            self._remote.rm_file(f"{folder}/{MANIFEST}")
        if self._remote.exists(folder):
            self._remote.rm(folder, recursive=True)


def _files_beside(run_dir: Path) -> Iterator[Path]:
    """The files of _BESIDE, but for unfinished ones; folders that are removed meanwhile are left out."""
    for path in (run_dir / name for name in _BESIDE):
        inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        yield from (file for file in (path, *inside) if file.is_file() and file.suffix != ".tmp")


def remote_steps(remote: Any) -> list[int]:
    """The steps of all checkpoints of a run's copy, whole or not, in order."""
    remote.invalidate_cache()
    paths = remote.ls(CHECKPOINTS, detail=False) if remote.exists(CHECKPOINTS) else []
    return on_disk.steps_in(path.rstrip("/").rpartition("/")[2] for path in paths)


def fetch_config(url: str, folder: Path) -> Path:
    """Copies the config.yaml of the run at `url` into `folder`. Raises CheckpointError, ConfigError."""
    remote = open_url(url)
    with _as_config_error(f"{url} cannot be read"):
        try:
            remote.get_file(CONFIG, str(folder / CONFIG))
        except FileNotFoundError:
            raise CheckpointError(f"{url} is not a run: it has no config.yaml") from None
    return folder / CONFIG


def fetch_run(url: str, runs_dir: Path, step: int | None = None) -> Path:
    """Copies the run at `url` with its newest whole checkpoint, or that of `step`, to runs_dir/NAME.

    The folder appears whole or not at all. Raises CheckpointError, ConfigError.
    """
    remote = open_url(url)
    name = remote.path.rpartition("/")[2]
    if not is_inside(name):
        raise ConfigError(f"{url} does not end with the name of a run: write it as URL/NAME")
    folder, temporary = runs_dir / name, runs_dir / f".{name}.tmp"
    if folder.exists():
        raise ConfigError(f"{folder} exists: continue there with --resume {folder}, or set another runs_dir")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _as_config_error(f"{url} cannot be copied to {folder}"):
            names = _files_of_checkpoint(remote, url, step)
            beside = []
            if listed := read_list(remote, url):
                put_together(remote, url, listed, _BESIDE, temporary)
            else:  # of an older version
                beside = [path for n in _BESIDE for path in remote.find(n) if not path.endswith(".part")]
            if outside := [name for name in beside if not is_inside(name)]:
                raise ConfigError(f"{url} has a file {outside[0]!r}, which is not inside it: remove it")
            targets = [temporary / name for name in (*beside, *names)]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            remote.get([*beside, *names], [str(target) for target in targets])
            on_disk.check_whole(targets[-1].parent)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _files_of_checkpoint(remote: Any, url: str, step: int | None) -> list[str]:
    """A checkpoint's files, the manifest last; see choose_checkpoint."""

    def files(candidate: int) -> list[str]:
        folder = f"{CHECKPOINTS}/step-{candidate}"
        if not remote.exists(f"{folder}/{MANIFEST}"):
            raise PartialCheckpointError(f"checkpoint {url}/{folder} is partial: it has no {MANIFEST}")
        names = on_disk.parse_manifest(remote.cat_file(f"{folder}/{MANIFEST}"), f"{url}/{folder}")
        return [f"{folder}/{name}" for name in (*names, MANIFEST)]

    return on_disk.choose_checkpoint(remote_steps(remote), step, url, files)


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
