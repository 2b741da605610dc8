"""The node's cache of decoded clips: files that all its processes map into memory.

A file holds two Arrow tensors: float64[F], the frames' times in seconds from the start of their clip, and uint8[F, H, W, 3]. It
appears whole under its name and is never changed, so readers need no lock; one that is evicted lives on where it is mapped.
"""

import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from video_opd.config_data import VideoConfig
from video_opd.content import file_stamp
from video_opd.errors import ClipError, ConfigError
from video_opd.prometheus import count
from video_opd.types import Clip
from video_opd.video.clips import read_frames

FORMAT = 1  # another number where the same clip gives other pixels
LOOKS = 64  # a process looks for what to evict each time it has written max_bytes / LOOKS

_log = logging.getLogger(__name__)


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"video_opd-{os.getuid()}" / "frames"


class FrameCache:
    """Every clip is decoded once, by whichever process of the node needs it first, while the others wait for it.

    A key is the file (path, size, time of change), which of its frames, their times and size, and the decoder. At most
    video.cache_bytes are kept, and what the processes have written since they last looked: a 64th of that each. What was
    used longest ago goes first.
    """

    def __init__(self, video: VideoConfig):
        self._video = video
        self._folder = Path(video.cache_dir) if video.cache_dir else default_folder()
        try:
            (self._folder / "locks").mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"video.cache_dir={self._folder} cannot be made ({error.strerror}): name another folder"
            ) from error
        if self._folder.stat().st_uid != os.getuid():
            raise ConfigError(f"video.cache_dir={self._folder} is another user's: name another folder")
        self._unseen_bytes: float = (
            np.inf
        )  # written since this process last looked; at first, whatever others left
        self._lock = threading.Lock()
        self.num_decodes = 0  # by this process

    def read(self, clip: Clip) -> np.ndarray:
        """uint8[F, H, W, 3], read-only. Raises ClipError."""
        path = self._folder / f"{self._key(clip)}.arrow"
        frames = self._load(path)
        if frames is None:
            with self._alone(path.name[:2]):
                frames = self._load(path)  # another process may have been faster
                if frames is None:
                    return self._decode(clip, path)
        count("frame_cache_reads", result="hit")
        return frames

    def _decode(self, clip: Clip, path: Path) -> np.ndarray:
        count("frame_cache_reads", result="miss")
        started = time.monotonic()
        frames = read_frames(clip, self._video)
        count("decode_seconds", time.monotonic() - started)
        count("clips_decoded")
        frames.flags.writeable = False
        with self._lock:
            self.num_decodes += 1
        self._store(path, clip.timestamps_s, frames)
        return frames

    def _key(self, clip: Clip) -> str:
        try:
            stamp = file_stamp(clip.video_path)
        except FileNotFoundError:
            raise ClipError(
                f"video {clip.video_path} is missing: put it back, or take its lines out of the annotations"
            ) from None
        parts = (FORMAT, self._video.decoder, clip.video_path, stamp, clip.num_video_frames, clip.frame_size)
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=16)
        digest.update(clip.frame_indices.astype(np.int64).tobytes())
        digest.update(clip.timestamps_s.tobytes())
        return digest.hexdigest()

    def _load(self, path: Path) -> np.ndarray | None:
        try:
            with pa.memory_map(str(path)) as file:
                pa.ipc.read_tensor(file)
                frames = pa.ipc.read_tensor(file).to_numpy()
            _touch(path)
            return frames
        except FileNotFoundError:
            return None  # never there, or evicted
        except (pa.ArrowInvalid, OSError) as error:  # torn: the machine went down before the disk had it
            _log.warning("%s is not whole (%s) and is made again", path, error)
            path.unlink(missing_ok=True)
            return None

    def _store(self, path: Path, times_s: np.ndarray, frames: np.ndarray) -> None:
        temporary = path.with_name(f"{path.stem}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with pa.OSFile(str(temporary), "wb") as file:
                pa.ipc.write_tensor(pa.Tensor.from_numpy(times_s), file)
                pa.ipc.write_tensor(pa.Tensor.from_numpy(frames), file)
            _touch(temporary)
            os.replace(temporary, path)
        except OSError as error:  # the frames are there all the same
            temporary.unlink(missing_ok=True)
            _log.warning("decoded frames are not kept (%s): set video.cache_dir to a folder with room", error)
            return
        with self._lock:
            self._unseen_bytes += frames.nbytes
            due = self._unseen_bytes >= self._video.cache_bytes / LOOKS
            if due:
                self._unseen_bytes = 0
        if due:
            with self._alone("evict"):
                self._evict()

    def _evict(self) -> None:
        """Down to the bound, by the time of last use; also what a process that was killed left unfinished."""
        entries = []
        for entry in os.scandir(self._folder):
            if entry.is_file():
                with suppress(FileNotFoundError):  # renamed meanwhile
                    status = entry.stat()
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._video.cache_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process and thread of the node at a time. The system frees the lock of one that dies."""
        with (self._folder / "locks" / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _touch(path: Path) -> None:
    """Used now. The system's own clock for files ticks in milliseconds."""
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
