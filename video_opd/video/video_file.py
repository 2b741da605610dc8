"""A video file as PyAV reads it: what it shows and when, and its pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, dropwhile
from typing import Any

import numpy as np

from video_opd.video.packet_index import INDEXED, Picture, read_index
from video_opd.video.timing import rate_and_times, shown_times

_STARTS = (  # of mkv, avi, flv, ogg, wmv, mpg, raw h264, ts or gif, rm, mxf
    *(b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"OggS", b"0&\xb2u", b"\0\0\x01", b"\0\0\0\x01", b"G", b".RMF"),
    b"\x06\x0e+4",
)
_BOXES = b"ftyp moov mdat free skip wide pnot styp uuid".split()  # of mp4 and mov
_UPRIGHT = (1, 0, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a file shows."""

    num_frames: int
    fps: float | None  # frames a second, the mean if it varies; 0: unknown; None: a frame folder
    size: tuple[int, int]  # (H, W) upright
    times_s: np.ndarray | None  # float64[num_frames] of display, ascending from 0; None: a constant rate
    num_hidden: int = 0  # pictures in the file before the first one that is shown
    late_s: float = 0.0  # from the start of the file, its sound's for example, to the first picture


def check_container(path: str) -> None:
    """Raises ValueError unless the file is a container. A playlist would make ffmpeg open other files."""
    with open(path, "rb") as file:
        start = file.read(8)
    if not (start.startswith(_STARTS) or start[4:] in _BOXES or start[4:5] == b"G"):
        raise ValueError("it does not begin as a video file does")


class PyAVDecoder:
    """PyAV: describes every file, and reads what other libraries do not surely read.

    A file shows what comes out when it is decoded from its start. Where its index surely says the same, that
    pass is spared. A picture is known by its timestamp, so a seek that lands elsewhere is noticed. Where
    timestamps are missing or do not ascend, it is known by its number, counted from the start.
    """

    def __init__(self, path: str):
        check_container(path)
        self._path = path
        self._container: Any = None
        self._open()
        packets, is_sure, is_closed = read_index(self._container, self._stream)
        pictures = packets if is_sure else self._decode_all()
        self._pts = _ascending([p.pts for p in pictures])  # empty: pictures are known by their number
        self._index_of = {pts: i for i, pts in enumerate(self._pts)}
        is_key = [p.is_key for p in pictures]
        self._keys = np.flatnonzero(is_key if self._pts else [])  # indices where a seek may land
        self.key_indices: list[int] = self._keys.tolist()
        self._frames: Iterator[tuple[int, Any]] = iter(())
        self._at = self._num_frames = len(pictures)  # _at: index of the frame decoded last
        self._size: tuple[int, int] | None = None  # (H, W) as coded
        self._matrix = _UPRIGHT
        size = self._read(0).shape[:2]
        self.info = self._describe(pictures, packets, size)
        is_8_bit = self._stream.codec_context.pix_fmt == "yuv420p"
        is_only = len(self._container.streams.video) == 1
        self.is_plain = is_closed and is_8_bit and is_only and self._matrix == _UPRIGHT

    def read(self, indices: np.ndarray, frames: np.ndarray) -> None:
        for index in np.unique(indices):
            frames[indices == index] = self._read(int(index))

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

    def _decode_all(self) -> list[Picture]:
        """The pictures that come out of the decoder, from the start of the file."""
        return [Picture(f.pts, f.key_frame, f.dts) for f in self._from_start()]

    def _describe(self, pictures: list[Picture], packets: list[Picture], size: tuple) -> VideoInfo:
        unit, first = float(self._stream.time_base), pictures[0].pts
        pts, dts = (np.array([getattr(p, name) for p in pictures], np.float64) for name in ("pts", "dts"))
        rate = float(self._stream.average_rate or 0)
        fps, times_s = rate_and_times(len(pictures), rate, shown_times(pts * unit, dts * unit))
        num_hidden, late_s = 0, 0.0
        if first is not None:
            num_hidden = sum(p.pts is not None and p.pts < first for p in packets)
            start_s = (self._container.start_time or 0) / 1e6
            late_s = first * unit - (min(0.0, start_s) if self._container.format.name in INDEXED else start_s)
        return VideoInfo(
            num_frames=len(pictures),
            fps=fps,
            size=size,
            times_s=times_s,
            num_hidden=num_hidden,
            late_s=max(0.0, late_s),
        )

    def _read(self, index: int) -> np.ndarray:
        """uint8[H, W, 3]. Raises ValueError if the file does not show so many pictures."""
        keys = self._keys[self._keys <= index]
        if len(keys) and not keys[-1] <= self._at < index:
            self._frames = self._number(self._from_key(self._pts[keys[-1]]))
        elif self._at >= index:
            self._frames = self._number(self._from_start())
        frame = self._advance_to(index)
        if frame is None and len(self._keys):
            self._keys = self._keys[:0]  # a seek went wrong: no more of them
            self._frames = self._number(self._from_start())
            frame = self._advance_to(index)
        if frame is None:
            raise ValueError(f"frame {index} of {self._num_frames} is not in it")
        return self._upright(frame)

    def _advance_to(self, index: int) -> Any:
        """The picture, decoding on; None if it does not come."""
        for at, frame in self._frames:
            self._at = at
            if at >= index:
                return frame if at == index else None
        return None

    def _number(self, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """(index, frame); an index of -1 is a picture that is not in the description."""
        if not self._pts:
            return enumerate(frames)
        return ((self._index_of.get(frame.pts, -1), frame) for frame in frames)

    def _from_start(self) -> Iterator[Any]:
        self._open()
        return self._decode()

    def _from_key(self, pts: int) -> Iterator[Any]:
        """From that key frame on; nothing if the seek misses it. Pictures before it may lack others."""
        try:
            self._container.seek(pts, stream=self._stream)
        except import_module("av").FFmpegError:
            return iter(())
        frames = dropwhile(lambda frame: frame.pts is None or frame.pts < pts, self._decode())
        first = next(frames, None)
        landed = first is not None and first.pts == pts and first.key_frame
        return chain([first], frames) if landed else iter(())

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
        if self._size is None:
            self._size = frame.height, frame.width
            self._matrix = _display_matrix(frame)
        height, width = self._size
        pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
        a, b, c, d = self._matrix
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d): what is at (x, y) is shown at (a x + c y, b x + d y). A turn, a mirror image, or both."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _UPRIGHT
    a, b, _, c, d = np.sign(np.frombuffer(matrix, np.int32)[:5]).tolist()
    return a, b, c, d


def _ascending(values: list[int | None]) -> list[int]:
    """Empty unless they strictly ascend."""
    known = [v for v in values if v is not None]
    return known if len(known) == len(values) and (np.diff(known) > 0).all() else []
