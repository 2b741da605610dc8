"""A video file as PyAV reads it: what it shows and when, and its pictures."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import chain, dropwhile
from typing import Any

import numpy as np

from video_opd.video.packet_index import INDEXED, Picture, read_index
from video_opd.video.timing import rate_and_times, shown_times

_STARTS = (  # of mkv, avi, flv, ogg, wmv, mpg, raw h264, ts or gif, rm, mxf, nut
    *(b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"OggS", b"0&\xb2u", b"\0\0\x01", b"\0\0\0\x01", b"G", b".RMF"),
    *(b"\x06\x0e+4", b"nut/"),
)
_BOXES = b"ftyp moov mdat free skip wide pnot styp uuid".split()  # of mp4 and mov
_NO_TURN = (False, False, False)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a file shows."""

    num_frames: int
    fps: float | None  # frames a second, the mean if it varies; 0: unknown; None: a frame folder
    size: tuple[int, int]  # (H, W) upright
    times_s: np.ndarray | None  # float64[num_frames] of display, ascending from 0; None: a constant rate
    num_hidden: int = 0  # pictures in the file before the first one that is shown
    late_s: float = 0.0  # from the start of the file, its sound's for example, to the first picture
    key_gap: int | None = None  # most frames from one to begin at to the next; None: all are decoded in turn


def check_container(path: str) -> None:
    """Raises ValueError unless the file is a container. A playlist would make ffmpeg open other files."""
    with open(path, "rb") as file:
        start = file.read(8)
    if not (start.startswith(_STARTS) or start[4:] in _BOXES or start[4:5] == b"G"):
        raise ValueError("it does not begin as a video file does")


class PyAVDecoder:
    """PyAV: describes every file, and reads what other libraries do not surely read.

    A file shows what comes out when it is decoded from its start. If its index surely says the same, pictures
    are known by their timestamps, and a seek that lands elsewhere is noticed. Otherwise nothing is sought: a
    pass from the start counts the pictures, and describes the file when it has come to the end.
    """

    def __init__(self, path: str):
        check_container(path)
        self._path = path
        self._container: Any = None
        self._open()
        self._packets, self._is_sure, is_closed = read_index(self._container, self._stream)
        self._pictures = self._packets if self._is_sure else None  # None: not known yet
        known = list(enumerate(self._pictures or ()))
        self._index_of = {picture.pts: i for i, picture in known}
        self.key_indices = [i for i, picture in known if picture.is_key]
        self._keys = np.array(self.key_indices, np.int64)  # where seeks may go
        self._frames, self._at = self._from_start(), -1  # _at: the index of the frame decoded last
        self._coded_size: tuple[int, int] | None = None
        self._turn = _NO_TURN
        self.size: tuple[int, int] = self._read(0).shape[:2]
        is_8_bit = self._stream.codec_context.pix_fmt == "yuv420p"
        is_only = len(self._container.streams.video) == 1
        self.is_plain = is_closed and is_8_bit and is_only and self._turn == _NO_TURN

    def _open(self) -> None:
        """At the start of the file."""
        if self._container:
            self._container.close()
        self._container = import_module("av").open(self._path, metadata_errors="ignore")
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            raise ValueError("it has no video stream")
        if self._stream.codec_context is None:
            raise ValueError("PyAV has no decoder for it")
        self._stream.codec_context.thread_count = 1

    @property
    def info(self) -> VideoInfo:
        return self._info

    @cached_property
    def _info(self) -> VideoInfo:
        if self._pictures is None:
            for at, _ in self._frames:
                self._at = at
        if self._pictures is None:
            raise ValueError("it cannot be decoded to its end")
        pictures, unit = self._pictures, float(self._stream.time_base)
        pts, dts = (np.array([getattr(p, name) for p in pictures], np.float64) for name in ("pts", "dts"))
        rate = float(self._stream.average_rate or 0)
        fps, times_s = rate_and_times(len(pictures), rate, shown_times(pts * unit, dts * unit))
        start_s = (self._container.start_time or 0) / 1e6
        if self._container.format.name in INDEXED:
            start_s = min(0.0, start_s)
        return VideoInfo(
            num_frames=len(pictures),
            fps=fps,
            size=self.size,
            times_s=times_s,
            num_hidden=len([p for p in self._packets if p.pts is not None and p.pts < pts[0]]),  # NaN: none
            late_s=0.0 if np.isnan(pts[0]) else max(0.0, float(pts[0]) * unit - start_s),
            key_gap=int(np.diff([*self.key_indices, len(pictures)]).max()) if self._is_sure else None,
        )

    @property
    def unseen_megapixels(self) -> float:
        if self._pictures is not None:
            return 0.0
        return len(self._packets) * math.prod(self.size) / 1e6

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        for index in np.unique(indices):
            frames[indices == index] = self._read(int(index))

    def _read(self, index: int) -> np.ndarray:
        """uint8[H, W, 3]. Raises ValueError if the file does not show so many pictures."""
        keys = self._keys[self._keys <= index]
        if len(keys) and not keys[-1] <= self._at < index:
            self._frames = self._from_key(int(keys[-1]))
        elif self._at >= index:
            self._frames = self._from_start()
        frame = self._advance_to(index)
        if frame is None and len(self._keys):
            self._keys = self._keys[:0]  # a seek went wrong: no more of them
            self._frames = self._from_start()
            frame = self._advance_to(index)
        if frame is None:
            raise ValueError(f"frame {index} of {len(self._pictures or ())} is not in it")
        return self._upright(frame)

    def _advance_to(self, index: int) -> Any:
        """The picture, decoding on; None if it does not come."""
        for at, frame in self._frames:
            self._at = at
            if at >= index:
                return frame if at == index else None
        return None

    def _from_start(self) -> Iterator[tuple[int, Any]]:
        """(index, frame)."""
        self._open()
        return self._name(self._decode()) if self._is_sure else self._count()

    def _count(self) -> Iterator[tuple[int, Any]]:
        pictures = []
        for index, frame in enumerate(self._decode()):
            pictures.append(Picture(frame.pts, frame.key_frame, frame.dts))
            yield index, frame
        self._pictures = pictures

    def _name(self, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """An index of -1: the picture is not in the file's index."""
        return ((self._index_of.get(frame.pts, -1), frame) for frame in frames)

    def _from_key(self, index: int) -> Iterator[tuple[int, Any]]:
        """From that key frame on; nothing if the seek misses it. Pictures shown before it may lack others."""
        pts = self._packets[index].pts
        assert pts is not None
        try:
            self._container.seek(pts, stream=self._stream)
        except import_module("av").FFmpegError:
            return iter(())
        frames = dropwhile(lambda frame: frame.pts is None or frame.pts < pts, self._decode())
        first = next(frames, None)
        landed = first is not None and first.pts == pts and first.key_frame
        return self._name(chain([first], frames)) if landed else iter(())

    def _decode(self) -> Iterator[Any]:
        """Frames from where the container is, in order of display.

        Packets that cannot be decoded are left out before the first picture, because recordings begin
        anywhere, and at the end, because they end anywhere. Raises av.FFmpegError at others.
        """
        broken, has_begun = None, False
        for packet in self._container.demux(self._stream):
            if not packet.size:  # in AVI and Ogg: the picture before stays
                continue
            if broken and has_begun:
                raise broken
            try:
                frames = packet.decode()
            except import_module("av").InvalidDataError as error:
                broken = error
                continue
            if frames:
                broken, has_begun = None, True
            yield from frames
        yield from self._stream.decode(None)  # what it holds back
        if broken and not has_begun:
            raise broken

    def _upright(self, frame: Any) -> np.ndarray:
        """uint8[H, W, 3], at the size of the first frame and turned as it was, which ffmpeg does too."""
        if self._coded_size is None:
            self._coded_size, self._turn = (frame.height, frame.width), _turn_of(frame)
        height, width = self._coded_size
        pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
        swaps_axes, flips_rows, flips_columns = self._turn
        pixels = pixels.transpose(1, 0, 2) if swaps_axes else pixels
        return pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]


def _turn_of(frame: Any) -> tuple[bool, bool, bool]:
    """Whether rows are shown as columns, whether these rows are flipped, and whether these columns are.

    By the display matrix (a, b, _, c, d, ...): what is at (x, y) is shown at (a x + c y, b x + d y).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _NO_TURN
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
