"""Decoding in worker processes with a deadline: a decoder can loop forever without releasing the GIL.

A worker starts when it is first needed and imports numpy and one decoder's library. It is a new program, not
a fork, so Ray actors, Serve replicas and processes that use vLLM and CUDA can have workers.
"""

import os
import queue
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing import Pipe
from subprocess import DEVNULL, CalledProcessError, Popen, TimeoutExpired
from typing import Any

import numpy as np

from video_opd import ROOT
from video_opd.config_data import VideoConfig
from video_opd.errors import BrokenVideo, ClipError, ConfigError, FailureKind, RunError, storage_error
from video_opd.video.decode_worker import Answer, Buffer, Request, Shape
from video_opd.video.decoders import THREADS
from video_opd.video.video_file import VideoInfo

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
# What video.decode_timeout_s is for: at its default 20 ms a megapixel, and 17 MB/s. One thread decoded 1080p
# h264 in 3 ms of CPU time a megapixel, vp9 in 2.1, mpeg4 in 0.6; on busy cores, in 10 by the clock.
MEGAPIXELS, GIGABYTES = 3000.0, 1.0
MOST_THREADS = 8  # of a worker, however many CPUs there are
_OF_DECODERS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}  # others come from outside
_MAIN = "from video_opd.video.decode_worker import main; main()"  # with -m its classes would be __main__'s


class _Worker:
    """One process. It ends by itself when this end of its socket closes, also because this process died.

    It has a session of its own: a signal that stops the group of this process is not for a clip's decoding.
    """

    def __init__(self, decoder: str, num_threads: int):
        """Raises ConfigError if the decoder cannot be imported."""
        self.buffer = Buffer(os.memfd_create("video_opd-frames"))
        self._connection, theirs = Pipe()
        with theirs:
            fds = (theirs.fileno(), self.buffer.file.fileno())
            command = [sys.executable, "-c", _MAIN, decoder, *map(str, fds)]
            paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
            env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), THREADS: str(num_threads)}
            options: dict[str, Any] = {"env": env, "pass_fds": fds, "start_new_session": True}
            self._process = Popen(command, stdin=DEVNULL, stdout=DEVNULL, **options)
        self._busy = True
        try:
            failure: str = self._receive(START_TIMEOUT_S)
        except (TimeoutError, CalledProcessError) as error:
            self.end()
            raise RunError(f"a decode worker did not start ({error}): its own output says why") from error
        if failure:
            self.end()
            advice = "install a build that fits torch, or set another"
            raise ConfigError(f"video.decoder={decoder} cannot be imported here ({failure}): {advice}")

    @property
    def usable(self) -> bool:
        """It lives, and has answered all requests."""
        return not self._busy and self._process.poll() is None

    def ask(self, request: Request) -> Answer:
        """Raises TimeoutError after the request's seconds, CalledProcessError if the worker dies."""
        self._busy = True
        with suppress(ConnectionError):  # then _receive sees that it died
            self._connection.send(request)
        return self._receive(request[-1])

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise TimeoutError(f"no answer in {seconds:g} s")
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise CalledProcessError(self._process.wait(), "a decode worker") from None
        self._busy = False
        return answer

    def end(self) -> None:
        """Kills a busy worker; an idle one ends by itself. One that waits for a disk ends after that."""
        if not self.usable:
            self._process.kill()
        self._connection.close()
        self.buffer.file.close()
        with suppress(TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)


def _if_usable(worker: _Worker | None) -> _Worker | None:
    """Ends a worker that is not usable."""
    if worker is None or worker.usable:
        return worker
    worker.end()
    return None


def deadline_s(timeout_s: float, megapixels: float, num_bytes: int = 0) -> float:
    """Seconds for decoding so many megapixels, frames times pixels, of a file of so many bytes.

    `timeout_s`, in proportion more for more than MEGAPIXELS of pictures or GIGABYTES of file.
    """
    return timeout_s * max(1.0, megapixels / MEGAPIXELS, num_bytes / 1e9 / GIGABYTES)


def deadline_of_file_s(timeout_s: float, path: str, megapixels: float) -> float:
    """The same for a file, or a folder of frames, at `path`."""
    num_bytes = 0
    with suppress(OSError):  # the worker says what is wrong
        num_bytes = os.stat(path).st_size
    return deadline_s(timeout_s, megapixels, num_bytes)


def threads_of_a_worker(num_workers: int) -> int:
    """Its share of this process's CPUs: OMP_NUM_THREADS, which is `num_cpus` in Ray's processes, or all."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    num_cpus = int(said) if said.isdecimal() else len(os.sched_getaffinity(0))
    return min(max(1, num_cpus // num_workers), MOST_THREADS)


class DecodePool:
    """At most `num_workers` workers, shared by threads. A clip has deadline_s() of a worker's time."""

    def __init__(self, decoder: str, num_workers: int, timeout_s: float):
        self._decoder, self._timeout_s = decoder, timeout_s
        self._num_threads = threads_of_a_worker(num_workers)
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: may be started
        for _ in range(num_workers):
            self._idle.put(None)

    def describe(self, path: str) -> VideoInfo:
        """Opens the file and, where only that tells, decodes all of it.

        Raises ClipError, and ConfigError as _Worker does.
        """
        nothing = path, np.zeros(0, np.int64), 0
        with self._worker() as worker:
            allowed_s = deadline_of_file_s(self._timeout_s, path, 0.0)
            megapixels = self._ask(worker, ("open", *nothing, allowed_s), allowed_s)
            assert isinstance(megapixels, float)
            allowed_s = deadline_of_file_s(self._timeout_s, path, megapixels)
            info = self._ask(worker, ("describe", *nothing, allowed_s), allowed_s)
        assert isinstance(info, VideoInfo)
        return info

    def read(
        self, path: str, indices: np.ndarray, num_video_frames: int, megapixels: float
    ) -> Iterator[np.ndarray]:
        """uint8[part of F, H, W, 3]: the frames at int64[F], in parts; each is overwritten by the next.

        megapixels: as Clip.decode_megapixels. Raises ClipError, also if the file does not hold
        `num_video_frames` frames.
        """
        left_s = allowed_s = deadline_of_file_s(self._timeout_s, path, megapixels)
        with self._worker() as worker:
            while len(indices):
                asked = time.monotonic()
                request: Request = ("read", path, indices, num_video_frames, left_s)
                answer = self._ask(worker, request, allowed_s)
                left_s = max(0.0, left_s - (time.monotonic() - asked))
                if isinstance(answer, VideoInfo):
                    found = f"had {num_video_frames} frames, now {answer.num_frames}"
                    raise ClipError(f"video {path} {found}: it was replaced", FailureKind.REPLACED)
                assert isinstance(answer, tuple)
                yield worker.buffer.frames(answer)
                indices = indices[answer[0] :]

    def _ask(self, worker: _Worker, request: Request, allowed_s: float) -> float | VideoInfo | Shape:
        """Raises ClipError. allowed_s: for all of the clip."""
        path = request[1]
        try:
            answer = worker.ask(request)
        except TimeoutError:
            reason = f"was not decoded within {allowed_s:g} s (video.decode_timeout_s)"
            raise BrokenVideo(path, reason, FailureKind.TOO_SLOW) from None
        except CalledProcessError as error:
            if error.returncode < 0 and -error.returncode not in _OF_DECODERS:  # the file may be sound
                why = "its worker was killed, perhaps for lack of memory"
                raise ClipError(f"video {path} was not decoded: {why}", FailureKind.WORKER_KILLED) from None
            other = "" if self._decoder == "pyav" else "; video.decoder=pyav may read it"
            reason = f"made {self._decoder} crash (exit code {error.returncode}{other})"
            raise BrokenVideo(path, reason, FailureKind.DECODER_CRASHED) from None
        if isinstance(answer, OSError):
            raise storage_error(path, answer)
        if isinstance(answer, str):
            raise BrokenVideo(path, f"cannot be decoded ({answer})")
        return answer

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        worker = self._idle.get()
        try:
            worker = _if_usable(worker) or _Worker(self._decoder, self._num_threads)  # it may be dead
            yield worker
        finally:
            self._idle.put(_if_usable(worker))

    def close(self) -> None:
        """Ends the idle workers; the pool starts others when it is used again."""
        for worker in [self._idle.get_nowait() for _ in range(self._idle.qsize())]:
            if worker:
                worker.end()
            self._idle.put(None)


_pool = lru_cache(DecodePool)


def shared_pool(video: VideoConfig) -> DecodePool:
    """This process's pool for these settings."""
    return _pool(video.decoder, video.decode_workers, video.decode_timeout_s)
