"""Decoding: workers and their deadlines, videos that are not plain, and videos that cannot be decoded."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.video_opd.video.test_clips import decode_all
from tests.videos import noise, write_audio, write_images, write_over_reporting, write_video
from video_opd.config import Config
from video_opd.config_data import VideoConfig
from video_opd.config_file import load_config
from video_opd.errors import BrokenVideo, ClipError, ConfigError, FailureKind
from video_opd.types import Clip
from video_opd.video.clips import plan_clip, read_frames
from video_opd.video.decode_pool import DecodePool
from video_opd.video.decoders import PyAVDecoder
from video_opd.video.video_file import VideoInfo

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
DECODERS = ("decord", "pyav")
CLIP_TIMEOUT_S = 1.5


def config(**options) -> VideoConfig:
    """Decoders of tests have no name in the configuration, so nothing is validated."""
    return VideoConfig(fps=2, max_frames=24, max_video_tokens=256).model_copy(
        update={"decode_timeout_s": 30.0, **options}
    )


def workers() -> set[int]:
    """Processes of this one that decode. Others may have ended without anybody's wait."""
    living = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return {p.pid for p in living if "decode_worker" in " ".join(p.cmdline())}


def shown_at(frames: np.ndarray, clip: Clip, video: VideoConfig) -> np.ndarray:
    """Which of `frames` the clip's are, by nearest picture: h264 is not lossless."""
    read = read_frames(clip, video).reshape(len(clip.frame_indices), -1).astype(np.float32)
    flat = frames.reshape(len(frames), -1).astype(np.float32)
    return np.array([int(np.abs(flat - f).mean(1).argmin()) for f in read])


# Workers


def test_workers_start_when_they_are_needed_and_are_used_again(tmp_path):
    write_video(tmp_path / "a.mp4", noise(30))
    before = workers()
    pool = DecodePool("decord", 2, 30.0)
    assert workers() == before
    for _ in range(3):
        pool.describe(str(tmp_path / "a.mp4"))
    (worker,) = workers() - before
    assert os.getsid(worker) == worker, "a signal for this group is not for it"
    pool.close()
    assert workers() == before


def test_a_worker_imports_no_framework():
    code = "import sys, video_opd.video.decode_worker; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(DEMO.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert not {"torch", "pydantic", "ray", "transformers", "pyarrow", "av", "decord"} & {
        *done.stdout.split()
    }


@pytest.mark.engine
@pytest.mark.parametrize("decoder", ["HangsOnRead", "HangsOnOpen"])
def test_a_decoder_that_hangs_holding_the_gil_is_killed_at_the_deadline(decoder, tmp_path):
    path = tmp_path / "bad.mp4"
    path.write_bytes(b"x")
    before = workers()
    video = config(decoder=f"tests.bad_decoders:{decoder}", decode_timeout_s=CLIP_TIMEOUT_S)
    with pytest.raises(ClipError, match=rf"bad.mp4 was not decoded within {CLIP_TIMEOUT_S} s") as caught:
        read_frames(plan_clip("bad", path, video, 32), video)
    assert "\n" not in str(caught.value) and caught.value.kind == FailureKind.TOO_SLOW
    assert workers() == before, "the worker is gone"


@pytest.mark.engine
def test_after_a_worker_was_killed_the_next_clip_is_read_and_the_broken_one_fails_at_once(
    tmp_path, monkeypatch
):
    bad, good = tmp_path / "bad.mp4", tmp_path / "good.mp4"
    for path in (bad, good):
        path.write_bytes(b"x")
    video = config(
        decoder="tests.bad_decoders:HangsOnRead", decode_timeout_s=CLIP_TIMEOUT_S, decode_workers=1
    )
    clips = [plan_clip(path.stem, path, video, 32) for path in (bad, good)]
    with pytest.raises(ClipError, match="was not decoded within"):
        read_frames(clips[0], video)
    assert (read_frames(clips[1], video) == 128).all()
    monkeypatch.setattr(DecodePool, "read", lambda *_: pytest.fail("was decoded again"))
    with pytest.raises(ClipError, match="was not decoded within") as caught:
        read_frames(clips[0], video)
    assert caught.value.kind == FailureKind.TOO_SLOW


def test_a_decoder_that_crashes_fails_the_clip_alone(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    video = config(decoder="tests.bad_decoders:Crashes")
    clip = plan_clip("a", path, video, 32)
    with pytest.raises(ClipError, match=f"crash.*{-signal.SIGSEGV}") as caught:
        read_frames(clip, video)
    assert caught.value.kind == FailureKind.DECODER_CRASHED


def test_a_worker_that_the_system_killed_does_not_condemn_the_video(tmp_path):
    path, listed = tmp_path / "a.mp4", tmp_path / "quarantine.jsonl"
    path.write_bytes(b"x")
    video = config(decoder="tests.bad_decoders:IsKilled", quarantine=str(listed))
    clip = plan_clip("a", path, video, 32)
    for _ in range(2):
        with pytest.raises(ClipError, match="its worker was killed") as caught:
            read_frames(clip, video)
        assert caught.value.kind == FailureKind.WORKER_KILLED
    assert not listed.exists()


@pytest.mark.parametrize(
    "error",
    [ClipError("gone", FailureKind.MISSING), BrokenVideo("a.mp4", "hung", FailureKind.TOO_SLOW)],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_message_and_kind_from_process_to_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.kind) == (type(error), str(error), error.kind)


DESCRIBE = """
import sys, time
from pathlib import Path
from video_opd.video.decode_pool import DecodePool
pool = DecodePool(sys.argv[1], 1, 3.0)
pool.describe(sys.argv[2])
Path(sys.argv[2] + ".opened").touch()
time.sleep(600)
"""


@pytest.mark.engine
@pytest.mark.parametrize("decoder", ["decord", "tests.bad_decoders:HangsOnOpen"])
def test_no_worker_outlives_its_parent(decoder, tmp_path):
    """An idle one sees its socket close; one that hangs while it holds the GIL is ended by its alarm."""
    path, opened = tmp_path / "a.mp4", tmp_path / "a.mp4.opened"
    write_video(path, noise(30))
    environment = os.environ | {"PYTHONPATH": str(DEMO.parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", DESCRIBE, decoder, str(path)], env=environment)
    while not opened.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert len(workers) == 1 and not alive


@pytest.mark.engine
@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_a_long_clip_comes_in_parts(suffix, tmp_path):
    """More frames than fit one answer: the same frames."""
    path = tmp_path / f"a.{suffix}"
    write_video(path, noise(8, 240, 320))
    pool = DecodePool("decord", 1, 60.0)
    indices = np.arange(8).repeat(40)  # 70 MiB, PART_BYTES are 64 MiB
    parts = [part.copy() for part in pool.read(str(path), indices, 8, 0.0)]
    pool.close()
    assert len(parts) == 2
    np.testing.assert_array_equal(np.concatenate(parts), decode_all(path)[indices])


# Decoders


def test_a_decoder_that_does_not_import_is_one_line(tmp_path):
    write_video(tmp_path / "a.mp4", noise(30))
    try:
        import torchcodec  # noqa: F401

        pytest.skip("torchcodec imports here")
    except (ImportError, OSError, RuntimeError):
        pass
    with pytest.raises(
        ConfigError, match=r"video.decoder=torchcodec cannot be imported here \(.+\)"
    ) as caught:
        plan_clip("a", tmp_path / "a.mp4", config(decoder="torchcodec"), 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("seed", range(3))
def test_every_decoder_gives_the_same_frames_in_any_order(decoder, seed, tmp_path):
    write_video(tmp_path / "a.mp4", noise(60))
    indices = np.random.default_rng(seed).integers(0, 60, 20)
    pool = DecodePool(decoder, 1, 30.0)
    info = pool.describe(str(tmp_path / "a.mp4"))
    assert info == VideoInfo(num_frames=60, fps=30.0, size=(32, 32), times_s=None, key_gap=info.key_gap)
    read = np.concatenate([part.copy() for part in pool.read(str(tmp_path / "a.mp4"), indices, 60, 0.0)])
    pool.close()
    np.testing.assert_array_equal(read, decode_all(tmp_path / "a.mp4")[indices])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_file_without_presentation_times_has_a_constant_rate(decoder, tmp_path):
    """h264 in AVI."""
    write_video(tmp_path / "a.avi", noise(60))
    video = config(decoder=decoder)
    clip = plan_clip("a", tmp_path / "a.avi", video, 32)
    assert clip.is_plain and clip.frame_indices.tolist() == [0, 15, 30, 45]
    np.testing.assert_array_equal(
        read_frames(clip, video), decode_all(tmp_path / "a.avi")[clip.frame_indices]
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_name_may_have_any_characters(decoder, tmp_path):
    path = tmp_path / "видео 影片 é\n'x'.mp4"
    write_video(path, noise(60))
    video = config(decoder=decoder)
    clip = plan_clip("a", path, video, 32)
    np.testing.assert_array_equal(read_frames(clip, video), decode_all(path)[clip.frame_indices])


# Times


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def variable(request, tmp_path_factory):
    """(path, frames, times in ms): rates from 5 to 50 a second, and one picture shown for three seconds."""
    rng = np.random.default_rng(1)
    gaps = rng.choice([20, 33, 200], 119)
    gaps[60] = 3000
    times = np.concatenate([[0], np.cumsum(gaps)])
    path = tmp_path_factory.mktemp("variable") / f"a.{request.param}"
    write_video(path, noise(120), times_ms=times)
    return path, noise(120), times


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_of_a_variable_rate_are_those_on_display_and_bear_their_own_times(decoder, variable):
    path, frames, times = variable
    video = config(decoder=decoder, max_frames=100)
    clip = plan_clip("a", path, video, 32)
    assert clip.frame_times_s is not None and not clip.is_plain
    np.testing.assert_allclose(clip.timestamps_s, times[clip.frame_indices] / 1000, atol=2e-3)
    assert len(clip.frame_indices) % 2 == 0 and (np.diff(clip.frame_indices) > 0).all()
    on_display = np.unique(np.searchsorted(times, np.arange(0, times[-1], 500) + 1, side="right") - 1)
    assert set(clip.frame_indices) <= set(on_display) and len(clip.frame_indices) >= len(on_display) - 1
    np.testing.assert_array_equal(shown_at(frames, clip, video), clip.frame_indices)


def test_bounds_hold_for_a_variable_rate(variable):
    path, _, times = variable
    few = plan_clip("a", path, config(max_frames=6), 32)
    assert len(few.frame_indices) <= 6 and few.timestamps_s[-1] > times[-1] / 1000 * 0.6
    many = plan_clip("a", path, config(fps=0.1, min_frames=20), 32)
    assert len(many.frame_indices) == 20


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_cut_has_the_frames_between_its_ends_and_times_from_its_start(decoder, tmp_path):
    frames = noise(300)
    write_video(tmp_path / "a.mp4", frames)
    video = config(decoder=decoder)
    clip = plan_clip("a", tmp_path / "a.mp4", video, 32, cut_s=(2.5, 6.5))
    assert clip.frame_indices.tolist() == list(range(75, 195, 15))
    np.testing.assert_allclose(clip.timestamps_s, np.arange(8) / 2, atol=1e-9)
    assert (clip.start_s, clip.duration_s, clip.sampled_fps) == (2.5, 4.0, 2.0)
    np.testing.assert_array_equal(shown_at(frames, clip, video), clip.frame_indices)


def test_a_cut_of_a_variable_rate(variable):
    path, _, times = variable
    clip = plan_clip("a", path, config(max_frames=100), 32, cut_s=(1.0, 3.0))
    inside = times[clip.frame_indices] / 1000
    assert inside.min() >= 1.0 - 2e-3 and inside.max() < 3.0
    np.testing.assert_allclose(clip.timestamps_s, inside - 1.0, atol=2e-3)


def test_the_whole_video_as_a_cut_is_the_video(tmp_path):
    write_video(tmp_path / "a.mp4", noise(90))
    whole, cut = (plan_clip("a", tmp_path / "a.mp4", config(), 32, cut_s) for cut_s in (None, (0.0, 99.0)))
    assert whole.is_plain and cut.is_plain
    assert (
        whole.frame_indices.tolist() == cut.frame_indices.tolist()
        and whole.duration_s == cut.duration_s == 3.0
    )


@pytest.mark.parametrize(
    "cut_s", [(-1.0, 2.0), (2.0, 2.0), (2.0, 1.0), (3.0, 5.0), (float("nan"), 2.0), (0.0, float("inf"))]
)
def test_a_cut_outside_the_video_is_an_error(cut_s, tmp_path):
    write_video(tmp_path / "a.mp4", noise(90))
    with pytest.raises(ClipError, match="not part of it") as caught:
        plan_clip("a", tmp_path / "a.mp4", config(), 32, cut_s)
    assert caught.value.kind == FailureKind.OTHER


def test_a_cut_without_two_frames_is_an_error(tmp_path):
    write_video(tmp_path / "a.mp4", noise(90))
    with pytest.raises(ClipError, match=r"1 frames from 1\.0 to 1\.01 s"):
        plan_clip("a", tmp_path / "a.mp4", config(), 32, (1.0, 1.01))


# Frame folders


@pytest.mark.parametrize("first", [0, 1, 95])
def test_a_folder_of_numbered_images_is_a_video(first, tmp_path):
    frames = noise(30)
    write_images(tmp_path / "clip", frames, first)
    (tmp_path / "clip" / "notes.txt").write_text("not a frame")
    video = config(frame_folder_fps=3.0)
    clip = plan_clip("a", tmp_path / "clip", video, 32)
    assert (clip.num_video_frames, clip.video_fps, clip.duration_s) == (30, 3.0, 10.0)
    np.testing.assert_array_equal(read_frames(clip, video), frames[clip.frame_indices])
    np.testing.assert_allclose(clip.timestamps_s, np.floor(np.arange(20) * 1.5) / 3)


def test_frame_folders_that_do_not_say_what_they_are(tmp_path):
    write_images(tmp_path / "clip", noise(4))
    with pytest.raises(ClipError, match=r"set video\.frame_folder_fps"):
        plan_clip("a", tmp_path / "clip", config(), 32)
    video = config(frame_folder_fps=3.0)
    (tmp_path / "clip" / "frame_00003.png").unlink()
    with pytest.raises(ClipError, match="no image 3, 1 of its numbers"):
        plan_clip("a", tmp_path / "clip", video, 32)
    (tmp_path / "clip" / "frame_00003.png").write_bytes(b"not an image")
    clip = plan_clip("a", tmp_path / "clip", video, 32)
    with pytest.raises(ClipError, match=r"frame_00003\.png cannot be read"):
        read_frames(clip, video)
    (tmp_path / "clip" / "3.jpg").write_bytes(b"again")
    with pytest.raises(ClipError, match="have the same number"):
        plan_clip("a", tmp_path / "clip", video, 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipError, match="no numbered images"):
        plan_clip("a", tmp_path / "empty", video, 32)


# Bad input


def make_truncated(path: Path) -> None:
    write_video(path, noise(120))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_hollow(path: Path) -> None:
    """The index is whole, the pictures from the second on are zeros."""
    write_video(path, noise(120))
    data = bytearray(path.read_bytes())
    first, last = data.find(b"mdat") + 8 + 3000, data.rfind(b"moov") - 4
    data[first:last] = bytes(last - first)
    path.write_bytes(data)


BROKEN = {
    "truncated": make_truncated,
    "zero_byte": lambda path: path.write_bytes(b""),
    "wrong_type": lambda path: path.write_text("this is a text, not a video\n" * 100),
    "missing": lambda path: None,
    "audio_only": write_audio,
    "one_frame": lambda path: write_video(path, noise(1)),
    "hollow": make_hollow,
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_video_is_one_line_that_names_it(kind, decoder, tmp_path):
    path = tmp_path / f"{kind}.mp4"
    BROKEN[kind](path)
    video = config(decoder=decoder)
    with pytest.raises(ClipError) as caught:
        read_frames(plan_clip("a", path, video, 32), video)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.kind == ("missing" if kind == "missing" else "broken")


class NoRate(PyAVDecoder):
    @property
    def info(self) -> VideoInfo:
        return replace(super().info, fps=0.0)


def test_a_video_of_no_rate_is_an_error(tmp_path):
    write_video(tmp_path / "a.mp4", noise(60))
    with pytest.raises(ClipError, match=r"a\.mp4 has 60 frames at 0.0 a second"):
        plan_clip("a", tmp_path / "a.mp4", config(decoder="tests.video_opd.video.test_decoding:NoRate"), 32)


@pytest.mark.parametrize("decoder", DECODERS)
def test_packets_without_a_picture_are_not_counted(decoder, tmp_path):
    """60 packets, 30 pictures."""
    frames = noise(60)
    write_over_reporting(tmp_path / "a.webm", frames)
    video = config(decoder=decoder)
    clip = plan_clip("a", tmp_path / "a.webm", video, 32)
    assert (clip.num_video_frames, clip.duration_s) == (30, 1.0)
    assert shown_at(frames, clip, video).tolist() == clip.frame_indices.tolist() == [0, 7, 15, 22]


# Quarantine


def test_a_broken_video_is_listed_with_its_reason_and_not_tried_again_until_it_is_replaced(
    tmp_path, monkeypatch
):
    path, listed = tmp_path / "ü.mp4", tmp_path / "sub" / "quarantine.jsonl"
    path.write_bytes(b"")
    video = config(quarantine=str(listed))
    with pytest.raises(ClipError, match="cannot be decoded"):
        plan_clip("a", path, video, 32)
    (line,) = listed.read_text().splitlines()
    entry = json.loads(line)
    assert (
        entry["video"] == str(path)
        and entry["decoder"] == "decord"
        and "cannot be decoded" in entry["reason"]
        and entry["kind"] == "broken"
    )

    elsewhere = tmp_path / "copy.jsonl"  # as another process or run reads it
    elsewhere.write_bytes(listed.read_bytes())
    again = config(quarantine=str(elsewhere))
    with monkeypatch.context() as patched:
        patched.setattr(DecodePool, "describe", lambda *_: pytest.fail("was opened again"))
        with pytest.raises(ClipError, match="cannot be decoded"):
            plan_clip("a", path, again, 32)
    write_video(path, noise(60))
    assert plan_clip("a", path, again, 32).num_video_frames == 60
    assert len(elsewhere.read_text().splitlines()) == 1


def test_lines_that_others_add_or_take_out_are_seen(tmp_path):
    path, listed = tmp_path / "a.mp4", tmp_path / "quarantine.jsonl"
    write_video(path, noise(60))
    video = config(quarantine=str(listed))
    plan_clip("a", path, video, 32)
    status = path.stat()
    line = {
        "video": str(path),
        "stamp": f"{status.st_size}:{status.st_mtime_ns}",
        "decoder": "decord",
        "reason": "is dull",
    }
    for kind in ("broken", "too_slow"):  # a line without a kind is broken
        with listed.open("a") as file:
            file.write(json.dumps(line) + "\n")
        with pytest.raises(ClipError, match="is dull") as caught:
            plan_clip("a", path, video, 32)
        assert caught.value.kind == kind
        line["kind"] = "too_slow"
    listed.write_text("")
    plan_clip("a", path, video, 32)
    listed.write_text("hello\n")
    with pytest.raises(ConfigError, match=r"quarantine\.jsonl:1"):
        plan_clip("a", path, video, 32)


# Configuration


def test_a_deadline_beyond_the_requests_own_is_refused():
    with pytest.raises(ConfigError, match="decode_timeout_s=700 must be below request_timeout_s=600"):
        load_config(DEMO, ["video.decode_timeout_s=700"])
    assert isinstance(load_config(DEMO), Config)
