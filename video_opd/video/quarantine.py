"""Videos that could not be decoded, with the reason: nobody waits for a decoder's deadline twice."""

import json
import threading
import time
from pathlib import Path

from video_opd.errors import ConfigError


class Quarantine:
    """Remembers for this process and, with a file, for all processes and runs that name the same file.

    The file is JSON lines: video, stamp (content.file_stamp: a replaced video is tried again), decoder, reason, since. It is only
    appended to, one write a line. Delete a line, or the file, to have a video tried again.
    """

    def __init__(self, path: str | None, decoder: str):
        self._path, self._decoder = Path(path) if path else None, decoder
        self._reasons: dict[tuple[str, str, str], str] = {}  # (video, stamp, decoder): why
        self._read_bytes, self._num_lines = 0, 0
        self._lock = threading.Lock()

    def reason(self, video: str, stamp: str) -> str | None:
        """Why the video is not to be decoded; None: it may be. Raises ConfigError if the file is not what it should be."""
        with self._lock:
            self._read_new_lines()
            return self._reasons.get((video, stamp, self._decoder))

    def add(self, video: str, stamp: str, reason: str) -> None:
        with self._lock:
            self._reasons[video, stamp, self._decoder] = reason
            if self._path is None:
                return
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            line = {
                "video": video,
                "stamp": stamp,
                "decoder": self._decoder,
                "reason": reason,
                "since": since,
            }
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(json.dumps(line, ensure_ascii=False).encode(errors="surrogateescape") + b"\n")

    def _read_new_lines(self) -> None:
        if self._path is None or not self._path.exists() or self._path.stat().st_size == self._read_bytes:
            return
        if self._path.stat().st_size < self._read_bytes:  # somebody took lines out
            self._reasons, self._read_bytes, self._num_lines = {}, 0, 0
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]  # another process may be writing the rest
        for line in text.splitlines():
            self._num_lines += 1
            try:
                entry = json.loads(line.decode(errors="surrogateescape"))
                self._reasons[entry["video"], entry["stamp"], entry["decoder"]] = entry["reason"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self._path}:{self._num_lines} is no line of a quarantine list: take it out ({error!r})"
                ) from error
        self._read_bytes += len(text)
