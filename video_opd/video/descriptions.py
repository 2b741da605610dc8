"""What the videos of a split hold: described in parallel, and kept for the next start.

A video is opened again only if its file changed, or the code or a library that reads it. Each start writes
Parquet files of its own, each of which appears whole: any number of processes may do so at once.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from video_opd.config_data import VideoConfig
from video_opd.errors import ClipError, storage_error
from video_opd.schemas import DESCRIPTIONS, write_parquet
from video_opd.video.clips import describe_video
from video_opd.video.decode_pool import shared_pool
from video_opd.video.quarantine import quarantine
from video_opd.video.video_file import VideoInfo

FOLDER = ".videos"  # in runs_dir
FILES_A_WRITE = 1000  # an interrupted start keeps as much
STAMPS_AT_ONCE = 32  # they wait for storage
MOST_WORKERS = 32  # of about 0.1 GiB each: a container may show many CPUs and have little memory

_log = logging.getLogger(__name__)


def describe_all(
    paths: Iterable[str], video: VideoConfig, runs_dir: str | None
) -> dict[str, VideoInfo | ClipError]:
    """What each video holds, or why it cannot be read. With `runs_dir` what was described there is reused.

    Workers open the others at once, with a progress bar on a terminal. Raises ConfigError as describe_video
    does.
    """
    paths = list(paths)
    folder = Path(runs_dir, FOLDER, _reader(video.decoder)) if runs_dir else None
    known = _read(folder, paths) if folder else {}
    with ThreadPoolExecutor(STAMPS_AT_ONCE) as threads:
        stamps = dict(zip(paths, threads.map(lambda path: _stamp(path, video), paths), strict=True))
    found: dict[str, VideoInfo | ClipError] = {}
    unknown: dict[str, str] = {}  # path: stamp
    for path, stamp in stamps.items():
        if isinstance(stamp, ClipError):
            found[path] = stamp
        elif (path, stamp) in known:
            found[path] = _info(*known[path, stamp])
        else:
            unknown[path] = stamp
    new: dict[str, VideoInfo] = {}
    try:
        for path, info in _describe(list(unknown), video):
            found[path] = info
            if isinstance(info, VideoInfo):
                new[path] = info
            if folder and len(new) == FILES_A_WRITE:
                _write(folder, new, unknown)
                new = {}
    finally:
        if folder and new:
            _write(folder, new, unknown)
    return found


def end_workers(video: VideoConfig) -> None:
    """Ends the workers that describe_all has used here, for a process that decodes no more or differently."""
    shared_pool(_in_parallel(video)).close()


def _in_parallel(video: VideoConfig) -> VideoConfig:
    """The same with a worker for each CPU, up to MOST_WORKERS, or more if it says so."""
    num_cpus = len(os.sched_getaffinity(0))
    return video.model_copy(update={"decode_workers": max(min(num_cpus, MOST_WORKERS), video.decode_workers)})


def _describe(paths: list[str], video: VideoConfig) -> Iterator[tuple[str, VideoInfo | ClipError]]:
    """Describes the videos in order, several at once."""
    if not paths:
        return
    parallel = _in_parallel(video)

    def describe(path: str) -> VideoInfo | ClipError:
        try:
            return describe_video(path, parallel)
        except ClipError as error:
            return error

    console, threads = Console(stderr=True), ThreadPoolExecutor(min(len(paths), parallel.decode_workers))
    try:
        found = zip(paths, threads.map(describe, paths), strict=True)
        shown = {"total": len(paths), "console": console, "disable": not console.is_terminal}
        yield from track(found, "opening videos", **shown)
    finally:
        threads.shutdown(cancel_futures=True)


def _stamp(path: str, video: VideoConfig) -> str | ClipError:
    """What changes when the file is replaced, or why it is not to be opened."""
    path = os.path.realpath(path)  # as it is listed in the quarantine
    try:
        with quarantine(video.quarantine, video.decoder).watch(path) as stamp:
            return f"{stamp}:{os.stat(path).st_ino}"
    except ClipError as error:
        return error
    except OSError as error:
        return storage_error(path, error)


@cache
def _reader(decoder: str) -> str:
    """Names all that a description depends on beside the video: decoder, code and libraries."""
    digest = hashlib.blake2b(digest_size=8)
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    for library in ("av", "decord", "torchcodec"):
        with suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{library} {importlib.metadata.version(library)};".encode())
    return f"{decoder}-{digest.hexdigest()}"


def _read(folder: Path, paths: list[str]) -> dict[tuple[str, str], tuple[str, bytes | None]]:
    """(path, stamp) -> the fields of a VideoInfo, as _write has them."""
    wanted = pc.field("path").isin(pa.array(map(os.fsencode, paths), pa.binary()))
    known = {}
    for file in sorted(folder.glob("*.parquet")):
        try:
            table = pq.read_table(file, filters=wanted, schema=DESCRIPTIONS)
        except (OSError, pa.ArrowException) as error:
            _log.warning("%s cannot be read (%s): its videos are opened again", file, error)
            continue
        columns = (table[name].to_pylist() for name in DESCRIPTIONS.names)
        for path, stamp, plain, times in zip(*columns, strict=True):
            known[os.fsdecode(path), stamp] = plain, times
    return known


def _write(folder: Path, infos: dict[str, VideoInfo], stamps: dict[str, str]) -> None:
    """Writes one file. All fields but times_s are plain values, kept as JSON."""
    names = [field.name for field in fields(VideoInfo) if field.name != "times_s"]
    rows = [
        {
            "path": os.fsencode(path),
            "stamp": stamps[path],
            "plain": json.dumps({name: getattr(info, name) for name in names}, default=np.generic.item),
            "times_s": None if info.times_s is None else info.times_s.tobytes(),
        }
        for path, info in infos.items()
    ]
    try:
        write_parquet(pa.Table.from_pylist(rows, DESCRIPTIONS), folder / f"{uuid4().hex}.parquet")
    except OSError as error:
        _log.warning("what videos hold is not kept in %s (%s)", folder, error.strerror)


def _info(plain: str, times: bytes | None) -> VideoInfo:
    values: dict[str, Any] = json.loads(plain)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return VideoInfo(**values, times_s=None if times is None else np.frombuffer(times, np.float64))
