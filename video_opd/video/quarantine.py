"""Videos that could not be decoded, and why, so that nobody waits for a decoder's deadline twice."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from video_opd.content import file_stamp
from video_opd.errors import BrokenVideo, ClipError, ConfigError, FailureKind


def video_stamp(path: str) -> str:
    """content.file_stamp of a video. Raises ClipError if it is missing."""
    try:
        return file_stamp(path)
    except FileNotFoundError:
        advice = "put it there, or remove its lines from the annotations"
        raise ClipError(f"video {path} is missing: {advice}", FailureKind.MISSING) from None


class Quarantine:
    """Known to this process and, with a file, to all processes and runs that name the same file.

    The file is JSON lines of video, stamp, decoder, reason, kind, since. Lines are only appended, each by one
    write. A video is tried again if it is replaced (its content.file_stamp changes) or its line is deleted.
    """

    def __init__(self, path: str | None, decoder: str):
        self._path, self._decoder = Path(path) if path else None, decoder
        self._known: dict[tuple[str, str, str], tuple[str, FailureKind]] = {}  # of (video, stamp, decoder)
        self._num_bytes = self._num_lines = 0  # of the file, as read so far
        self._lock = threading.Lock()

    @contextmanager
    def watch(self, video: str) -> Iterator[None]:
        """Raises ClipError if the video is missing or listed; lists it if the body raises BrokenVideo.

        Raises ConfigError if the file has a bad line.
        """
        key = (video, video_stamp(video), self._decoder)
        with self._lock:
            if self._path and self._path.exists():
                self._read_new_lines(self._path)
            if key in self._known:
                raise BrokenVideo(video, *self._known[key])
        try:
            yield
        except BrokenVideo as error:
            with self._lock:
                self._known[key] = (error.reason, error.kind)
                if self._path:
                    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                    entry = dict(zip(("video", "stamp", "decoder"), key, strict=True))
                    entry |= {"reason": error.reason, "kind": error.kind, "since": since}
                    line = json.dumps(entry, ensure_ascii=False).encode(errors="surrogateescape") + b"\n"
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    with self._path.open("ab", buffering=0) as file:
                        file.write(line)
            raise

    def _read_new_lines(self, path: Path) -> None:
        """Reads the lines added since the last call, or all lines if some were deleted."""
        if path.stat().st_size < self._num_bytes:
            self._known, self._num_bytes, self._num_lines = {}, 0, 0
        with path.open("rb") as file:
            file.seek(self._num_bytes)
            for line in file:
                if not line.endswith(b"\n"):  # another process is writing it
                    return
                try:
                    entry = json.loads(line.decode(errors="surrogateescape"))
                    key = (entry["video"], entry["stamp"], entry["decoder"])
                    self._known[key] = entry["reason"], FailureKind(entry.get("kind", FailureKind.BROKEN))
                except (ValueError, KeyError, TypeError) as error:
                    where = f"{path}:{self._num_lines + 1}"
                    raise ConfigError(f"{where} is not a quarantine entry: remove it ({error!r})") from error
                self._num_bytes, self._num_lines = self._num_bytes + len(line), self._num_lines + 1


quarantine = lru_cache(Quarantine)  # this process's list for given settings
