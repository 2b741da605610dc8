"""Copies of a run's checkpoints at any URL that fsspec knows, and the way back."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from video_opd.cluster.faults import cause_of
from video_opd.content import is_inside
from video_opd.errors import CheckpointError, ConfigError, PartialCheckpointError
from video_opd.files.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    check_whole,
    checkpoint_folder,
    checkpoint_steps,
    parse_manifest,
)
from video_opd.logs import FILE as LOG_FILE
from video_opd.logs import log

T = TypeVar("T")
_BESIDE = (
    "config.yaml",
    "metrics.jsonl",
    "trajectories",
    "curriculum",
    "tensorboard",
    LOG_FILE,
)  # what a resume needs besides
_FIRST_WAIT_S = 1.0


def open_url(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Raises ConfigError for a URL that nothing here can open."""
    try:
        return fsspec.core.url_to_fs(url)
    except (
        Exception
    ) as error:  # of any library behind fsspec: a protocol that is unknown or not installed, a bad address
        raise ConfigError(f"{url} cannot be opened: {cause_of(error)}") from error


def check_writable(url: str) -> None:
    """Writes and removes a small file. Raises ConfigError: better now than at the first checkpoint."""
    system, root = open_url(url)
    probe = f"{root}/.video-opd"
    try:
        system.makedirs(root, exist_ok=True)
        system.pipe_file(probe, b"")
        system.rm_file(probe)
    except Exception as error:  # of any library behind fsspec
        raise ConfigError(f"checkpoint_url={url} cannot be written to: {cause_of(error)}") from error


class Uploads:
    """Copies checkpoints to `URL/NAME` one after another, beside the run; while one is on its way only the newest other waits."""

    def __init__(self, url: str, run_dir: Path, max_retries: int, timeout_s: float):
        self._system, root = open_url(url)
        self._url, self._run_dir, self._root = url, run_dir, f"{root}/{run_dir.name}"
        self._max_retries, self._timeout_s = max_retries, timeout_s
        self._waiting: int | None = None
        self._task: asyncio.Task | None = None
        self._under_way: int | None = None

    @property
    def needed(self) -> set[int]:
        """The steps whose checkpoints must stay: one that is being read, and one that waits."""
        return {step for step in (self._under_way, self._waiting) if step is not None}

    def start(self, step: int) -> None:
        """Returns at once. A failure is a printed line."""
        self._waiting = step
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._run())

    async def finish(self) -> None:
        """Until all that was started is there, or has failed."""
        if self._task:
            await self._task

    async def _run(self) -> None:
        while self._waiting is not None:
            step = self._under_way = self._waiting
            self._waiting = None
            deadline = asyncio.timeout(self._timeout_s)
            try:
                async with deadline:
                    await in_daemon(lambda step=step: self._upload_with_retries(step))
            except (
                Exception
            ) as error:  # of any library behind fsspec; the run goes on, its checkpoints are here
                late = f"not done within upload_timeout_s={self._timeout_s:g}"
                self._warn(step, late if deadline.expired() else cause_of(error))
            self._under_way = None

    def _warn(self, step: int, why: str) -> None:
        log.warning(
            "warning: the checkpoint of step %d was not copied to %s (%s); it stays in %s",
            step,
            self._url,
            why,
            self._run_dir,
        )

    def _upload_with_retries(self, step: int) -> None:
        for attempt in range(self._max_retries + 1):
            try:
                return self.upload(step)
            except Exception:  # of any library behind fsspec
                if attempt == self._max_retries:
                    raise
                time.sleep(_FIRST_WAIT_S * 2**attempt)

    def upload(self, step: int) -> None:
        """One checkpoint: its manifest is taken away first and comes last, so that no reader takes a part of it for whole.

        Then what the run no longer keeps is removed there too.
        """
        for name in _BESIDE:
            path = self._run_dir / name
            for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
                self._put(file, f"{self._root}/{file.relative_to(self._run_dir)}", in_one=True)
        folder, there = checkpoint_folder(self._run_dir, step), f"{self._root}/{CHECKPOINTS}/step-{step}"
        manifest = (folder / MANIFEST).read_bytes()
        self._remove(there)
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
            self._put(file, f"{there}/{file.relative_to(folder)}")
        if (folder / MANIFEST).read_bytes() != manifest:  # replaced meanwhile: that one is copied next
            return
        self._put(folder / MANIFEST, f"{there}/{MANIFEST}", in_one=True)
        kept = {*checkpoint_steps(self._run_dir), step}
        for other in remote_steps(self._system, self._root):
            if other not in kept:
                self._remove(f"{self._root}/{CHECKPOINTS}/step-{other}")

    def _put(self, source: Path, target: str, in_one: bool = False) -> None:
        """`in_one`: whoever reads sees all of it or what was there before."""
        self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        if not in_one:
            self._system.put_file(str(source), target)
            return
        self._system.put_file(str(source), f"{target}.part")
        self._system.mv(f"{target}.part", target)

    def _remove(self, folder: str) -> None:
        if self._system.exists(f"{folder}/{MANIFEST}"):
            self._system.rm_file(f"{folder}/{MANIFEST}")
        if self._system.exists(folder):
            self._system.rm(folder, recursive=True)


def remote_steps(system: Any, root: str) -> list[int]:
    """Of the checkpoints below `root`, whole or not, in order."""
    system.invalidate_cache()
    folder = f"{root}/{CHECKPOINTS}"
    names = (
        [p.rstrip("/").rpartition("/")[2] for p in system.ls(folder, detail=False)]
        if system.exists(folder)
        else []
    )
    return sorted(
        int(n.removeprefix("step-"))
        for n in names
        if n.startswith("step-") and n.removeprefix("step-").isdigit()
    )


def fetch_config(url: str, folder: Path) -> Path:
    """The config.yaml of the run at `url`, copied into `folder`. Raises CheckpointError, ConfigError."""
    system, root = open_url(url)
    try:
        system.get_file(f"{root.rstrip('/')}/config.yaml", str(folder / "config.yaml"))
    except FileNotFoundError:
        raise CheckpointError(f"{url} is not a run: it has no config.yaml") from None
    except Exception as error:  # of any library behind fsspec
        raise ConfigError(f"{url} cannot be read: {cause_of(error)}") from error
    return folder / "config.yaml"


def fetch_run(url: str, runs_dir: Path, step: int | None = None) -> Path:
    """Copies the run at `url` with its newest whole checkpoint, or that of `step`, to runs_dir/NAME, which appears whole.

    Raises CheckpointError, ConfigError.
    """
    system, root = open_url(url)
    root = root.rstrip("/")
    name = root.rpartition("/")[2]
    if not is_inside(name):
        raise ConfigError(f"{url} does not end on the name of a run: write it as URL/NAME")
    folder = runs_dir / name
    if folder.exists():
        raise ConfigError(f"{folder} exists: go on there with --resume {folder}, or set another runs_dir")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        step, names = _choose(system, root, url, step)
        target = checkpoint_folder(temporary, step)
        for name in (*names, MANIFEST):
            _get(system, f"{root}/{CHECKPOINTS}/step-{step}/{name}", target / name)
        check_whole(target)
        for name in _BESIDE:
            for source in system.find(f"{root}/{name}"):
                if not source.endswith(".part"):
                    file = source.removeprefix(root).lstrip("/")
                    if not is_inside(file):
                        raise ConfigError(f"{url} has a file {file!r}, which is not inside it: take it out")
                    _get(system, source, temporary / file)
        temporary.rename(folder)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # of any library behind fsspec
        raise ConfigError(f"{url} cannot be copied to {folder}: {cause_of(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _choose(system: Any, root: str, url: str, step: int | None) -> tuple[int, Collection[str]]:
    """(step, its files): as find_checkpoint chooses, by what the manifests say. Raises CheckpointError."""
    steps = remote_steps(system, root)
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{url} has no checkpoint of step {step}: it has {', '.join(map(str, steps)) or 'none'}"
        )
    partial: PartialCheckpointError | None = None
    for candidate in reversed(steps if step is None else [step]):
        name = f"{url}/{CHECKPOINTS}/step-{candidate}"
        there = f"{root}/{CHECKPOINTS}/step-{candidate}"
        try:
            if not system.exists(f"{there}/{MANIFEST}"):
                raise PartialCheckpointError(f"checkpoint {name} is partial: it has no {MANIFEST}")
            manifest = parse_manifest(system.cat_file(f"{there}/{MANIFEST}"), name)
        except PartialCheckpointError as error:
            partial = partial or error
            continue
        if partial:
            print(f"{partial}: going on with the whole one before it, step {candidate}")
        return candidate, manifest["files"].keys()
    raise partial or CheckpointError(f"{url} has no whole checkpoint")


def _get(system: Any, source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    system.get_file(source, str(target))


def in_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
    """`work`'s result, from a thread that does not keep the process alive when it hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():  # given up
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # pyright: ignore[reportArgumentType]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, daemon=True, name="upload").start()
    return future
