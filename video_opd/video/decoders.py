"""The decoders: file -> frames. Decode workers import them; nothing else imports decord or torchcodec.

All decoders agree: frames in the order of display, upright, RGB, at the size of the first one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_NO_NEIGHBOURS = 1e-9  # share of a file's frames that decord may replace before it fails; 0 would mean all
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a file holds."""

    num_frames: int
    fps: float | None  # frames a second, as the file says; None: a frame folder
    size: tuple[int, int]  # (H, W) upright
    times_s: np.ndarray | None  # float64[num_frames] of display, ascending from 0; None: unknown


class Decoder(Protocol):
    """One open file. Raises whatever its library does; its own ValueErrors do not name the file."""

    info: VideoInfo

    def __init__(self, path: str): ...

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        """Writes the frames at int64[F], in any order, repeats allowed, to uint8[F, H, W, 3]."""
        ...


_STARTS = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"OggS", b"\x30\x26\xb2\x75", b"\0\0\x01", b"\0\0\0\x01", b"G")
_BOXES = b"ftyp moov mdat free skip wide pnot styp uuid".split()  # of mp4 and mov


def check_container(path: str) -> None:
    """Raises ValueError unless the file is a container. A playlist would make ffmpeg open other files."""
    with open(path, "rb") as file:
        start = file.read(8)
    if not (start.startswith(_STARTS) or start[4:] in _BOXES or start[4:5] == b"G"):
        raise ValueError("it does not begin as a video file does")


class DecordDecoder:
    """decord 0.6. PyAV reads what decord misreads: files rotated by 90 degrees or without presentation times.

    It fails if it notices that it would return a neighbour in place of a frame. It does not always notice: in
    a file with fewer pictures than packets, other frames of the file take the place of missing ones.
    """

    def __init__(self, path: str):
        check_container(path)
        decord = import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)  # errors are raised anyway
        self._reader = decord.VideoReader(path, num_threads=1, fault_tol=_NO_NEIGHBOURS)
        height, width, channels = self._reader[0].shape
        num_frames, fps = len(self._reader), float(self._reader.get_avg_fps())
        starts = self._reader.get_frame_timestamp(np.arange(num_frames))[:, 0]
        times = _from_first(starts.astype(np.float64))
        own = VideoInfo(num_frames=num_frames, fps=fps, size=(height, width), times_s=times)
        self._instead = PyAVDecoder(path) if channels != 3 or times is None else None
        self.info = self._instead.info if self._instead else own

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        if self._instead:
            return self._instead.read(indices, frames)
        frames[:] = self._reader.get_batch(indices).asnumpy()


class PyAVDecoder:
    """PyAV. A file without presentation times is read from its start each time."""

    def __init__(self, path: str):
        check_container(path)
        av = import_module("av")
        self._container: Any = av.open(path)
        self._stream: Any = self._container.streams.best("video")
        if self._stream is None:
            raise ValueError("it has no video stream")
        self._stream.codec_context.thread_count = 1
        packets = self._container.demux(self._stream)
        packets = [(p.pts, p.is_keyframe) for p in packets if p.size and not p.is_discard]
        if not packets:
            raise ValueError("it has no frames")
        self._has_times = all(pts is not None for pts, _ in packets)
        times = packets if self._has_times else [(i, False) for i in range(len(packets))]
        self._pts = np.array(sorted(pts for pts, _ in times), np.int64)
        self._keys = np.array(sorted(pts for pts, is_key in times if is_key), np.int64)
        self._size: tuple[int, int] | None = None  # (H, W) as coded
        self._frames: Iterator[tuple[int, Any]] = self._decode_from(int(self._pts[0]))
        self._last: int | None = None  # pts of the frame decoded last
        size, fps = self._frame(0).shape[:2], float(self._stream.average_rate or 0)
        times_s = _from_first(self._pts * float(self._stream.time_base)) if self._has_times else None
        self.info = VideoInfo(num_frames=len(packets), fps=fps, size=size, times_s=times_s)

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        for index in np.unique(indices):
            frames[indices == index] = self._frame(int(index))

    def _frame(self, index: int) -> np.ndarray:
        """uint8[H, W, 3]. Decodes on from the last frame or the key frame before, then from the start."""
        target = int(self._pts[index])
        keys = self._keys[self._keys <= target]
        key = int(keys[-1]) if len(keys) else target
        if self._last is None or self._last >= target or self._last < key:
            self._frames = self._decode_from(key)
        for _ in range(2):
            for pts, frame in self._frames:
                self._last = pts
                if pts == target:
                    return self._upright(frame)
                if pts > target:
                    break
            self._frames = self._decode_from(int(self._pts[0]))
        raise ValueError(f"frame {index} of {len(self._pts)} is not in it")

    def _decode_from(self, pts: int) -> Iterator[tuple[int, Any]]:
        """(pts, frame) from the key frame at or before `pts`."""
        if self._has_times:
            self._container.seek(pts, stream=self._stream)
            return ((frame.pts, frame) for frame in self._container.decode(self._stream))
        self._container.seek(0)
        return enumerate(self._container.decode(self._stream))

    def _upright(self, frame: Any) -> np.ndarray:
        self._size = self._size or (frame.height, frame.width)
        height, width = self._size
        pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
        return np.rot90(pixels, round(frame.rotation / 90) % 4)


class TorchcodecDecoder:
    """torchcodec. PyAV describes the file, and reads it if it has a rotation flag."""

    def __init__(self, path: str):
        decoders = import_module("torchcodec.decoders")
        self._av = PyAVDecoder(path)
        decoder = decoders.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        self.info = self._av.info
        upright = self.info.size == (decoder.metadata.height, decoder.metadata.width)
        self._decoder = decoder if upright else None

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        if self._decoder is None:
            return self._av.read(indices, frames)
        frames[:] = self._decoder.get_frames_at(indices.tolist()).data.numpy()


class FrameFolder:
    """A folder of images, one a frame, whose names end in consecutive numbers. Other files are ignored."""

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
        size = self._image(0).shape[:2]
        self.info = VideoInfo(num_frames=len(self._paths), fps=None, size=size, times_s=None)

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        for place, index in enumerate(indices):
            frames[place] = self._image(int(index), *self.info.size)

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


def _from_first(times: np.ndarray) -> np.ndarray | None:
    """Seconds from the first frame; None if not ascending: files without times give nonsense."""
    times = times - times[:1]
    return times if np.isfinite(times).all() and (np.diff(times) > 0).all() else None
