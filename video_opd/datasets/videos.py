"""Where a video's file is. The rule is in docs/data.md."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from video_opd.content import is_of_windows
from video_opd.errors import DataError

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp")
SUFFIXES = ("", "-cam-002")  # of file names after the id; the second one TACoS' own
_CUT_NAME = re.compile(r".*_\d\d:\d\d:\d\d[:.]\d+_\d\d:\d\d:\d\d[:.]\d+")


def split_extension(name: str) -> tuple[str, str]:
    """(name, extension); the extension is empty unless it is known: ids may hold dots."""
    extension = PurePosixPath(name).suffix
    return (name.removesuffix(extension), extension) if extension.lower() in EXTENSIONS else (name, "")


def video_id(name: str) -> str:
    """The last part of a path, without a known extension."""
    return split_extension(PurePosixPath(name).name)[0]


def holds_cut(name: str) -> bool:
    """Whether a file is named after the times of its cut, as in ID_00:00:39:000_00:01:24:700.mp4."""
    return _CUT_NAME.fullmatch(video_id(name)) is not None


def find_video(folder: str, name: str, where: str) -> Path:
    """The file of a video that annotations call `name`: an id or a path.

    The first that exists of: the path in `folder`, with another known extension, with one added, with none (a
    folder of frames); then the same for the path's tails, longest first. The first of all if none exists.
    Raises DataError for a path that leaves `folder`.
    """
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if "\0" in name or is_of_windows(name) or not path.startswith(root.rstrip(os.sep) + os.sep):
        advice = "write a path below it, or name another folder"
        raise DataError(f"{where}: the video {name!r} is not inside {folder}: {advice}")
    candidates = list(_candidates(os.path.relpath(path, root)))
    return Path(folder) / next((c for c in candidates if _exists(Path(root) / c)), candidates[0])


def _candidates(relative: str) -> Iterator[str]:
    parts = Path(relative).parts
    for first in range(len(parts)):
        tail = os.path.join(*parts[first:])
        stem, extension = split_extension(tail)
        if extension:
            yield tail
        yield from (f"{stem}{suffix}{e}" for suffix in SUFFIXES for e in EXTENSIONS)
        if extension:
            yield from (f"{tail}{e}" for e in EXTENSIONS)  # as DiDeMo's downloads are named: x.mov.mp4
        yield stem


def _exists(path: Path) -> bool:
    return path.is_file() if split_extension(path.name)[1] else path.exists()
