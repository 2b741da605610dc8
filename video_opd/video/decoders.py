"""The decoders: file -> frames. Decode workers import them; nothing else imports decord or torchcodec.

All decoders agree: the frames that a player shows, in order, upright, RGB, at the size of the first one.
"""

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from video_opd.video.video_file import PyAVDecoder, VideoInfo

_NO_NEIGHBOURS = 1e-9  # share of a file's frames that decord may replace before it fails; 0 would mean all
THREADS = "VIDEO_OPD_DECODE_THREADS"  # environment variable, of the worker alone
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))


class Decoder(Protocol):
    """One open file. Raises whatever its library does; its own ValueErrors do not name the file."""

    size: tuple[int, int]  # (H, W) upright

    def __init__(self, path: str): ...

    @property
    def info(self) -> VideoInfo:
        """May decode all of the file, or what `read` has left of it."""
        ...

    @property
    def unseen_megapixels(self) -> float:
        """What `info` has yet to decode: frames times pixels, in millions."""
        ...

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        """Writes the frames at int64[F], in any order, repeats allowed, to uint8[F, H, W, 3]."""
        ...


class _LibraryDecoder:
    """PyAV describes the file. A library reads it if it is plain and the library sees the same index.

    PyAV reads all other files, and those where the library fails.
    """

    def __init__(self, path: str):
        self._av, self._path, self._reader = PyAVDecoder(path), path, None
        self.size, self._is_plain = self._av.size, self._av.is_plain

    @property
    def info(self) -> VideoInfo:
        return self._av.info

    @property
    def unseen_megapixels(self) -> float:
        return self._av.unseen_megapixels

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        try:
            if self._is_plain:
                self._reader = self._reader or self._open_same(self._path)
                frames[:] = self._get(self._reader, indices)
                return
        except Exception:  # whatever the library raises: PyAV reads the file, or says what is wrong with it
            self._is_plain = False
        self._av.read(indices, frames)

    def _open_same(self, path: str) -> Any:
        reader, num_frames = self._open(path), self.info.num_frames
        if (len(reader), self._key_indices(reader)) != (num_frames, self._av.key_indices):
            raise ValueError("the library sees another index")
        return reader

    def _open(self, path: str) -> Any:
        raise NotImplementedError

    def _key_indices(self, reader: Any) -> list[int]:
        raise NotImplementedError

    def _get(self, reader: Any, indices: np.ndarray) -> np.ndarray:
        """uint8[F, H, W, 3]."""
        raise NotImplementedError


class DecordDecoder(_LibraryDecoder):
    """decord 0.6. It fails if it notices that it would return a neighbour in place of a frame."""

    def _open(self, path: str) -> Any:
        decord = import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)  # errors are raised anyway
        return decord.VideoReader(path, num_threads=_num_threads(), fault_tol=_NO_NEIGHBOURS)

    def _key_indices(self, reader: Any) -> list[int]:
        return reader.get_key_indices()

    def _get(self, reader: Any, indices: np.ndarray) -> np.ndarray:
        return reader.get_batch(indices).asnumpy()


class TorchcodecDecoder(_LibraryDecoder):
    def _open(self, path: str) -> Any:
        decoders = import_module("torchcodec.decoders")
        options: Any = {"num_ffmpeg_threads": _num_threads(), "seek_mode": "exact"}
        return decoders.VideoDecoder(path, dimension_order="NHWC", **options)

    def _key_indices(self, reader: Any) -> list[int]:
        return reader._get_key_frame_indices()

    def _get(self, reader: Any, indices: np.ndarray) -> np.ndarray:
        return reader.get_frames_at(indices.tolist()).data.numpy()


class FrameFolder:
    """A folder of images, one a frame, whose names end in consecutive numbers. Other files are ignored."""

    unseen_megapixels = 0.0

    def __init__(self, path: str):
        images: dict[int, Path] = {}
        for image in sorted(Path(path).iterdir()):
            digits = re.search(r"\d+$", image.stem)
            if digits and image.suffix.lower() in IMAGE_SUFFIXES:
                other = images.setdefault(int(digits[0]), image)
                if other is not image:
                    raise ValueError(f"{other.name} and {image.name} have the same number")
        if not images:
            raise ValueError("it has no numbered images")
        missing = set(range(min(images), max(images))) - set(images)
        if missing:
            raise ValueError(f"it has no image {min(missing)}, {len(missing)} of its numbers are missing")
        self._paths = [images[number] for number in sorted(images)]
        self.size: tuple[int, int] = self._image(0).shape[:2]
        self.info = VideoInfo(num_frames=len(self._paths), fps=None, size=self.size, times_s=None, key_gap=1)

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        for place, index in enumerate(indices):
            frames[place] = self._image(int(index), *self.size)

    def _image(self, index: int, height: int | None = None, width: int | None = None) -> np.ndarray:
        av = import_module("av")
        try:
            with av.open(str(self._paths[index])) as container:
                return next(container.decode(video=0)).to_ndarray(format="rgb24", height=height, width=width)
        except (av.FFmpegError, StopIteration) as error:
            name = self._paths[index].name
            raise ValueError(f"image {name} cannot be read ({first_line(error)})") from error


DECODERS: dict[str, tuple[type[Decoder], str]] = {  # and the module that must import
    "decord": (DecordDecoder, "decord"),
    "pyav": (PyAVDecoder, "av"),
    "torchcodec": (TorchcodecDecoder, "torchcodec.decoders"),
}


def _num_threads() -> int:
    """Of a library. PyAV has one: with several, the errors of a damaged file come late and out of place."""
    return int(os.environ.get(THREADS, "1"))


def load_decoder(name: str) -> type[Decoder]:
    """One of DECODERS, or "module:class". Raises ImportError, OSError or RuntimeError if its import fails."""
    if name in DECODERS:
        decoder, library = DECODERS[name]
        import_module(library)
        return decoder
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
