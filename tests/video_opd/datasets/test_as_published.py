"""An evaluation reads the truth as its file has it; training cuts it at the clip's end or refuses it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets import read_prompts
from video_opd.errors import DataError

VIDEO = VideoConfig(fps=2, max_frames=24, max_video_tokens=256)
ODD = ["2.0 13.1", "3.0 3.0", "5.0 2.0", "13.0 14.0", "-1.0 2.0", "0.5 12.01"]  # of clips of 12 s
AS_PUBLISHED = [((float(start), float(end)),) for start, end in map(str.split, ODD)]


@pytest.fixture
def folder(split_folder, tmp_path) -> Path:
    """A copy of the split whose truths are ODD."""
    folder = shutil.copytree(split_folder, tmp_path / "split")
    (folder / "annotations.txt").rename(folder / "annotations")
    write_truths(folder, ODD)
    return folder


def write_truths(folder: Path, truths: list[str]) -> None:
    file = folder / "annotations"
    lines = file.read_text().splitlines()[: len(truths)]
    pairs = zip(lines, truths, strict=True)
    file.write_text("".join(f"{line.split()[0]} {truth}##a man stands\n" for line, truth in pairs))


def read(folder: Path, as_published: bool, **options: Any) -> list:
    files: dict[str, Any] = {name: str(folder / name) for name in ("annotations", "videos")}
    files |= {} if "format" in options else {"lengths": str(folder / "lengths.csv")}
    dataset = DatasetConfig(**files, **options)
    return [p.answer_spans_s for p in read_prompts(dataset, VIDEO, 32, as_published)]


@pytest.mark.parametrize("clamp_s", [0.0, 5.0])
def test_odd_truth_is_kept_for_an_evaluation_whatever_clamp_s_says(folder, clamp_s):
    assert read(folder, as_published=True, clamp_s=clamp_s) == AS_PUBLISHED
    with pytest.raises(DataError, match="4 such lines" if clamp_s else "6 such lines"):
        read(folder, as_published=False, clamp_s=clamp_s)


@pytest.mark.parametrize("truth", ["nan 3.0", "1.0 inf"])
def test_a_truth_that_is_no_number_stays_an_error(folder, truth):
    write_truths(folder, [*ODD[:5], truth])
    with pytest.raises(DataError, match=r"annotations:6: .* is not an interval"):
        read(folder, as_published=True)


def test_an_evaluation_cuts_no_truth_by_a_frame(folder):
    """Without an annotated duration, training forgives what passes the file's end by less than a frame."""
    video = next((folder / "videos").iterdir()).name
    records = [{"vid": video, "query": "a", "span": [[2.0, 12.05], [1.0, 3.0]]}]
    (folder / "annotations").write_text(json.dumps(records))
    assert read(folder, as_published=False, format="videomind") == [((2.0, 12.0), (1.0, 3.0))]
    assert read(folder, as_published=True, format="videomind") == [((2.0, 12.05), (1.0, 3.0))]


def test_the_last_chunk_of_didemo_ends_with_the_video(folder):
    """That is what a chunk is: it is no option."""
    video = next((folder / "videos").iterdir()).name
    (folder / "annotations").write_text(
        json.dumps([{"video": video, "description": "a", "times": [[1, 2]] * 4}])
    )
    assert read(folder, as_published=True, format="didemo") == [((5.0, 12.0),)]
