"""The Charades-STA reader on real clips, and the line and file that errors of bad input name."""

import csv
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.clips import DEFAULT_LEVELS, DURATION_S, VIDEO_FPS, write_split
from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets import read_prompts
from video_opd.errors import ClipError, DataError, InputError
from video_opd.grounding import temporal_iou

VIDEO = VideoConfig(fps=2, max_frames=24, max_video_tokens=256)
MULTIPLE = 32


def config(folder: Path, **options) -> DatasetConfig:
    return DatasetConfig(
        annotations=str(folder / "annotations.txt"),
        lengths=str(folder / "lengths.csv"),
        videos=str(folder / "videos"),
        **options,
    )


def read(folder: Path, **options):
    return read_prompts(config(folder, **options), VIDEO, MULTIPLE)


@pytest.fixture
def folder(split_folder, tmp_path):
    """A copy of the split that a test may damage."""
    return shutil.copytree(split_folder, tmp_path / "split")


def test_every_line_is_a_prompt_with_its_span_query_and_clip(split_folder):
    lines = (split_folder / "annotations.txt").read_text().splitlines()
    prompts = read(split_folder)
    assert len(prompts) == len(lines) > 6
    for prompt, line in zip(prompts, lines, strict=True):
        head, sentence = line.split("##")
        video_id, start, end = head.split(" ")
        assert prompt.answer_spans_s == ((float(start), float(end)),)
        assert prompt.query == sentence
        assert prompt.clip.clip_id == video_id
        assert prompt.clip.video_path == str(split_folder / "videos" / f"{video_id}.mp4")
        assert 0 <= float(start) < float(end) <= prompt.clip.duration_s
    assert len({p.prompt_id for p in prompts}) == len(prompts)


def test_clips_say_how_long_they_are_and_which_frames_are_seen(split_folder):
    for prompt in read(split_folder):
        clip = prompt.clip
        assert (clip.num_video_frames, clip.video_fps, clip.duration_s) == (
            DURATION_S * VIDEO_FPS,
            VIDEO_FPS,
            DURATION_S,
        )
        assert clip.frame_indices.tolist() == list(range(0, DURATION_S * VIDEO_FPS, 2))
        assert clip.frame_size == (32, 32)


def test_prompts_of_one_video_share_its_clip(split_folder):
    clips: dict[str, set[int]] = {}
    for prompt in read(split_folder):
        clips.setdefault(prompt.clip.clip_id, set()).add(id(prompt.clip))
    assert len(clips) == 6 and all(len(objects) == 1 for objects in clips.values())


def test_max_prompts_keeps_the_first(split_folder):
    assert [p.prompt_id for p in read(split_folder, max_prompts=3)] == [
        p.prompt_id for p in read(split_folder)
    ][:3]


def test_the_same_arguments_write_the_same_split(split_folder, tmp_path):
    write_split(tmp_path / "again", "train", 6, DEFAULT_LEVELS)
    for name in ("annotations.txt", "lengths.csv", "videos/train00000.mp4", "videos/train00005.mp4"):
        assert (tmp_path / "again" / name).read_bytes() == (split_folder / name).read_bytes(), name


def test_splits_are_drawn_from_different_seeds(split_folder, tmp_path):
    def events(folder: Path) -> list[str]:
        return [line.partition(" ")[2] for line in (folder / "annotations.txt").read_text().splitlines()]

    drawn = [events(split_folder)]
    for split in ("pretrain", "eval"):
        write_split(tmp_path / split, split, 6, DEFAULT_LEVELS)
        drawn.append(events(tmp_path / split))
    for one, other in itertools.combinations(drawn, 2):
        assert len(set(one) & set(other)) < len(one) / 2


def test_a_split_is_replaced_whole(split_folder, tmp_path):
    folder = tmp_path / "split"
    write_split(folder, "eval", 3, DEFAULT_LEVELS)
    write_split(folder, "train", 6, DEFAULT_LEVELS)
    assert {p.name for p in (folder / "videos").iterdir()} == {
        p.name for p in (split_folder / "videos").iterdir()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["split"]


def failure(folder: Path, kind: type[InputError], *named: str, **options) -> str:
    """The message of read_prompts' error: one line that names all of `named`."""
    with pytest.raises(kind) as caught:
        read(folder, **options)
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message
    for name in named:
        assert name in message
    return message


def line_of(folder: Path, number: int, change: Callable[[str], str]) -> str:
    """Replaces a line of the annotations; `FILE:NUMBER` as errors must name it."""
    path = folder / "annotations.txt"
    lines = path.read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines) + "\n")
    return f"{path}:{number}:"


@pytest.mark.parametrize(
    "text",
    [
        "train00000 1.0 2.0 the sentence",  # no ##
        "train00000 1.0 2.0##",  # no sentence
        "train00000 1.0##a sentence",  # no end
        "train00000 one 2.0##a sentence",
        "train00000 1.0 2.0s##a sentence",
        "##a sentence",
        "no format at all",
    ],
)
def test_a_line_of_another_format_is_named(folder, text):
    where = line_of(folder, 3, lambda _: text)
    assert failure(folder, DataError, where, "VIDEO_ID start end##sentence").startswith(where)


def test_line_numbers_count_blank_lines_which_are_skipped(folder):
    path = folder / "annotations.txt"
    count = len(path.read_text().splitlines())
    path.write_text("\n  \n" + path.read_text())
    assert len(read(folder)) == count
    failure(folder, DataError, line_of(folder, 4, lambda _: "bad"))


@pytest.mark.parametrize(
    "span", ["5.0 2.0", "3.0 3.0", "-1.0 2.0", "nan 2.0", "1.0 nan", "1.0 inf", "-inf 2.0"]
)
def test_an_interval_that_is_none_is_named(folder, span):
    where = line_of(folder, 2, lambda line: re.sub(r" \S+ \S+##", f" {span}##", line, count=1))
    assert failure(folder, DataError, where, "is not an interval").startswith(where)


def test_several_bad_intervals_are_counted_and_the_first_of_them_named(folder):
    lines = (folder / "annotations.txt").read_text().splitlines()
    spans = ["5.0 2.0", "nan 2.0", "0.0 99.0", "3.0 3.0"]
    changed = [
        re.sub(r" \S+ \S+##", f" {span}##", line, count=1) for line, span in zip(lines, spans, strict=False)
    ]
    (folder / "annotations.txt").write_text("\n".join([*changed, *lines[4:]]))
    message = failure(
        folder, DataError, "4 such lines in all", "annotations.txt:1: 5.0 to 2.0", "annotations.txt:2: nan"
    )
    assert (
        "annotations.txt:3: the annotation ends at 99.0 s" in message
        and "txt:4" not in message
        and "\n" not in message
    )


def test_spoiled_labels_are_wrong_listed_and_leave_all_else_as_it_was(tmp_path):
    folders = [tmp_path / name for name in ("clean", "spoiled")]
    for folder, share in zip(folders, (0.0, 0.3), strict=True):
        write_split(folder, "train", 20, DEFAULT_LEVELS, spoil_frac=share)
    clean, spoiled = ([span for p in read(folder) for span in p.answer_spans_s or ()] for folder in folders)
    rows = list(csv.DictReader((folders[1] / "spoiled.csv").open()))
    assert len(rows) == round(0.3 * len(clean))
    truth = {int(row["line"]) - 1: (float(row["true_start_s"]), float(row["true_end_s"])) for row in rows}
    for i, (a, b) in enumerate(zip(clean, spoiled, strict=True)):
        assert a == truth.get(i, b)
        assert (temporal_iou(a, b) < 0.3) if i in truth else a == b
    assert list(csv.DictReader((folders[0] / "spoiled.csv").open())) == []
    one, other = ((folder / "videos" / "train00003.mp4").read_bytes() for folder in folders)
    assert one == other


def test_an_annotation_beyond_the_clips_end_is_named_or_clamped_within_the_allowance(folder):
    where = line_of(folder, 2, lambda line: re.sub(r" \S+ \S+##", " 9.0 12.4##", line, count=1))
    assert failure(folder, DataError, where, "12.4", "12.0", "clamp_s=0.4").startswith(where)
    failure(folder, DataError, where, clamp_s=0.3)
    clamped = read(folder, clamp_s=0.5)
    assert clamped[1].answer_spans_s == ((9.0, 12.0),)
    _, start, end = (folder / "annotations.txt").read_text().split("##")[0].split()
    assert clamped[0].answer_spans_s == ((float(start), float(end)),)


def test_an_annotation_that_starts_beyond_the_clips_end_is_not_clamped_into_an_empty_interval(folder):
    where = line_of(folder, 2, lambda line: re.sub(r" \S+ \S+##", " 12.1 12.4##", line, count=1))
    failure(folder, DataError, where, clamp_s=1.0)


def test_a_video_without_a_length_is_named(folder):
    path = folder / "lengths.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "train00000" not in line))
    message = failure(folder, DataError, f"{folder / 'annotations.txt'}:1:", "train00000", str(path))
    assert "length" in message


@pytest.mark.parametrize(
    "text", ["id,seconds\ntrain00000,12.0\n", "name,length\ntrain00000,12.0\n", "id,length\ntrain00000\n"]
)
def test_a_length_file_without_its_columns_is_named(folder, text):
    (folder / "lengths.csv").write_text(text)
    failure(folder, DataError, str(folder / "lengths.csv"), "id and length")


@pytest.mark.parametrize("length", ["long", "", "nan", "inf", "-3", "0"])
def test_a_length_that_is_no_number_of_seconds_is_named(folder, length):
    path = folder / "lengths.csv"
    path.write_text(path.read_text().replace("train00000,12.0", f"train00000,{length}"))
    failure(folder, DataError, str(path), "length")


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_annotations_without_a_line_are_named(folder, text):
    (folder / "annotations.txt").write_text(text)
    failure(folder, DataError, str(folder / "annotations.txt"), "no annotations")


@pytest.mark.parametrize("name", ["annotations.txt", "lengths.csv"])
def test_a_file_that_is_missing_or_not_text_is_named(folder, name):
    (folder / name).write_bytes(b"\xff\xfe\x81")
    failure(folder, DataError, str(folder / name))
    (folder / name).unlink()
    failure(folder, DataError, str(folder / name))


def _missing(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("this is not a video\n" * 50)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_missing, _empty, _text, _cut, _folder])
def test_a_video_that_cannot_be_opened_is_named_with_the_line_that_asks_for_it(folder, damage):
    lines = (folder / "annotations.txt").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.startswith("train00002 "))
    video = folder / "videos" / "train00002.mp4"
    damage(video)
    message = failure(folder, ClipError, str(video))
    assert message.startswith(f"{folder / 'annotations.txt'}:{number}: ")
