"""Where a video's file is. The rule is in docs/data.md."""

import os
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from video_opd.content import is_of_windows
from video_opd.errors import DataError

PREFERRED = (
    *(".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".3g2"),
    *(".ts", ".mts", ".m2ts", ".ogv", ".asf", ".vob", ".gif", ".divx", ".rm", ".rmvb"),
)
NO_VIDEOS = {  # what else lies beside videos: descriptions, subtitles, sound, pictures, features, downloads
    *(".json", ".txt", ".csv", ".xml", ".md5", ".srt", ".vtt", ".ass", ".wav", ".mp3", ".m4a", ".aac"),
    *(".flac", ".ogg", ".opus", ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".npy", ".npz", ".pt", ".pth"),
    *(".pkl", ".h5", ".zip", ".gz", ".part", ".tmp", ".ytdl", ".aria2", ".crdownload"),
}
SUFFIXES = ("", "-cam-002")  # of file names after the id; the second one TACoS' own
_EXTENSION = re.compile(r"\.(?=[0-9]*[A-Za-z])[0-9A-Za-z]{1,4}|\.")  # not .0: ids hold decimals
_CUT_NAME = re.compile(r".*_\d\d:\d\d:\d\d[:.]\d+_\d\d:\d\d:\d\d[:.]\d+")


def split_extension(name: str) -> tuple[str, str]:
    """(name, extension). An extension is up to four letters and digits, not digits alone, or a last dot."""
    stem, dot, end = name.rpartition(".")
    known = dot + end.lower() in PREFERRED or _EXTENSION.fullmatch(dot + end)
    return (stem, dot + end) if known and PurePosixPath(stem).name else (name, "")


def video_id(name: str) -> str:
    """The last part of a path, without extension."""
    return split_extension(PurePosixPath(name).name)[0]


def holds_cut(name: str) -> bool:
    """Whether a file is named after the times of its cut, as in ID_00:00:39:000_00:01:24:700.mp4."""
    return _CUT_NAME.fullmatch(video_id(name)) is not None


class _Listing(NamedTuple):
    files: set[str]
    videos: dict[str, list[str]]  # names of files by their name without extension
    folders: set[str]


class VideoFolder:
    """The videos below a folder. Each folder that one may be in is listed once, when it is first needed."""

    def __init__(self, folder: str):
        self._folder, self._root = folder, os.path.abspath(folder)
        self._listings: dict[str, _Listing] = {}
        self._claims: dict[tuple[str, str], tuple[str, bool]] = {}  # (folder, file): its id, if a guess

    def find(self, name: str, where: str) -> Path:
        """The file of a video that annotations call `name`: an id or a path.

        If there is none, the path where it is expected. Raises DataError for a path that leaves the folder,
        for a folder that cannot be listed, and for names and files of which the rule can choose none.
        """
        path = os.path.normpath(os.path.join(self._root, name))
        if "\0" in name or is_of_windows(name) or not path.startswith(self._root.rstrip(os.sep) + os.sep):
            advice = "write a path below it, or name another folder"
            raise DataError(f"{where}: the video {name!r} is not inside {self._folder}: {advice}")
        parts = Path(os.path.relpath(path, self._root)).parts
        for first in range(len(parts)):
            *folders, last = parts[first:]
            if found := self._find_in(os.path.join("", *folders), last, where):
                return Path(self._folder, *folders, found)
        *folders, last = parts
        return Path(self._folder, *folders, last if split_extension(last)[1] else f"{last}.mp4")

    def _find_in(self, folder: str, name: str, where: str) -> str | None:
        files, videos, folders = self._list(folder)
        stem, extension = split_extension(name)
        unusual = extension.lower() not in ("", ".", *PREFERRED)  # it may be a part of the id
        if extension and name in files:
            return self._claim(folder, name, name if unusual else stem, False, where)
        for wanted in dict.fromkeys([name, stem] if unusual else [stem, name]):
            for suffix in SUFFIXES:
                if found := _choose(videos.get(wanted + suffix, []), f"{where}: the video {name!r}"):
                    is_guess = unusual and wanted == stem
                    return self._claim(folder, found, name if unusual else stem, is_guess, where)
        return next((wanted for wanted in (name, stem) if wanted in folders), None)

    def _claim(self, folder: str, file: str, name: str, is_guess: bool, where: str) -> str:
        """The file. Raises DataError if it is found for two ids, one of them by a guess."""
        other, was_guess = self._claims.setdefault((folder, file), (name, is_guess))
        if other != name and (is_guess or was_guess):
            found = f"the videos {other!r} and {name!r} are both found as {file}"
            raise DataError(f"{where}: {found}: write one name for one video, or add the other's file")
        return file

    def _list(self, folder: str) -> _Listing:
        """Of a folder below the root; empty if there is none."""
        if folder not in self._listings:
            listing = self._listings[folder] = _Listing(set(), defaultdict(list), set())
            try:
                for entry in os.scandir(os.path.join(self._root, folder)):
                    kind = _kind(entry)
                    if kind == "folder":
                        listing.folders.add(entry.name)
                    elif kind == "file":
                        listing.files.add(entry.name)
                        stem, extension = split_extension(entry.name)
                        if extension.lower() not in NO_VIDEOS:
                            listing.videos[stem].append(entry.name)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                place = os.path.join(self._folder, folder)
                raise DataError(f"the folder {place} cannot be listed ({error.strerror})") from error
        return self._listings[folder]


def _kind(entry: os.DirEntry[str]) -> str:
    """Empty for a link to nothing."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:
        return "file"  # opening it says what is wrong


def _choose(files: list[str], what: str) -> str | None:
    """The file of the preferred extension; one without extension comes last."""

    def rank(file: str) -> int:
        extension = split_extension(file)[1].lower()
        return PREFERRED.index(extension) if extension in PREFERRED else len(PREFERRED) + (not extension)

    best = sorted(file for file in files if rank(file) == min(map(rank, files)))
    if len(best) > 1:
        more = f" and {len(best) - 2} more" if best[2:] else ""
        advice = "remove the others, or name one in the annotations"
        raise DataError(f"{what} may be {best[0]}, {best[1]}{more}: {advice}")
    return best[0] if best else None
