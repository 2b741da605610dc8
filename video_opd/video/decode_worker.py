"""A decode worker: the process that DecodePool starts and kills. Arguments: decoder, socket, buffer.

Socket and buffer are file descriptors; the buffer is an anonymous file in memory, for pixels. The worker
answers requests until its parent's end of the socket closes. If the parent dies during a request, an alarm
ends the worker, even one that hangs while it holds the GIL.
"""

import errno
import math
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from video_opd.video.decoders import Decoder, FrameFolder, first_line, load_decoder
from video_opd.video.video_file import VideoInfo

PART_BYTES = 64 << 20  # of frames in one answer: bounds the memory of a worker and of its buffer
READ_BYTES = 1 << 20
ALARM_SLACK_S = 5.0  # the parent kills at the deadline; the alarm follows if there is no parent

Request = tuple[Literal["open", "describe", "read"], str, np.ndarray, int, float]
"""Question, path, to read: indices of frames int64[F] and how many the file should have; seconds after which
the worker dies.
"""
Shape = tuple[int, int, int, int]
Answer = float | Shape | VideoInfo | str | OSError
"""To open: the megapixels that a description has yet to decode. To describe: what the file holds. To read:
(F, H, W, 3) of the first F requested frames, which are in the buffer as uint8; or what the file holds, if the
number of its frames changed. To any: why the file is broken; or what storage or memory refused.
"""
_NO_ROOM = {errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE}


class Buffer:
    """Memory that a worker and its parent share: an anonymous file, mapped again only when it has to grow."""

    def __init__(self, fd: int):
        self.file = open(fd, "r+b")  # noqa: SIM115
        self._bytes = np.empty(0, np.uint8)

    def frames(self, shape: Shape) -> np.ndarray:
        """uint8[shape], a view: valid until the next request."""
        num_bytes = math.prod(shape)
        if len(self._bytes) < num_bytes:
            self._bytes = np.memmap(self.file, np.uint8, "r+", shape=(num_bytes,))
        return self._bytes[:num_bytes].reshape(shape)


def refusal(path: str) -> OSError | None:
    """Why the bytes of a file, or of a folder's files, cannot all be read now; None: they can be.

    Decoders report a failing disk as they report a broken file.
    """
    try:
        for file in [e.path for e in os.scandir(path) if e.is_file()] if os.path.isdir(path) else [path]:
            with open(file, "rb", buffering=0) as opened:
                while opened.read(READ_BYTES):
                    pass
    except OSError as error:
        return OSError(error.errno, error.strerror)  # without the file's name: the parent names the video
    return None


class DecodeWorker:
    """Keeps the last file open: a long clip is read in parts."""

    def __init__(self, decoder: type[Decoder], buffer: Buffer):
        self._decoder, self._buffer = decoder, buffer
        self._open: tuple[tuple, Decoder] | None = None

    def answer(self, question: str, path: str, indices: np.ndarray, num_video_frames: int) -> Answer:
        try:
            decoder = self._decoder_of(path)
            if question == "open":
                return decoder.unseen_megapixels
            if question == "describe":
                return decoder.info
            height, width = decoder.size
            part = indices[: max(1, PART_BYTES // (height * width * 3))]
            shape, failure = (len(part), height, width, 3), None
            try:
                decoder.read(part, self._buffer.frames(shape))
            except Exception as error:  # perhaps because the file was replaced
                failure = error
            is_done = len(part) == len(indices) or failure
            if is_done and decoder.info.num_frames != num_video_frames:
                return decoder.info
            if failure:
                raise failure
            return shape
        except Exception as error:  # whatever a library raises for a broken file fails that file alone
            self._open = None
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NO_ROOM:
                return OSError(errno.ENOMEM, first_line(error))
            return refusal(path) or first_line(error)

    def _decoder_of(self, path: str) -> Decoder:
        status = os.stat(path)
        key = (path, status.st_size, status.st_mtime_ns, status.st_ino)
        if self._open is None or self._open[0] != key:
            self._open = None  # closed before the next one opens
            self._open = key, FrameFolder(path) if Path(path).is_dir() else self._decoder(path)
        return self._open[1]


def main() -> None:
    name, socket_fd, buffer_fd = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    parent = Connection(socket_fd)
    try:
        worker = DecodeWorker(load_decoder(name), Buffer(buffer_fd))
    except (ImportError, OSError, RuntimeError) as error:
        return parent.send(first_line(error))
    parent.send("")  # ready
    try:
        while True:
            *question, seconds = parent.recv()
            signal.setitimer(signal.ITIMER_REAL, seconds + ALARM_SLACK_S)
            answer = worker.answer(*question)
            signal.setitimer(signal.ITIMER_REAL, 0)
            parent.send(answer)
    except (EOFError, ConnectionError):  # the parent is gone, or closed its end
        return
