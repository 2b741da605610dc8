"""The node's cache of decoded clips: files that all its processes map into memory.

A file holds three Arrow tensors: uint8[16], the frames' digest; float64[F], their times in seconds from the
start of their clip; uint8[F, H, W, 3]. It is renamed into place when complete and never changed, so readers
need no lock. An evicted file stays readable where it is mapped.
"""

import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from video_opd.config_data import VideoConfig
from video_opd.errors import ConfigError
from video_opd.prometheus import count
from video_opd.types import Clip
from video_opd.video.clips import read_frames
from video_opd.video.quarantine import video_stamp

FORMAT = 3  # changes whenever the same clip gives other pixels, or a file holds them otherwise
CHECKS = 64  # a process evicts each time it has written cache_bytes / CHECKS

_log = logging.getLogger(__name__)


def cache_folder(video: VideoConfig) -> Path:
    return Path(video.cache_dir or f"{tempfile.gettempdir()}/video_opd-{os.getuid()}/frames")


def digest_of(frames: np.ndarray) -> str:
    """Identifies uint8[F, H, W, 3] by pixels and shape: 32 hexadecimal digits."""
    digest = hashlib.blake2b(repr(frames.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


class FrameCache:
    """Every clip is decoded once, by the first process of the node that needs it, while others wait.

    The key is the file (path, size, time of change), the frames' indices, times and size, and the decoder. At
    most video.cache_bytes are kept, plus a 64th of that for each process; the least recently used go first.
    """

    def __init__(self, video: VideoConfig):
        self._video = video
        self._folder = cache_folder(video)
        try:
            (self._folder / "locks").mkdir(mode=0o700, parents=True, exist_ok=True)
            why = "belongs to another user" if self._folder.stat().st_uid != os.getuid() else ""
        except OSError as error:
            why = f"cannot be made ({error.strerror})"
        if why:
            raise ConfigError(f"video.cache_dir={self._folder} {why}: name another folder")
        self._unchecked_bytes = np.inf  # written since this process last evicted; at first, what others left
        self._lock = threading.Lock()
        self.num_decodes = 0  # by this process

    def read(self, clip: Clip) -> np.ndarray:
        """uint8[F, H, W, 3], read-only. Raises ClipError."""
        return self.read_with_digest(clip)[0]

    def read_with_digest(self, clip: Clip) -> tuple[np.ndarray, str]:
        """The same, and its digest_of, which was computed when the clip was decoded."""
        path = self._folder / f"{self._key(clip)}.arrow"
        if (found := self._load(path)) is None:
            with self._locked(path.name[:2]):
                if (found := self._load(path)) is None:  # another process may have been faster
                    return self._decode(clip, path)
        count("frame_cache_reads", result="hit")
        return found

    def _decode(self, clip: Clip, path: Path) -> tuple[np.ndarray, str]:
        count("frame_cache_reads", result="miss")
        started = time.monotonic()
        frames = read_frames(clip, self._video)
        count("decode_seconds", time.monotonic() - started)
        count("clips_decoded")
        frames.flags.writeable = False
        with self._lock:
            self.num_decodes += 1
        digest = digest_of(frames)
        self._store(path, np.frombuffer(bytes.fromhex(digest), np.uint8), clip.timestamps_s, frames)
        return frames, digest

    def _key(self, clip: Clip) -> str:
        file = (self._video.decoder, clip.video_path, video_stamp(clip.video_path), clip.num_video_frames)
        digest = hashlib.blake2b(repr((FORMAT, *file, clip.frame_size)).encode(), digest_size=16)
        digest.update(clip.frame_indices.astype(np.int64).tobytes())
        digest.update(clip.timestamps_s.tobytes())
        return digest.hexdigest()

    def _load(self, path: Path) -> tuple[np.ndarray, str] | None:
        try:
            with pa.memory_map(str(path)) as file:
                digest, _, frames = (pa.ipc.read_tensor(file).to_numpy() for _ in range(3))
            _touch(path)
            return frames, digest.tobytes().hex()
        except FileNotFoundError:
            pass
        except (pa.ArrowInvalid, OSError) as error:  # the machine went down before the disk had all of it
            _log.warning("%s is incomplete (%s) and is made again", path, error)
            with suppress(OSError):
                path.unlink()
        return None

    def _store(self, path: Path, digest: np.ndarray, times_s: np.ndarray, frames: np.ndarray) -> None:
        temporary = path.with_name(f"{path.stem}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with pa.OSFile(str(temporary), "wb") as file:
                for values in (digest, times_s, frames):
                    pa.ipc.write_tensor(pa.Tensor.from_numpy(values), file)
            _touch(temporary)
            os.replace(temporary, path)
        except OSError as error:  # the caller has the frames all the same
            temporary.unlink(missing_ok=True)
            _log.warning("decoded frames are not kept (%s): set video.cache_dir to a folder with room", error)
            return
        with self._lock:
            self._unchecked_bytes += frames.nbytes
            if self._unchecked_bytes < self._video.cache_bytes / CHECKS:
                return
            self._unchecked_bytes = 0
        with self._locked("evict"):
            self._evict()

    def _evict(self) -> None:
        """Down to the bound, least recently used first; killed processes' temporary files too."""
        entries = []
        for entry in os.scandir(self._folder):
            with suppress(OSError):  # renamed meanwhile
                if entry.is_file():
                    entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._video.cache_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One thread of the node at a time. The system frees the lock of a process that dies.

        Without a lock, on a full disk or one that has none, clips are decoded all the same, perhaps twice.
        """
        with ExitStack() as held:
            try:
                file = held.enter_context((self._folder / "locks" / name).open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                _log.warning("video.cache_dir=%s cannot be locked (%s)", self._folder, error.strerror)
            yield


def _touch(path: Path) -> None:
    """Marks as used now, more finely than the file system's clock, which ticks in milliseconds."""
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
