"""What videos hold is asked once: of new and of changed files, by several workers, for all processes."""

import os
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.videos import noise, write_images, write_video
from video_opd.config_data import VideoConfig
from video_opd.errors import ClipError, FailureKind
from video_opd.video import descriptions
from video_opd.video.clips import describe_video
from video_opd.video.descriptions import FOLDER, describe_all
from video_opd.video.video_file import VideoInfo

VIDEO = VideoConfig(decode_workers=2, frame_folder_fps=4.0)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the videos that are opened, as they are."""
    names: list[str] = []

    def describe(path: str, video: VideoConfig) -> VideoInfo:
        names.append(Path(path).name)
        return describe_video(path, video)

    monkeypatch.setattr(descriptions, "describe_video", describe)
    return names


@pytest.fixture
def videos(tmp_path) -> dict[str, str]:
    """Name -> path: files of constant and variable rate, a folder of images, a broken and a missing file."""
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "even.mp4", noise(20))
    write_video(folder / "uneven.mp4", noise(8), times_ms=np.array([0, 40, 500, 900, 1000, 3000, 3500, 4000]))
    write_images(folder / "images", noise(4))
    (folder / "broken.mp4").write_bytes(b"no video")
    return {n: str(folder / n) for n in ("even.mp4", "uneven.mp4", "images", "broken.mp4", "missing.mp4")}


def same(one: VideoInfo | ClipError, other: VideoInfo | ClipError) -> bool:
    """Whether two descriptions have equal fields, or two errors are alike."""
    if isinstance(one, ClipError):
        return isinstance(other, ClipError) and str(one) == str(other)
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(VideoInfo)]
    return all(
        type(a) is type(b) and np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs
    )


def test_a_second_start_opens_only_what_changed(videos, opened, tmp_path):
    first = describe_all(videos.values(), VIDEO, str(tmp_path))
    assert sorted(opened) == ["broken.mp4", "even.mp4", "images", "uneven.mp4"]
    kinds = {n: p.kind for n in videos if isinstance(p := first[videos[n]], ClipError)}
    assert kinds == {"broken.mp4": FailureKind.BROKEN, "missing.mp4": FailureKind.MISSING}
    opened.clear()
    again = describe_all(videos.values(), VIDEO, str(tmp_path))
    assert opened == [] and first.keys() == again.keys()
    assert all(same(first[path], again[path]) for path in first)
    uneven = again[videos["uneven.mp4"]]
    assert isinstance(uneven, VideoInfo) and uneven.times_s is not None and uneven.times_s[5] == 3.0

    opened.clear()
    write_video(Path(videos["even.mp4"]), noise(30))
    copy = tmp_path / "copy.mp4"  # of the same size and time, under the same name
    shutil.copy2(videos["uneven.mp4"], copy)
    os.replace(copy, videos["uneven.mp4"])
    changed = describe_all(videos.values(), VIDEO, str(tmp_path))[videos["even.mp4"]]
    assert sorted(opened) == ["even.mp4", "uneven.mp4"]
    assert isinstance(changed, VideoInfo) and changed.num_frames == 30


def test_another_decoder_or_other_code_is_asked_anew(videos, opened, tmp_path, monkeypatch):
    paths = [videos["even.mp4"]]
    describe_all(paths, VIDEO, str(tmp_path))
    describe_all(paths, VIDEO.model_copy(update={"decoder": "pyav"}), str(tmp_path))
    monkeypatch.setattr(descriptions, "_reader", lambda _: "of another version")
    describe_all(paths, VIDEO, str(tmp_path))
    assert opened == ["even.mp4"] * 3
    describe_all(paths, VIDEO, None)
    assert opened == ["even.mp4"] * 4, "nothing is kept without a folder"


def test_damaged_and_half_written_files_are_left_out_and_an_interrupted_start_keeps_its_work(
    videos, opened, tmp_path, monkeypatch
):
    monkeypatch.setattr(descriptions, "FILES_A_WRITE", 1)
    describe_all([videos["even.mp4"], videos["uneven.mp4"]], VIDEO, str(tmp_path))
    one, other = (tmp_path / FOLDER).rglob("*.parquet")
    one.write_bytes(one.read_bytes()[:-9])
    other.with_suffix(".parquet.tmp").write_bytes(b"PAR1")
    opened.clear()
    describe_all([videos["even.mp4"], videos["uneven.mp4"]], VIDEO, str(tmp_path))
    assert len(opened) == 1

    def fail(path: str, video: VideoConfig) -> VideoInfo:
        if "images" in path:
            raise KeyboardInterrupt
        return describe_video(path, video)

    monkeypatch.setattr(descriptions, "FILES_A_WRITE", 1000)
    monkeypatch.setattr(descriptions, "describe_video", fail)
    elsewhere = str(tmp_path / "elsewhere")
    with pytest.raises(KeyboardInterrupt):
        describe_all([videos["even.mp4"], videos["images"]], VIDEO, elsewhere)
    monkeypatch.setattr(
        descriptions, "describe_video", lambda path, _: pytest.fail(f"{path} is opened again")
    )
    assert isinstance(describe_all([videos["even.mp4"]], VIDEO, elsewhere)[videos["even.mp4"]], VideoInfo)


def test_a_listed_video_is_not_taken_from_what_is_kept(videos, tmp_path):
    """It could be opened; its frames could not be decoded. Annotations may name it by a link."""
    path, listed = videos["even.mp4"], tmp_path / "quarantine.jsonl"
    (tmp_path / "linked").symlink_to(tmp_path / "videos")
    linked = str(tmp_path / "linked" / "even.mp4")
    describe_all([path, linked], VIDEO, str(tmp_path))
    status = os.stat(path)
    stamp = f"{status.st_size}:{status.st_mtime_ns}"
    listed.write_text(
        f'{{"video": "{path}", "stamp": "{stamp}", "decoder": "decord", "reason": "is dull"}}\n'
    )
    video = VIDEO.model_copy(update={"quarantine": str(listed)})
    assert all("is dull" in str(p) for p in describe_all([path, linked], video, str(tmp_path)).values())


@pytest.mark.parametrize(("num_cpus", "asked", "used"), [(2, 4, 4), (16, 4, 16), (500, 4, 32), (500, 64, 64)])
def test_workers_are_as_many_as_cpus_within_reason(num_cpus, asked, used, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cpus)))
    assert descriptions._in_parallel(VideoConfig(decode_workers=asked)).decode_workers == used


def test_a_folder_that_cannot_be_written_is_a_warning(videos, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = describe_all([videos["even.mp4"]], VIDEO, str(tmp_path / "file"))
    assert isinstance(found[videos["even.mp4"]], VideoInfo) and "is not kept" in caplog.text
