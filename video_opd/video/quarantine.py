"""Videos that could not be decoded, and why, so that nobody waits for a decoder's deadline twice."""

import calendar
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from video_opd.content import file_stamp
from video_opd.errors import BrokenVideo, ConfigError, FailureKind, storage_error

TOO_SLOW_FOR_S = 86400.0  # a line of kind too_slow counts so long: storage may have been the cause
_SINCE = "%Y-%m-%dT%H:%M:%SZ"

_log = logging.getLogger(__name__)


def video_stamp(path: str) -> str:
    """content.file_stamp of a video. Raises ClipError if it is missing, or its storage refuses it."""
    try:
        return file_stamp(path)
    except OSError as error:
        raise storage_error(path, error) from None


class Quarantine:
    """Known to this process and, with a file, to all processes and runs that name the same file.

    The file is JSON lines of video, stamp, decoder, reason, kind, since. Lines are only appended, each by one
    write. A video is tried again if it is replaced (its content.file_stamp changes) or its line is deleted,
    and a day after it was too slow. What its storage or a killed worker caused is not listed.
    """

    def __init__(self, path: str | None, decoder: str):
        self._path, self._decoder = Path(path) if path else None, decoder
        self._known: dict[tuple[str, str, str], tuple[str, FailureKind]] = {}  # of (video, stamp, decoder)
        self._num_bytes = self._num_lines = 0  # of the file, as read so far
        self._lock = threading.Lock()

    @contextmanager
    def watch(self, video: str) -> Iterator[str]:
        """Gives the video's stamp. If the body raises BrokenVideo, the video is listed.

        Raises ClipError if it is out of reach or listed, ConfigError if the file has a bad line.
        """
        key = (video, stamp := video_stamp(video), self._decoder)
        with self._lock:
            if self._path:
                self._read_new_lines(self._path)
            if key in self._known:
                raise BrokenVideo(video, *self._known[key])
        try:
            yield stamp
        except BrokenVideo as error:
            with self._lock:
                self._known[key] = (error.reason, error.kind)
                if self._path:
                    entry = dict(zip(("video", "stamp", "decoder"), key, strict=True))
                    entry |= {"reason": error.reason, "kind": error.kind}
                    self._append(self._path, entry | {"since": time.strftime(_SINCE, time.gmtime())})
            raise

    def _append(self, path: Path, entry: dict[str, str]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode(errors="surrogateescape") + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:  # this process knows it all the same
            _log.warning("video.quarantine=%s cannot be written (%s)", path, error.strerror)

    def _read_new_lines(self, path: Path) -> None:
        """Reads the lines added since the last call, or all lines if some were deleted."""
        try:
            self._read_from(path)
        except FileNotFoundError:
            pass
        except OSError as error:  # it saves time; no run depends on it
            _log.warning("video.quarantine=%s cannot be read (%s)", path, error.strerror)

    def _read_from(self, path: Path) -> None:
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
                    kind = FailureKind(entry.get("kind", FailureKind.BROKEN))
                    if kind != FailureKind.TOO_SLOW or _age_s(entry) < TOO_SLOW_FOR_S:
                        self._known[key] = entry["reason"], kind
                except (ValueError, KeyError, TypeError) as error:
                    where = f"{path}:{self._num_lines + 1}"
                    raise ConfigError(f"{where} is not a quarantine entry: remove it ({error!r})") from error
                self._num_bytes, self._num_lines = self._num_bytes + len(line), self._num_lines + 1


def _age_s(entry: dict[str, str]) -> float:
    """Of a line; 0 if it does not say since when. Raises ValueError."""
    since = entry.get("since")
    return time.time() - calendar.timegm(time.strptime(since, _SINCE)) if since else 0.0


quarantine = lru_cache(Quarantine)  # this process's list for given settings
