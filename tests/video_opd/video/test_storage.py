"""What a video's storage says fails that video alone, and never puts it in quarantine."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.videos import noise, write_video
from video_opd.config_data import VideoConfig
from video_opd.errors import ClipError, FailureKind
from video_opd.video import decode_worker, frame_cache, quarantine
from video_opd.video.clips import plan_clip, read_frames
from video_opd.video.decode_pool import DecodePool
from video_opd.video.descriptions import describe_all
from video_opd.video.frame_cache import FrameCache


@pytest.fixture
def video(tmp_path) -> VideoConfig:
    """With a quarantine and a cache of its own."""
    files = {"quarantine": str(tmp_path / "quarantine.jsonl"), "cache_dir": str(tmp_path / "frames")}
    small = VideoConfig(fps=2, max_frames=24, max_video_tokens=256, decode_workers=1)
    return small.model_copy(update=files)


def listed(video: VideoConfig) -> list[dict]:
    path = Path(video.quarantine or "")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


REFUSALS = [
    (errno.ESTALE, FailureKind.UNREACHABLE),
    (errno.EIO, FailureKind.UNREACHABLE),
    (errno.EACCES, FailureKind.UNREACHABLE),
    (errno.ENOENT, FailureKind.MISSING),
    (errno.ENOTDIR, FailureKind.MISSING),
]


@pytest.mark.parametrize(("code", "kind"), REFUSALS)
def test_a_stat_that_fails_is_an_error_of_the_video(code, kind, video, tmp_path, monkeypatch):
    path = str(tmp_path / "a.mp4")
    write_video(Path(path), noise(20))
    clip = plan_clip("a", path, video, 32)

    def refuse(_: str) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(quarantine, "file_stamp", refuse)
    attempts = (
        lambda: plan_clip("a", path, video, 32),
        lambda: read_frames(clip, video),
        lambda: FrameCache(video).read(clip),
    )
    for attempt in attempts:
        with pytest.raises(ClipError, match=path) as caught:
            attempt()
        assert caught.value.kind == kind and "\n" not in str(caught.value)
    found = describe_all([path], video, None)[path]
    assert isinstance(found, ClipError) and found.kind == kind and not listed(video)


def test_links_in_a_circle_are_an_error_of_the_video(video, tmp_path):
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    with pytest.raises(ClipError, match="cannot be read now") as caught:
        plan_clip("a", tmp_path / "a.mp4", video, 32)
    assert caught.value.kind == FailureKind.UNREACHABLE


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_file_whose_bytes_cannot_be_read_is_tried_again(decoder, video, tmp_path):
    """A process's memory, which begins with a page that nobody may read: EIO, or EACCES."""
    (tmp_path / "a.mp4").symlink_to(f"/proc/{os.getpid()}/mem")
    video = video.model_copy(update={"decoder": decoder})
    for _ in range(2):
        with pytest.raises(ClipError, match=r"cannot be read now") as caught:
            plan_clip("a", tmp_path / "a.mp4", video, 32)
        assert caught.value.kind == FailureKind.UNREACHABLE
    assert not listed(video)


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(errno.ENOSPC, "No space left")])
def test_a_lack_of_memory_does_not_condemn_the_video(error):
    class Greedy:
        def __init__(self, path: str):
            raise error

    worker = decode_worker.DecodeWorker(Greedy, buffer=None)  # pyright: ignore[reportArgumentType]
    answer = worker.answer("describe", __file__, indices=[], num_video_frames=0)  # pyright: ignore[reportArgumentType]
    assert isinstance(answer, OSError) and answer.errno == errno.ENOMEM


@pytest.mark.parametrize(
    ("number", "kind", "num_listed"),
    [
        (signal.SIGTERM, "worker_killed", 0),
        (signal.SIGHUP, "worker_killed", 0),
        (signal.SIGABRT, "decoder_crashed", 1),
    ],
)
def test_a_worker_that_was_told_to_end_does_not_condemn_the_video(number, kind, num_listed, video, tmp_path):
    """As all of a process group are; abort() is the decoder's own."""
    path = tmp_path / f"{number.name}.mp4"
    path.write_bytes(b"x")
    video = video.model_copy(update={"decoder": "tests.bad_decoders:IsSignalled"})
    with pytest.raises(ClipError) as caught:
        read_frames(plan_clip("a", path, video, 32), video)
    assert caught.value.kind == kind and len(listed(video)) == num_listed


@pytest.mark.parametrize(
    ("kind", "days", "tried"), [("too_slow", 2, 1), ("too_slow", 0.5, 0), ("broken", 99, 0)]
)
def test_a_video_that_was_too_slow_is_tried_again_the_next_day(kind, days, tried, video, tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, noise(20))
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 86400))
    entry = {"video": str(path), "stamp": quarantine.video_stamp(str(path)), "decoder": video.decoder}
    entry |= {"reason": "is listed", "kind": kind, "since": since}
    Path(video.quarantine or "").write_text(json.dumps(entry) + "\n")
    found = describe_all([str(path)], video, None)[str(path)]
    assert isinstance(found, ClipError) is not bool(tried)


@pytest.mark.parametrize(("name", "done"), [("file/quarantine.jsonl", "written"), ("folder", "read")])
def test_a_quarantine_that_cannot_be_used_is_a_warning(name, done, tmp_path, caplog):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    video = VideoConfig(quarantine=str(tmp_path / name))
    with pytest.raises(ClipError, match="cannot be decoded"):
        plan_clip("a", path, video, 32)
    assert f"cannot be {done}" in caplog.text


def test_a_cache_that_cannot_be_locked_is_a_warning(video, tmp_path, monkeypatch, caplog):
    path = tmp_path / "a.mp4"
    write_video(path, noise(20))
    clip = plan_clip("a", path, video, 32)

    def no_locks(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(frame_cache.fcntl, "flock", no_locks)
    assert len(FrameCache(video).read(clip)) == len(clip.frame_indices)
    monkeypatch.setattr(DecodePool, "read", lambda *_: pytest.fail("was decoded again"))
    assert len(FrameCache(video).read(clip)) == len(clip.frame_indices)
    assert "cannot be locked (No locks available)" in caplog.text
