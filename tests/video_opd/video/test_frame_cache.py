"""The node's cache: each clip decoded once, by whichever process comes first, and a bound on what is kept."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import video_opd.video.frame_cache
from tests.videos import noise, write_video
from video_opd.config_data import VideoConfig
from video_opd.errors import ClipError, ConfigError
from video_opd.video.clips import plan_clip, read_frames
from video_opd.video.frame_cache import FrameCache, digest_of

CLIP_BYTES = 24 * 32 * 32 * 3
ENTRY_BYTES = CLIP_BYTES + 2048  # with times and headers
ROOT = Path(__file__).resolve().parents[3]


def settings(folder: Path, max_bytes: int = 1 << 20) -> VideoConfig:
    return VideoConfig(
        fps=2, max_frames=24, max_video_tokens=256, cache_dir=str(folder), cache_bytes=max_bytes
    )


@pytest.fixture(scope="module")
def planned(split_folder, tmp_path_factory):
    """Four clips; the frames of one take CLIP_BYTES."""
    video = settings(tmp_path_factory.mktemp("unused"))
    return [plan_clip(path.stem, path, video, 32) for path in sorted((split_folder / "videos").iterdir())[:4]]


@pytest.fixture
def decodes(monkeypatch):
    """The clips that were really decoded, in order."""
    decoded = []

    def counting(clip, video):
        decoded.append(clip.clip_id)
        return read_frames(clip, video)

    monkeypatch.setattr(video_opd.video.frame_cache, "read_frames", counting)
    return decoded


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def test_each_clip_is_decoded_once_and_its_frames_are_those_decoded(planned, decodes, tmp_path):
    video = settings(tmp_path)
    caches = [FrameCache(video), FrameCache(video)]
    for _ in range(3):
        for cache in caches:
            for clip in planned:
                np.testing.assert_array_equal(cache.read(clip), read_frames(clip, video))
    assert decodes == [clip.clip_id for clip in planned]
    assert [cache.num_decodes for cache in caches] == [4, 0]


def test_timestamps_and_digest_lie_beside_the_frames(planned, tmp_path):
    clip = planned[0]
    frames = FrameCache(settings(tmp_path)).read(clip)
    (path,) = kept(tmp_path)
    with pa.memory_map(str(path)) as file:
        digest, times, pixels = (pa.ipc.read_tensor(file).to_numpy() for _ in range(3))
    assert digest.tobytes().hex() == digest_of(frames)
    np.testing.assert_array_equal(times, clip.timestamps_s)
    np.testing.assert_array_equal(pixels, frames)


def test_frames_are_hashed_when_they_are_decoded_and_never_again(planned, tmp_path, monkeypatch):
    hashed = []

    def counting(frames):
        hashed.append(frames.shape)
        return digest_of(frames)

    monkeypatch.setattr(video_opd.video.frame_cache, "digest_of", counting)
    caches = [FrameCache(settings(tmp_path)) for _ in range(3)]
    digests = {cache.read_with_digest(clip)[1] for cache in caches for clip in planned}
    assert digests == {digest_of(caches[0].read(clip)) for clip in planned}
    assert len(hashed) == len(digests) == len(planned)


def test_a_digest_tells_pixels_and_shapes_apart():
    frames = np.arange(24 * 4 * 4 * 3).astype(np.uint8).reshape(24, 4, 4, 3)
    others = frames, frames + 1, frames[::-1], frames.reshape(24, 2, 8, 3), frames[:, ::-1], frames[:12]
    assert len({digest_of(other) for other in others}) == len(others)
    assert digest_of(frames[:, ::-1]) == digest_of(frames[:, ::-1].copy())


def test_frames_cannot_be_changed_whether_decoded_or_mapped(planned, tmp_path):
    cache = FrameCache(settings(tmp_path))
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            cache.read(planned[0])[0] = 0


READER = """
import sys
from pathlib import Path
from video_opd.config_data import VideoConfig
from video_opd.video.clips import plan_clip
from video_opd.video.frame_cache import FrameCache
folder, videos = sys.argv[1:]
video = VideoConfig(fps=2, max_frames=24, max_video_tokens=256, cache_dir=folder)
clips = [plan_clip(p.stem, p, video, 32) for p in sorted(Path(videos).iterdir())]
cache = FrameCache(video)
sums = [int(cache.read(c).sum()) for _ in range(3) for c in clips]
print(cache.num_decodes, *sums)
"""


def test_processes_share_it_and_decode_each_clip_once_between_them(split_folder, tmp_path):
    command = [sys.executable, "-c", READER, str(tmp_path), str(split_folder / "videos")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    readers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    lines = [reader.communicate()[0].split() for reader in readers]
    assert all(reader.returncode == 0 for reader in readers)
    assert sum(int(line[0]) for line in lines) == 6
    assert lines[0][1:] == lines[1][1:] == lines[2][1:]


def test_threads_that_want_the_same_clip_wait_for_one_decode(planned, decodes, tmp_path):
    cache, together = FrameCache(settings(tmp_path)), threading.Barrier(4)

    def read(_):
        together.wait()
        return cache.read(planned[0]).sum()

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(read, range(4)))) == 1
    assert len(decodes) == 1


def test_it_is_bounded_and_drops_what_was_used_longest_ago(planned, decodes, tmp_path):
    a, b, c, d = planned
    cache = FrameCache(settings(tmp_path, 2 * ENTRY_BYTES))
    for clip in (a, b, a, c):  # c drives out b
        cache.read(clip)
    assert len(decodes) == 3
    cache.read(a)
    assert len(decodes) == 3
    for clip in (b, d, c):
        cache.read(clip)
        assert sum(path.stat().st_size for path in kept(tmp_path)) <= 2 * ENTRY_BYTES
    assert decodes[3:] == [b.clip_id, d.clip_id, c.clip_id]


def test_an_evicted_clip_stays_readable_where_it_is_mapped(planned, tmp_path):
    cache = FrameCache(settings(tmp_path, 1 * ENTRY_BYTES))
    cache.read(planned[0])
    mapped = cache.read(planned[0])
    expected = mapped.copy()
    for clip in planned[1:]:
        cache.read(clip)
    assert len(kept(tmp_path)) == 1
    np.testing.assert_array_equal(mapped, expected)


def test_a_clip_larger_than_the_cache_is_still_read(planned, tmp_path):
    video = settings(tmp_path, 1)
    cache = FrameCache(video)
    for clip in planned:
        np.testing.assert_array_equal(cache.read(clip), read_frames(clip, video))
    assert not kept(tmp_path)


def test_other_frames_another_size_and_another_decoder_are_other_entries(planned, tmp_path):
    video, clip = settings(tmp_path), planned[0]
    cache = FrameCache(video)
    for variant in (
        clip,
        replace(clip, frame_indices=clip.frame_indices + 1),
        replace(clip, frame_size=(64, 64)),
    ):
        np.testing.assert_array_equal(cache.read(variant), read_frames(variant, video))
    FrameCache(video.model_copy(update={"decoder": "pyav"})).read(clip)
    assert len(kept(tmp_path)) == 4


def test_one_path_in_two_spellings_is_one_file_and_a_replaced_file_another(tmp_path, decodes):
    path, video = tmp_path / "a.mp4", settings(tmp_path / "cache")
    write_video(path, noise(60))
    (tmp_path / "sub").mkdir()
    cache = FrameCache(video)
    cache.read(plan_clip("one", path, video, 32))
    cache.read(plan_clip("two", tmp_path / "sub" / ".." / "a.mp4", video, 32))
    assert decodes == ["one"]
    clip = plan_clip("one", path, video, 32)
    write_video(path, noise(60, seed=1))
    np.testing.assert_array_equal(cache.read(clip), read_frames(clip, video))
    path.unlink()
    with pytest.raises(ClipError, match="is missing"):
        cache.read(clip)


def test_a_torn_entry_is_made_again(planned, decodes, tmp_path):
    cache = FrameCache(settings(tmp_path))
    expected = cache.read(planned[0]).copy()
    (path,) = kept(tmp_path)
    for size in (0, 100, path.stat().st_size // 2, path.stat().st_size - 1):
        with path.open("r+b") as file:
            file.truncate(size)
        np.testing.assert_array_equal(cache.read(planned[0]), expected)
    assert len(decodes) == 5


def test_without_room_the_frames_are_there_all_the_same(planned, tmp_path, caplog):
    cache = FrameCache(settings(tmp_path))
    shutil.rmtree(tmp_path / "locks")
    (tmp_path / "locks").mkdir()
    no_room = OSError(28, "No space left on device")

    def full(*_):
        raise no_room

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(video_opd.video.frame_cache.os, "replace", full)
        frames, digest = cache.read_with_digest(planned[0])
    assert frames.shape == (24, 32, 32, 3) and digest == digest_of(frames)
    assert "No space left" in caplog.text
    assert not [p for p in tmp_path.iterdir() if p.is_file()], "nothing is left lying about"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"video\.cache_dir="):
        FrameCache(settings(tmp_path / "file"))
