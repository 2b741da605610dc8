"""Decoders that misbehave, named to a decode worker as "tests.bad_decoders:NAME"."""

import ctypes
import os
import signal
import time
from pathlib import Path

import numpy as np

from video_opd.video.video_file import VideoInfo


class Opens:
    """48 grey frames."""

    size = (32, 32)
    info = VideoInfo(num_frames=48, fps=4.0, size=size, times_s=None)
    unseen_megapixels = 0.0

    def __init__(self, path: str):
        self.path = path

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        frames[:] = 128


class HangsOnRead(Opens):
    """Like decord on some files: hangs and holds the GIL. Only if "bad" is in its name."""

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        if "bad" in self.path:
            ctypes.PyDLL(None).sleep(3600)
        super().read(indices, frames)


class HangsOnOpen(Opens):
    """Creates PATH.opened first."""

    def __init__(self, path: str):
        Path(f"{path}.opened").touch()
        ctypes.PyDLL(None).sleep(3600)


class Crashes(Opens):
    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class IsKilled(Opens):
    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class IsSignalled(Opens):
    """By the signal that its file is named after."""

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        number = signal.Signals[Path(self.path).stem]
        signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
        os.kill(os.getpid(), number)


class Slow(Opens):
    """Takes two seconds for many frames."""

    info = VideoInfo(num_frames=48_000_000, fps=4_000_000.0, size=(32, 32), times_s=None)

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        time.sleep(2.0)
        super().read(indices, frames)
