"""Decoding in processes of their own, each clip with a deadline: a decoder can loop forever without giving up the GIL.

A worker is started when one is first needed, and holds numpy and one decoder's library. It is an ordinary child process,
not a fork, so a Ray actor, a Serve replica or a process with vLLM and CUDA in it may have some.
"""

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from video_opd.config_data import VideoConfig
from video_opd.errors import ClipError, ConfigError, RunError
from video_opd.video.decode_worker import Answer, Failure, Frames, Ready, Request, Unavailable
from video_opd.video.decoders import VideoInfo

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
_ROOT = str(Path(__file__).resolve().parents[2])
_MAIN = "from video_opd.video.decode_worker import main; main()"


class BrokenVideo(ClipError):
    """A file that cannot be decoded, and will not be the next time."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"video {path} {reason}: replace the file, or take its lines out of the annotations")
        self.path, self.reason = path, reason

    def __reduce__(self):  # Ray and Serve pickle errors
        return BrokenVideo, (self.path, self.reason)


class _Worker:
    """One process. It ends by itself when this end of its socket closes, also because this process died."""

    def __init__(self, decoder: str):
        ours, theirs = socket.socketpair()
        self._buffer_fd = os.memfd_create("video_opd-frames")
        self._buffer: mmap.mmap | None = None
        self._connection = Connection(ours.detach())
        paths = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            fds = (theirs.fileno(), self._buffer_fd)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, decoder, *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths},
                pass_fds=fds,
            )
        self._owes_answer = True
        hello = self._receive(START_TIMEOUT_S)
        if isinstance(hello, Ready):
            return
        self._owes_answer = True  # it takes no requests
        self.end()
        if isinstance(hello, Unavailable):
            raise ConfigError(
                f"video.decoder={decoder} cannot be imported here ({hello.reason}): install a build that fits torch, or set another"
            )
        how = (
            f"did not start in {START_TIMEOUT_S:.0f} s"
            if hello is None
            else f"ended as it started (exit code {hello})"
        )
        raise RunError(f"a decode worker {how}: its own output says why")

    @property
    def usable(self) -> bool:
        """It lives, and owes no answer."""
        return not self._owes_answer and self._process.poll() is None

    def ask(self, request: Request) -> Answer | int | None:
        """The answer; an exit code if the worker died of the request; None if it has none within request.seconds."""
        self._owes_answer = True
        try:
            self._connection.send(request)
        except ConnectionError:
            return self._process.wait()
        return self._receive(request.seconds)

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            return None
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            return self._process.wait()
        self._owes_answer = False
        return answer

    def frames(self, shape: tuple[int, ...]) -> np.ndarray:
        """A view of the buffer: true until the next request."""
        size = int(np.prod(shape))
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = mmap.mmap(self._buffer_fd, size)
        return np.frombuffer(self._buffer, np.uint8, size).reshape(shape)

    def end(self) -> None:
        """An idle worker ends by itself, another one is killed; one that waits for a disk, when the disk answers."""
        if not self.usable:
            self._process.kill()
        self._connection.close()
        os.close(self._buffer_fd)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)


class DecodePool:
    """At most `num_workers` workers; threads share it. Every clip has `timeout_s` seconds of a worker's time."""

    def __init__(self, decoder: str, num_workers: int, timeout_s: float):
        self._decoder, self._timeout_s = decoder, timeout_s
        self._places = threading.BoundedSemaphore(num_workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []

    def describe(self, path: str) -> VideoInfo:
        """Opens the file and reads its first frame. Raises ClipError, and ConfigError where the decoder does not import."""
        with self._worker() as worker:
            answer = worker.ask(
                Request(path=path, indices=np.zeros(0, np.int64), num_video_frames=0, seconds=self._timeout_s)
            )
        if isinstance(answer, VideoInfo):
            return answer
        raise self._error(path, answer)

    def read(self, path: str, indices: np.ndarray, num_video_frames: int) -> Iterator[np.ndarray]:
        """uint8[part of F, H, W, 3]: the frames at int64[F], in parts; each is overwritten by the next.

        Raises ClipError, also where the file does not hold `num_video_frames` frames.
        """
        left_s = self._timeout_s
        with self._worker() as worker:
            while len(indices):
                asked = time.monotonic()
                answer = worker.ask(
                    Request(path=path, indices=indices, num_video_frames=num_video_frames, seconds=left_s)
                )
                left_s = max(0.0, left_s - (time.monotonic() - asked))
                if isinstance(answer, VideoInfo):
                    raise ClipError(
                        f"video {path} had {num_video_frames} frames, now {answer.num_frames}: it was replaced"
                    )
                if not isinstance(answer, Frames):
                    raise self._error(path, answer)
                yield worker.frames(answer.shape)
                indices = indices[answer.shape[0] :]

    def _error(self, path: str, answer: Answer | int | None) -> ClipError:
        if isinstance(answer, Failure):
            return BrokenVideo(path, f"cannot be decoded ({answer.reason})")
        if answer is None:
            return BrokenVideo(path, f"was not decoded within {self._timeout_s:g} s (video.decode_timeout_s)")
        if answer == -signal.SIGKILL:  # not by us, so by the system or by a person: the file may be sound
            return ClipError(
                f"video {path} was not decoded: its worker was killed, for want of memory perhaps"
            )
        assert isinstance(answer, int), answer
        return BrokenVideo(path, f"made {self._decoder} crash (exit code {answer})")

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        with self._places:
            worker = self._idle_worker() or _Worker(self._decoder)
            try:
                yield worker
            finally:
                if worker.usable:
                    with self._lock:
                        self._idle.append(worker)
                else:
                    worker.end()

    def _idle_worker(self) -> _Worker | None:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.usable:
                    return worker
                worker.end()
        return None

    def close(self) -> None:
        """Ends the idle workers; the pool starts others when it is asked again."""
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.end()


@lru_cache
def _pool(decoder: str, num_workers: int, timeout_s: float) -> DecodePool:
    return DecodePool(decoder, num_workers, timeout_s)


def shared_pool(video: VideoConfig) -> DecodePool:
    """This process's pool for these settings."""
    return _pool(video.decoder, video.decode_workers, video.decode_timeout_s)
