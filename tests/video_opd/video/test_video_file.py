"""What a file shows where its container says more than its packets, and where its index is wrong."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.videos import noise, set_matrix, write_video
from video_opd.config_data import VideoConfig
from video_opd.errors import ClipError, FailureKind
from video_opd.video.clips import describe_video, plan_clip, read_frames

ONE = 0x10000
MATRICES = {  # (a, b, c, d): what is at (x, y) is shown at (a x + c y, b x + d y)
    "upright": ((ONE, 0, 0, ONE), lambda p: p),
    "mirrored": ((-ONE, 0, 0, ONE), lambda p: p[:, ::-1]),
    "upside down": ((ONE, 0, 0, -ONE), lambda p: p[::-1]),
    "half a turn": ((-ONE, 0, 0, -ONE), lambda p: p[::-1, ::-1]),
    "a quarter clockwise": ((0, ONE, -ONE, 0), lambda p: np.rot90(p, -1)),
    "a quarter back": ((0, -ONE, ONE, 0), np.rot90),
    "rows are columns": ((0, ONE, ONE, 0), lambda p: p.transpose(1, 0, 2)),
    "rows are columns, half a turn": ((0, -ONE, -ONE, 0), lambda p: p.transpose(1, 0, 2)[::-1, ::-1]),
}
DECODERS = ("decord", "pyav")


def config(decoder: str) -> VideoConfig:
    return VideoConfig.model_validate({"fps": 2, "max_video_tokens": 10_000, "decoder": decoder})


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def copy(source: Path, path: Path, late_s: float, sound: bool = False) -> None:
    """The packets, later by late_s, without encoding; perhaps with a sound that begins at 0."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream: Any = old.streams.video[0]
        mine = new.add_stream_from_template(stream, opaque=True)
        silence = new.add_stream("aac", rate=16000) if sound else None
        packets: list[Any] = [p for p in old.demux(stream) if p.size]
        late = round(late_s / stream.time_base)
        for packet in packets:
            packet.stream, packet.pts, packet.dts = mine, packet.pts + late, packet.dts + late
            new.mux(packet)
        if silence:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            new.mux(silence.encode(frame) + silence.encode())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", MATRICES)
def test_a_display_matrix_is_obeyed(kind, decoder, tmp_path):
    path, (matrix, show) = tmp_path / "a.mp4", MATRICES[kind]
    write_video(path, noise(30, 48, 64))
    coded = decode_all(path)
    set_matrix(path, matrix)
    clip = plan_clip("a", path, config(decoder), 16)
    frames = read_frames(clip, config(decoder))
    np.testing.assert_array_equal(frames, np.stack([show(coded[i]) for i in clip.frame_indices]))


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_late_picture_is_told(suffix, sound, tmp_path):
    write_video(tmp_path / "a.mp4", noise(60))
    copy(tmp_path / "a.mp4", tmp_path / f"late.{suffix}", late_s=2.0, sound=sound)
    info = describe_video(tmp_path / f"late.{suffix}", config("decord"))
    assert (info.num_frames, info.fps, info.times_s, info.num_hidden) == (60, 30.0, None, 0)
    assert info.late_s == pytest.approx(2.0, abs=0.05)
    assert describe_video(tmp_path / "a.mp4", config("decord")).late_s == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_pictures_that_an_edit_list_hides_are_told_and_not_counted(decoder, tmp_path):
    frames = noise(60)
    write_video(tmp_path / "a.mp4", frames)
    copy(tmp_path / "a.mp4", tmp_path / "cut.mp4", late_s=-1.0)
    clip = plan_clip("a", tmp_path / "cut.mp4", config(decoder), 32)
    info = describe_video(tmp_path / "cut.mp4", config(decoder))
    assert (info.num_frames, info.num_hidden, clip.num_video_frames, clip.duration_s) == (30, 30, 30, 1.0)
    shown = decode_all(tmp_path / "a.mp4")[30:]
    np.testing.assert_array_equal(read_frames(clip, config(decoder)), shown[clip.frame_indices])


@pytest.mark.parametrize("suffix", ["ts", "mkv", "avi", "flv"])
def test_a_file_that_ends_within_a_picture_shows_the_others(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write_video(path, noise(60))
    whole = decode_all(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    clip = plan_clip("a", path, config("decord"), 32)
    assert 30 < clip.num_video_frames < 45
    clip = replace(clip, frame_indices=np.arange(30))
    np.testing.assert_array_equal(read_frames(clip, config("decord")), whole[:30])


@pytest.mark.parametrize("now", [40, 59, 90])
def test_a_file_without_index_that_was_replaced_is_told(now, tmp_path):
    path = tmp_path / "a.ts"
    write_video(path, noise(60))
    clip = plan_clip("a", path, config("decord"), 32)
    write_video(path, noise(now))
    with pytest.raises(ClipError, match=f"had 60 frames, now {now}: it was replaced") as caught:
        read_frames(clip, config("decord"))
    assert caught.value.kind == FailureKind.REPLACED


def test_a_hole_in_a_recording_keeps_the_times_of_the_others(tmp_path):
    """Packets 20 to 39 are missing; with mjpeg a packet is a picture."""
    path = tmp_path / "a.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25, options={"g": "1", "qscale": "2"})
        stream.width = stream.height = 64
        packets = [
            p
            for f in [*noise(60, 64, 64), None]
            for p in stream.encode(f if f is None else av.VideoFrame.from_ndarray(f, format="rgb24"))
        ]
        container.mux(packets[:20] + packets[40:])
    info = describe_video(path, config("decord"))
    assert info.num_frames == 40 and info.times_s is not None
    expected = np.delete(np.arange(60), np.arange(20, 40)) / 25
    np.testing.assert_allclose(info.times_s, expected, atol=1e-4)


def test_equal_timestamps_do_not_void_the_others(tmp_path):
    """6 s at 25 frames a second, then 12 s at 5; two neighbours have the same time."""
    times = np.concatenate([np.arange(150) * 40, 6000 + np.arange(60) * 200])
    written = np.where(np.arange(210) == 75, times[74], times)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for pixels, time in zip(noise(210), written, strict=True):
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                packet.pts = packet.dts = int(time)
                packet.time_base = Fraction(1, 1000)
                container.mux(packet)
    for decoder in DECODERS:
        clip = plan_clip("a", tmp_path / "a.mkv", config(decoder), 32)
        assert clip.duration_s == pytest.approx(18, abs=0.2)
        info = describe_video(tmp_path / "a.mkv", config(decoder))
        assert info.times_s is not None
        np.testing.assert_allclose(info.times_s, times / 1000, atol=1e-6)
        every = replace(clip, frame_indices=np.arange(210)[::-1])
        np.testing.assert_array_equal(
            read_frames(every, config(decoder)), decode_all(tmp_path / "a.mkv")[::-1]
        )


def test_an_empty_packet_leaves_the_picture_before_it_on_display(tmp_path):
    """As in AVI and Ogg; NUT lets them be written."""
    path = tmp_path / "a.nut"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for number, pixels in enumerate(noise(20)):
            for packet in [
                *stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")),
                av.Packet(b""),
            ]:
                packet.stream, packet.time_base = stream, Fraction(1, 25)
                packet.pts = packet.dts = 2 * number + (not packet.size)
                container.mux(packet)
    info = describe_video(path, config("decord"))
    assert (info.num_frames, info.times_s) == (20, None) and info.fps == pytest.approx(12.5)


def test_key_frames_that_the_container_only_claims_are_not_begun_at(tmp_path):
    """An mp4 without its table of key frames (stss) claims that every frame is one. decord believes it."""
    path = tmp_path / "a.mp4"
    write_video(path, noise(60))
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    shown = decode_all(path)
    for decoder in DECODERS:
        clip = replace(plan_clip("a", path, config(decoder), 32), frame_indices=np.arange(60)[::-1])
        np.testing.assert_array_equal(read_frames(clip, config(decoder)), shown[::-1])


def test_fewer_pictures_than_the_index_says_is_an_error(tmp_path):
    """h264 whose last packet holds no picture, only a parameter."""
    path = tmp_path / "a.mp4"
    write_video(tmp_path / "whole.mp4", noise(60))
    with av.open(str(tmp_path / "whole.mp4")) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0], opaque=True)
        packets: list[Any] = [p for p in old.demux(video=0) if p.size]
        empty = av.Packet(b"\0\0\0\1\x0c")  # of filler
        empty.time_base, empty.pts, empty.dts = packets[-1].time_base, 10**5, packets[-1].dts + 1
        for packet in [*packets, empty]:
            packet.stream = copy
            new.mux(packet)
    for decoder in DECODERS:
        clip = plan_clip("a", path, config(decoder), 32)
        assert clip.num_video_frames == 61
        with pytest.raises(ClipError, match="frame 60 of 61 is not in it"):
            read_frames(replace(clip, frame_indices=np.array([0, 60])), config(decoder))


def test_av1_is_read_whatever_the_decoder(tmp_path):
    """decord has no decoder for it."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libsvtav1", rate=25, options={"preset": "12", "svtav1-params": "lp=1"})
        stream.width = stream.height = 64
        for pixels in noise(30, 64, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    for decoder in DECODERS:
        clip = plan_clip("a", tmp_path / "a.mp4", config(decoder), 32)
        shown = decode_all(tmp_path / "a.mp4")[clip.frame_indices]
        np.testing.assert_array_equal(read_frames(clip, config(decoder)), shown)


def test_what_no_decoder_reads_is_one_line_that_names_the_tool(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, noise(30))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xxxx"))
    for decoder in DECODERS:
        with pytest.raises(ClipError, match=r"a\.mp4 .*ffmpeg -i FILE -c:v libx264 NEW\.mp4") as caught:
            plan_clip("a", path, config(decoder), 32)
        assert "\n" not in str(caught.value)
