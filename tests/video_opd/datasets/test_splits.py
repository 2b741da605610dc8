"""A split is its annotations: what cannot be used today has its place, its reason and no other effect."""

import shutil
from pathlib import Path

import pytest

from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets import Split, read_split
from video_opd.errors import ClipError, DataError, FailureKind
from video_opd.types import FailedPrompt, Prompt

VIDEO = VideoConfig(fps=2, max_frames=24, max_video_tokens=256)


@pytest.fixture
def folder(split_folder, tmp_path) -> Path:
    """A split of its own, to break."""
    return shutil.copytree(split_folder, tmp_path / "train")


def config(folder: Path, **options) -> DatasetConfig:
    paths = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    return DatasetConfig(**{k: str(folder / name) for k, name in paths.items()}, **options)


def ids_of(split: Split) -> list[str]:
    return [p.prompt_id for p in split.pool]


def change_line(folder: Path, number: int, text: str) -> str:
    path = folder / "annotations.txt"
    lines = path.read_text().splitlines()
    before, lines[number - 1] = lines[number - 1], text.format(lines[number - 1].split()[0])
    path.write_text("\n".join(lines) + "\n")
    return before


def test_what_cannot_be_read_keeps_its_place_and_nothing_else_changes(folder):
    whole = read_split(config(folder), VIDEO, 32)
    (folder / "videos" / "train00001.mp4").unlink()
    (folder / "videos" / "train00003.mp4").write_bytes(b"no video")
    split = read_split(config(folder, unreadable="drop"), VIDEO, 32)
    assert ids_of(split) == ids_of(whole) and split.key == whole.key and len(split) == len(whole)
    videos = {name.split(":")[0] for name in split.failed}
    assert videos == {"train00001", "train00003"}
    for place, (ours, theirs) in enumerate(zip(split.pool, whole.pool, strict=True)):
        if isinstance(ours, FailedPrompt):
            assert str(folder / "videos" / ours.prompt_id.split(":")[0]) in ours.reason
        else:
            assert str(ours) == str(theirs) and split[place] is ours
    kinds = {p.prompt_id.split(":")[0]: p.kind for p in split.pool if isinstance(p, FailedPrompt)}
    assert kinds == {"train00001": FailureKind.MISSING, "train00003": FailureKind.BROKEN}
    assert split.prompts == [p for p in split.pool if isinstance(p, Prompt)]


def test_max_prompts_counts_annotations(folder):
    (folder / "videos" / "train00000.mp4").unlink()
    split = read_split(config(folder, unreadable="drop", max_prompts=8), VIDEO, 32)
    assert ids_of(split) == ids_of(read_split(config(folder, unreadable="drop"), VIDEO, 32))[:8]
    assert len(split) == 8 and 0 < len(split.failed) < 8


def test_the_number_of_unreadable_videos_is_said_in_one_short_line(folder):
    for path in (folder / "videos").iterdir():
        path.write_bytes(b"no video")
    with pytest.raises(ClipError) as caught:
        read_split(config(folder), VIDEO, 32)
    total = len((folder / "annotations.txt").read_text().splitlines())
    message = str(caught.value)
    assert f"({total} such lines in all" in message and "datasets check`" in message
    assert "\n" not in message and message.count("no video") <= 3 and len(message) < 1200
    with pytest.raises(DataError, match=f"none of its {total} prompts can be used, first train00000:1"):
        read_split(config(folder, unreadable="drop"), VIDEO, 32)


FAULTS = ["{} 5.0 2.0##reversed", "{} 3.0 3.0##empty", "{} 0.0 99.0##beyond", "{} nan 2.0##no number"]


def test_faulty_annotations_are_dropped_by_place_or_refused_with_the_command_that_leaves_them_out(folder):
    whole = read_split(config(folder), VIDEO, 32)
    for number, text in enumerate(FAULTS, 2):
        change_line(folder, number, text)
    with pytest.raises(DataError, match=r"txt:2: .*4 such lines in all, .*datasets convert` leaves them out"):
        read_split(config(folder), VIDEO, 32)
    split = read_split(config(folder, faulty="drop"), VIDEO, 32)
    assert ids_of(split) == ids_of(whole)
    assert list(split.failed) == ids_of(whole)[1:5] and "5.0 to 2.0" in split.failed[ids_of(whole)[1]]
    assert split.key != whole.key, "its annotations are others"


def test_published_truth_is_neither_cut_nor_refused_unless_it_is_no_number(folder):
    for number, text in enumerate(FAULTS[:3], 2):
        change_line(folder, number, text)
    split = read_split(config(folder, clamp_s=100.0), VIDEO, 32, as_published=True)
    assert not split.failed
    assert [p.answer_spans_s for p in split.prompts[1:4]] == [((5.0, 2.0),), ((3.0, 3.0),), ((0.0, 99.0),)]
    change_line(folder, 5, FAULTS[3])
    with pytest.raises(DataError, match=r"annotations\.txt:5: nan to 2.0 is not an interval"):
        read_split(config(folder, faulty="drop"), VIDEO, 32, as_published=True)


def test_the_key_tells_apart_what_results_depend_on(folder):
    key = read_split(config(folder), VIDEO, 32).key
    fewer_frames = VIDEO.model_copy(update={"max_frames": 4})
    assert read_split(config(folder), fewer_frames, 32).key == key
    assert read_split(config(folder, max_prompts=5), VIDEO, 32).key != key
    assert read_split(config(folder, clamp_s=1.0), VIDEO, 32).key != key
    change_line(folder, 2, "{} 1.0 2.0##the red square is visible")
    assert read_split(config(folder), VIDEO, 32).key != key
