"""Containers and codecs: the frame that is chosen for a time is the picture that is shown then.

Every picture bears its number. What a file shows is what PyAV decodes from its start, here without this
project's code; when it shows it is known from the numbers, because the videos are written here.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
from av.error import InvalidDataError

from video_opd.config_data import VideoConfig
from video_opd.errors import ConfigError
from video_opd.types import Clip
from video_opd.video.clips import plan_clip, read_frames
from video_opd.video.decoders import DECODERS

RATE, NUM_PICTURES, GROUP = 25, 60, 12  # a group of pictures begins with a key frame
CUT_S = 0.88  # in the second group
VFR_GAPS = (1, 1, 3, 1, 10, 1)  # in 1 / RATE s


class Kind(NamedTuple):
    """A container and a codec. `variants`: b: with B-frames, vfr: of variable rate, cut, torn."""

    name: str
    codec: str
    variants: str = "cut torn"
    pixels: str = "yuv420p"
    size: tuple[int, int] = (64, 64)
    codec_options: Mapping[str, str] = MappingProxyType({})
    file_options: Mapping[str, str] = MappingProxyType({})
    format: str | None = None


X264 = {"preset": "ultrafast", "crf": "10"}
VPX = {"crf": "10", "b:v": "1M", "deadline": "realtime", "cpu-used": "8"}
ALTREF = VPX | {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}
ALL = "b vfr cut torn"
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
KINDS = [
    Kind("h264.mp4", "libx264", ALL, codec_options=X264),
    Kind("h264.mov", "libx264", ALL, codec_options=X264),
    Kind("h264.3gp", "libx264", ALL, codec_options=X264),
    Kind("h264.mkv", "libx264", ALL, codec_options=X264),
    Kind("h264.flv", "libx264", ALL, codec_options=X264),
    Kind("h264.ts", "libx264", ALL, codec_options=X264),
    Kind("h264.m2ts", "libx264", ALL, codec_options=X264, file_options={"mpegts_m2ts_mode": "1"}),
    Kind("h264.avi", "libx264", "b torn", codec_options=X264),
    Kind("fragmented.mp4", "libx264", ALL, codec_options=X264, file_options=FRAGMENTS),
    Kind("opengop.mp4", "libx264", "b cut torn", codec_options=X264 | {"x264-params": "open-gop=1"}),
    Kind("opengop.ts", "libx264", "b cut torn", codec_options=X264 | {"x264-params": "open-gop=1"}),
    Kind("refresh.mp4", "libx264", "cut torn", codec_options=X264 | {"x264-params": "intra-refresh=1"}),
    Kind("hevc.mp4", "libx265", "b cut torn", codec_options={"preset": "ultrafast", "crf": "10"}),
    Kind("hevc10.mkv", "libx265", "vfr cut", "yuv420p10le", codec_options={"preset": "ultrafast"}),
    Kind("av1.mp4", "libsvtav1", "cut", codec_options={"preset": "12", "crf": "20"}),
    Kind("vp8.webm", "libvpx", "vfr cut torn", codec_options=VPX),
    Kind("vp8_altref.webm", "libvpx", "cut", codec_options=ALTREF),
    Kind("live.webm", "libvpx", "vfr", codec_options=VPX, file_options={"live": "1"}),
    Kind("vp9.webm", "libvpx-vp9", "vfr cut torn", codec_options=VPX),
    Kind("vp9_altref.mkv", "libvpx-vp9", "cut", codec_options=ALTREF),
    Kind("vp9.mp4", "libvpx-vp9", "vfr cut", codec_options=VPX),
    Kind("mpeg4.avi", "mpeg4", ALL),
    Kind("mpeg4.mp4", "mpeg4", "b vfr cut torn"),
    Kind("mpeg4.mkv", "mpeg4", "b vfr cut"),
    Kind("mpeg2.mpg", "mpeg2video", "b torn", format="mpeg"),
    Kind("mpeg2.vob", "mpeg2video", "b torn", format="vob"),
    Kind("mpeg2.ts", "mpeg2video", "b cut torn"),
    Kind("mpeg1.mpg", "mpeg1video", "b"),
    Kind("wmv2.wmv", "wmv2", "vfr cut torn", format="asf"),
    Kind("wmv1.wmv", "wmv1", "cut", format="asf"),
    Kind("msmpeg4.avi", "msmpeg4", "torn"),
    Kind("flv1.flv", "flv", "vfr cut torn"),
    Kind("h263.3gp", "h263", "cut torn", size=(96, 128)),
    Kind("mjpeg.avi", "mjpeg", "vfr cut", "yuvj420p"),
    Kind("mjpeg.mov", "mjpeg", "vfr cut", "yuvj420p"),
    Kind("mjpeg.mkv", "mjpeg", "vfr cut", "yuvj420p"),
    Kind("prores.mov", "prores_ks", "vfr cut", "yuv422p10le"),
    Kind("ffv1.mkv", "ffv1", "vfr cut"),
    Kind("gif.gif", "gif", "vfr", "gray"),
]


def draw(number: int, height: int, width: int) -> np.ndarray:
    """uint8[H, W, 3]: a column of 8 pixels a bit; its lower half is the inverse of its upper half."""
    bits = number >> np.arange(width // 8) & 1
    upper = np.broadcast_to(np.where(bits, 220, 40).repeat(8), (height // 2, width))
    return np.repeat(np.concatenate([upper, 260 - upper]).astype(np.uint8)[:, :, None], 3, 2)


def number_of(picture: np.ndarray) -> int:
    """-1 if the picture is not a whole one."""
    height, width = picture.shape[:2]
    halves = picture.astype(float).mean(2).reshape(2, height // 2, width // 8, 8).mean((1, 3))
    contrast = halves[0] - halves[1]
    return int(((contrast > 0) << np.arange(width // 8)).sum()) if np.abs(contrast).min() > 60 else -1


def ticks(variable: bool) -> np.ndarray:
    """int64[NUM_PICTURES], in 1 / RATE s."""
    gaps = np.resize(VFR_GAPS if variable else (1,), NUM_PICTURES - 1)
    return np.concatenate([[0], np.cumsum(gaps)])


def write(path: Path, kind: Kind, variant: str) -> None:
    options = {"g": str(GROUP), "bf": "2" if variant == "b" else "0", **kind.codec_options}
    height, width = kind.size
    with av.open(str(path), "w", format=kind.format, options=dict(kind.file_options)) as container:
        stream: Any = container.add_stream(kind.codec, rate=RATE, options=options)
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = height, width, kind.pixels
        for number, tick in enumerate(ticks(variant == "vfr")):
            frame = av.VideoFrame.from_ndarray(draw(number, height, width), format="rgb24")
            frame.pts, frame.time_base = int(tick), Fraction(1, RATE)
            container.mux(stream.encode(frame.reformat(format=kind.pixels)))
        container.mux(stream.encode())


def cut(source: Path, path: Path, kind: Kind, torn: bool) -> None:
    """A copy without encoding from CUT_S on, as by ffmpeg: from the key frame before, at a time below 0.

    Or torn: from any packet on, as recordings begin.
    """
    with (
        av.open(str(source)) as old,
        av.open(str(path), "w", format=kind.format, options=dict(kind.file_options)) as new,
    ):
        stream: Any = old.streams.video[0]
        copy = new.add_stream_from_template(stream, opaque=True)
        packets: list[Any] = [p for p in old.demux(stream) if p.size]
        number = round(CUT_S * RATE)
        start = packets[number].dts
        first = max(i for i in range(number + 1) if torn or packets[i].is_keyframe)
        for packet in packets[first:]:
            packet.stream = copy
            packet.dts = packet.dts - start
            packet.pts = None if packet.pts is None else packet.pts - start
            new.mux(packet)


class Truth(NamedTuple):
    pictures: np.ndarray  # uint8[N, H, W, 3], as they come out of the decoder
    times_s: np.ndarray  # float64[N], from the first


def what_is_shown(path: Path, variable: bool) -> Truth:
    pictures, pts_s = [], []
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in [p for p in container.demux(stream) if p.size] + [None]:
            try:
                frames = stream.decode(packet)
            except InvalidDataError:  # before the first key frame
                continue
            pictures += [frame.to_ndarray(format="rgb24") for frame in frames]
            pts_s += [np.nan if f.pts is None else float(f.pts * stream.time_base) for f in frames]
    numbers = [number_of(picture) for picture in pictures]
    if any(number < 0 for number in numbers):  # shown before the first key frame
        times = np.array(pts_s)
    else:
        assert (np.diff(numbers) > 0).all()
        times = ticks(variable)[numbers] / RATE
    return Truth(np.array(pictures), times - times[0])


def config(decoder: str, fps: float) -> VideoConfig:
    video = VideoConfig(fps=fps, max_frames=100, max_video_tokens=10_000, decode_workers=1)
    return video.model_copy(update={"decoder": decoder})


def shown_at(truth: Truth, clip: Clip) -> np.ndarray:
    """Indices of the pictures on display at the clip's times."""
    slack = 0.5 / clip.video_fps if clip.frame_times_s is None else 0.011  # GIF's clock ticks in 10 ms
    return np.searchsorted(truth.times_s, clip.timestamps_s + slack, side="right") - 1


def assert_same(read: np.ndarray, pictures: np.ndarray) -> None:
    """Another number differs by more than 20, another conversion of colours by less than 4."""
    distance = np.abs(read.astype(float) - pictures).mean((1, 2, 3))
    assert read.shape == pictures.shape and distance.max() < 4, distance.round(1)


CASES = [(kind, variant) for kind in KINDS for variant in ("plain", *kind.variants.split())]


@pytest.mark.parametrize(("kind", "variant"), CASES, ids=[f"{k.name}-{v}" for k, v in CASES])
def test_the_frame_of_a_time_is_the_picture_shown_then(kind, variant, tmp_path):
    path = tmp_path / kind.name
    if variant in ("cut", "torn"):
        write(tmp_path / f"whole-{kind.name}", kind, "b" if "b" in kind.variants else "plain")
        cut(tmp_path / f"whole-{kind.name}", path, kind, variant == "torn")
    else:
        write(path, kind, variant)
    truth = what_is_shown(path, variant == "vfr")
    assert len(truth.times_s) > NUM_PICTURES / 2
    for decoder in DECODERS:
        video = config(decoder, 7)
        try:
            clip = plan_clip("a", path, video, 32)
        except ConfigError:  # torchcodec is not installed
            continue
        assert clip.num_video_frames == len(truth.times_s)
        last_s = truth.times_s[-1] + 1 / RATE
        assert abs(clip.duration_s - last_s) < 0.15 and len(clip.frame_indices) >= 4
        np.testing.assert_array_equal(clip.frame_indices, shown_at(truth, clip))
        assert_same(read_frames(clip, video), truth.pictures[clip.frame_indices])
        every = np.random.default_rng(0).permutation(len(truth.times_s))
        assert_same(read_frames(replace(clip, frame_indices=every), video), truth.pictures[every])
