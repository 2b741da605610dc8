"""A few lines of every annotation format -> rows of the manifest -> prompts, and the errors of bad input."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest

from video_opd.config_data import AnnotationFormat, DatasetConfig, VideoConfig
from video_opd.datasets import prompts, read_prompts
from video_opd.datasets.check import convert
from video_opd.datasets.formats import FORMATS, detect
from video_opd.datasets.manifest import write_manifest
from video_opd.datasets.source import read_source
from video_opd.datasets.videos import VideoFolder
from video_opd.errors import ClipError, ConfigError, DataError, InputError
from video_opd.schemas import MANIFEST

DATA = Path(__file__).parent / "annotations"
VIDEO = VideoConfig(fps=2, max_frames=24, max_video_tokens=256)
VIDEOS = [  # one clip of 12 s under all the names that the golden files ask for, by every part of the rule
    "3MSZA.mp4",
    "I28Y0.webm",
    "v_QOlSCBRmfWY.mkv",
    "bP5KfdFJzC4_660.0_810.0.mp4",
    "cosmo_cap/BVs52yd-RUQ.mp4",
    "didemo/54322086@N00_2408598493.mp4",
    "timerft_data/QtWT8rxUuNk.mp4",
    "4jujhM5qhEc_00:00:39:000_00:00:51:000.mp4",
    "KgO7MJNO3oo.mp4",
    "KWZSA.mp4",
    "s37-d29-cam-002.avi",
    "10015567@N08_3655084291_d8b58466fa.mov.mp4",
    "a@b.avi",
    "s27-d50-cam-002.avi",
    "ABCDEFGHIJK.m4v",
]
# (prompt_id, video, query, spans, duration, cut, fps)
GOLDEN: dict[str, list[tuple]] = {
    "charades_sta": [
        ("3MSZA:1", "3MSZA.mp4", "person turn a light on.", [[2.4, 8.2]], 12.0, None, None),
        ("3MSZA:2", "3MSZA.mp4", "a person ## laughs.", [[0.0, 12.0]], 12.0, None, None),
        ("I28Y0:3", "I28Y0.webm", "person closes a door", [[0.5, 4.25]], 12.02, None, None),
    ],
    "csv": [  # one prompt for each video and query, its rows are intervals
        ("3MSZA:2", "3MSZA.mp4", "The light goes on, at last", [[2.4, 8.2], [10.0, 11.5]], None, None, None),
        ("I28Y0:3", "I28Y0.webm", "A door opens", [[1.0, 4.0]], None, None, None),
        ("3MSZA:6", "3MSZA.mp4", "she sits", [[1.0, 2.0]], None, None, None),
    ],
    "vue_tr": [  # V1 and V2
        ("3MSZA:1", "3MSZA.mp4", " a bookshelf", [[1.0, 3.0], [5.0, 8.5]], 12.0, None, None),
        ("v_QOlSCBRmfWY:2", "v_QOlSCBRmfWY.mkv", "Child's Pose", [[0.0, 12.0]], 12.0, None, None),
    ],
    "moment_seeker": [
        ("3MSZA:1", "3MSZA.mp4", "A player scores a goal.", [[1.0, 2.5], [4.0, 6.0]], None, None, None),
        ("KWZSA:2", "KWZSA.mp4", "Where is the cup?", [[10.0, 11.5]], None, None, None),
    ],
    "timelens2": [
        ("3MSZA:1.1", "3MSZA.mp4", "The lamp is  on.", [[1.0, 2.5], [4.0, 6.0]], None, None, None),
        ("3MSZA:1.2", "3MSZA.mp4", "a door", [[0.5, 3.0]], None, None, None),
        ("ABCDEFGHIJK:2.1", "ABCDEFGHIJK.m4v", "the end", [[9.5, 12.0]], None, None, None),
    ],
    "timelens2_chat": [  # the published layout, and XTuner's
        ("3MSZA:1.1", "3MSZA.mp4", "When is the lamp on?", [[1.0, 2.0], [4.0, 6.0]], None, None, None),
        ("3MSZA:1.2", "3MSZA.mp4", "Show the door.", [[0.5, 3.0]], None, None, None),
        ("BVs52yd-RUQ:2.1", "cosmo_cap/BVs52yd-RUQ.mp4", "Find the end.", [[9.5, 12.0]], None, None, None),
    ],
    "ego4d_nlq": [  # files of clips; the second query has no text
        ("3MSZA:1", "3MSZA.mp4", "what did I put in the bowl?", [[1.5, 3.0]], 12.0, None, None),
        ("3MSZA:3", "3MSZA.mp4", "Where is the pan?", [[0.0, 8.9]], 12.0, None, None),
        ("I28Y0:4", "I28Y0.webm", "How many eggs?", [[0.5, 7.75]], 12.0, None, None),
    ],
    "charades_json": [
        ("3MSZA:1", "3MSZA.mp4", "person turn a light on.", [[2.4, 8.2]], 12.0, None, None),
        ("3MSZA:2", "3MSZA.mp4", "Person  sits.", [[1.0, 5.0]], 12.0, None, None),
        ("I28Y0:3", "I28Y0.webm", "person closes a door", [[0.5, 4.25]], 12.0, None, None),
    ],
    "activitynet": [
        (
            "v_QOlSCBRmfWY:1",
            "v_QOlSCBRmfWY.mkv",
            "A young woman is seen standing in a room.",
            [[0.83, 11.86]],
            12.11,
            None,
            None,
        ),
        (
            "v_QOlSCBRmfWY:2",
            "v_QOlSCBRmfWY.mkv",
            "The girl dances around; café.",
            [[4.33, 9.0]],
            12.11,
            None,
            None,
        ),
    ],
    "qvhighlights": [
        (
            "bP5KfdFJzC4_660.0_810.0:1",
            "bP5KfdFJzC4_660.0_810.0.mp4",
            "A family plays basketball.",
            [[0.0, 4.0], [6.0, 12.0]],
            12.0,
            None,
            None,
        ),
        (
            "bP5KfdFJzC4_660.0_810.0:2",
            "bP5KfdFJzC4_660.0_810.0.mp4",
            "No truth here ",
            None,
            12.0,
            None,
            None,
        ),
    ],
    "timelens_bench": [
        ("3MSZA:1", "3MSZA.mp4", "A woman flips the switch", [[5.0, 10.0]], 12.0, None, None),
        ("3MSZA:2", "3MSZA.mp4", "Why does she laugh?", [[0.0, 1.5]], 12.0, None, None),
    ],
    "timelens_100k": [
        (
            "BVs52yd-RUQ:1.1",
            "cosmo_cap/BVs52yd-RUQ.mp4",
            "When does the speaker introduce himself?",
            [[0.0, 5.0]],
            12.0,
            None,
            None,
        ),
        (
            "BVs52yd-RUQ:1.2",
            "cosmo_cap/BVs52yd-RUQ.mp4",
            "The bottle",
            [[1.0, 2.0], [8.0, 12.0]],
            12.0,
            None,
            None,
        ),
        (
            "54322086@N00_2408598493:2.1",
            "didemo/54322086@N00_2408598493.mp4",
            "a cat",
            [[3.0, 4.5]],
            12.0,
            None,
            None,
        ),
    ],
    "time_r1": [
        ("QtWT8rxUuNk:1", "timerft_data/QtWT8rxUuNk.mp4", "a purple hanger.", [[1.0, 4.0]], 12.0, None, None),
        (
            "4jujhM5qhEc_00:00:39:000_00:00:51:000:2",
            "4jujhM5qhEc_00:00:39:000_00:00:51:000.mp4",
            "the statue",
            [[3.5, 4.5]],
            12.0,
            None,
            None,
        ),
        ("KgO7MJNO3oo:3", "KgO7MJNO3oo.mp4", "cnn news", [[0.0, 3.5]], 8.0, (2.5, 10.5), None),
    ],
    "tvgbench": [
        ("KWZSA:1", "KWZSA.mp4", " a person was sitting.", [[3.4, 8.1]], 12.0, None, None),
        (
            "s37-d29:2",
            "s37-d29-cam-002.avi",
            "cut onion",
            [[0.41285778418392, 10.0]],
            12.3,
            (0.0, 12.0),
            None,
        ),
    ],
    "didemo": [  # mean chunks 0.5 and 0.75: 2.5 s and 8.75 s, whole seconds, halves to the even one
        (
            "10015567@N08_3655084291_d8b58466fa:1",
            "10015567@N08_3655084291_d8b58466fa.mov.mp4",
            "The cat jumps",
            [[2.0, 9.0]],
            None,
            (0.0, 12.0),
            None,
        ),
        (
            "a@b:2",
            "a@b.avi",
            "the end",
            [[10.0, 12.0]],
            None,
            (0.0, 12.0),
            None,
        ),  # its last chunk is shorter than 5 s
    ],
    "tacos": [
        ("s27-d50:1", "s27-d50-cam-002.avi", "He cuts.", [[0.0, 147 / 29.4]], 352 / 29.4, None, 29.4),
        (
            "s27-d50:2",
            "s27-d50-cam-002.avi",
            "She washes.",
            [[29 / 29.4, 294 / 29.4]],
            352 / 29.4,
            None,
            29.4,
        ),
    ],
    "videomind": [
        ("ABCDEFGHIJK:1", "ABCDEFGHIJK.m4v", "Someone waves", [[1.5, 3.0]], 12.0, None, None),
        (
            "BVs52yd-RUQ:2",
            "cosmo_cap/BVs52yd-RUQ.mp4",
            "two times",
            [[1.0, 2.0], [3.0, 4.0]],
            12.0,
            None,
            None,
        ),
    ],
}


@pytest.fixture(scope="module")
def videos(split_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name in VIDEOS:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(split_folder / "videos" / "train00000.mp4", folder / name)
    return folder


def golden_file(name: str) -> Path:
    return next(DATA.glob(f"{name}.[tj]*"))


def config(path: Path | str, videos: Path | str, name: str = "auto", **options) -> DatasetConfig:
    if "lengths" not in options and Path(path).suffix == ".txt":
        options["lengths"] = str(DATA / "charades_sta.csv")
    return DatasetConfig.model_validate(
        {"format": name, "annotations": str(path), "videos": str(videos), **options}
    )


def rows_of(dataset: DatasetConfig, output: Path) -> list[dict]:
    convert(dataset, output)
    return pq.read_table(output).to_pylist()


def row(prompt_id, video, query, spans, duration, cut, fps) -> dict:
    start, end = cut or (None, None)
    times = {"spans_s": spans, "duration_s": duration, "clip_start_s": start, "clip_end_s": end, "fps": fps}
    return {"prompt_id": prompt_id, "video": video, "query": query, **times}


def expected(name: str) -> list[dict]:
    return [row(*values) for values in GOLDEN[name]]


def without_source(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "source"} for row in rows]


def test_every_format_has_a_golden_file():
    in_parquet = {"video_opd"}  # test_released.py
    assert {*GOLDEN} | in_parquet == {*FORMATS} == {*get_args(AnnotationFormat)} - {"auto", "manifest"}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_file_becomes_its_rows_named_or_detected(name, videos, tmp_path):
    path = golden_file(name)
    assert detect(read_source(path)) == name
    for number, asked in enumerate(("auto", name)):
        rows = rows_of(config(path, videos, asked), tmp_path / f"{number}.parquet")
        assert without_source(rows) == expected(name)
        assert all(row["source"].startswith(f"{path.name}:") for row in rows)
        assert (tmp_path / f"{number}.left_out.csv").read_text().splitlines() == [
            "source,prompt_id,kind,reason"
        ]


@pytest.mark.parametrize("name", GOLDEN)
def test_byte_order_marks_line_ends_and_blank_lines_change_nothing(name, videos, tmp_path):
    path = tmp_path / golden_file(name).name
    text = golden_file(name).read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n  \r\n")
    options = {}
    if name == "charades_sta":
        lengths = tmp_path / "lengths.csv"
        lengths.write_bytes(
            b"\xef\xbb\xbf" + (DATA / "charades_sta.csv").read_bytes().replace(b"\n", b"\r\n")
        )
        options["lengths"] = str(lengths)
    assert without_source(rows_of(config(path, videos, **options), tmp_path / "m.parquet")) == expected(name)


@pytest.mark.parametrize(
    "name",
    [n for n in GOLDEN if n.endswith(("s", "k", "d", "o", "1", "h")) and golden_file(n).suffix == ".jsonl"],
)
def test_records_are_read_as_a_list_too(name, videos, tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[" + ",\n".join(golden_file(name).read_text().splitlines()) + "]")
    assert without_source(rows_of(config(path, videos), tmp_path / "m.parquet")) == expected(name)


class Planned:
    """Stands in for plan_clip: plans whole clips and records the cuts."""

    def __init__(self, monkeypatch):
        self.cuts, self._real = {}, prompts.plan_clip
        monkeypatch.setattr(prompts, "plan_clip", self)

    def __call__(self, clip_id, video_path, video, multiple, cut_s=None, info=None):
        self.cuts[clip_id] = cut_s
        return self._real(clip_id, video_path, video, multiple, None, info)


@pytest.mark.parametrize("name", GOLDEN)
def test_prompts_are_the_same_from_the_file_and_from_its_manifest(name, videos, tmp_path, monkeypatch):
    planned = Planned(monkeypatch)
    manifest = tmp_path / "m.parquet"
    rows = rows_of(config(golden_file(name), videos), manifest)
    direct = read_prompts(config(golden_file(name), videos), VIDEO, 32)
    again = read_prompts(config(manifest, videos), VIDEO, 32)
    assert read_prompts(config(manifest, videos, "manifest"), VIDEO, 32)[0].prompt_id == again[0].prompt_id
    for one, other, of_row in zip(direct, again, rows, strict=True):
        assert (one.prompt_id, one.query, one.answer_spans_s) == (
            other.prompt_id,
            other.query,
            other.answer_spans_s,
        )
        assert one.clip.video_path == other.clip.video_path == str(videos / of_row["video"])
        spans = of_row["spans_s"]
        assert one.answer_spans_s == (None if spans is None else tuple(map(tuple, spans)))
    cuts = {c for c in planned.cuts.values() if c}
    expected = {
        "time_r1": {(2.5, 10.5)},
        "tvgbench": {(0.0, 12.3), (0.0, 12.0)},
        "didemo": {(0.0, 15.0), (0.0, 12.0)},  # three chunks, the last one ends with the file
    }
    assert cuts == expected.get(name, set())


def test_a_clip_is_planned_once_for_each_part_of_a_file(videos, tmp_path, monkeypatch):
    planned = Planned(monkeypatch)
    rows = [
        {**row(f"a:{i}", "KWZSA.mp4", f"q{i}", [[0.0, 1.0]], None, cut, None), "source": ""}
        for i, cut in enumerate([None, (0.0, 4.0), (4.0, 8.5), (0.0, 4.0), None])
    ]
    write_manifest(rows, tmp_path / "m.parquet", {})
    read = read_prompts(config(tmp_path / "m.parquet", videos), VIDEO, 32)
    assert planned.cuts == {"KWZSA": None, "KWZSA@0-4": (0.0, 4.0), "KWZSA@4-8.5": (4.0, 8.5)}
    assert read[1].clip is read[3].clip and read[0].clip is read[4].clip and read[1].clip is not read[2].clip


def test_a_clip_of_ego4d_may_be_a_part_of_its_video_and_a_test_file_has_no_times(
    videos, tmp_path, monkeypatch, caplog
):
    planned = Planned(monkeypatch)
    read = read_prompts(config(golden_file("ego4d_nlq"), videos, cuts="apply"), VIDEO, 32)
    assert [(p.prompt_id, p.answer_spans_s) for p in read][-1] == ("KWZSA:4", ((0.5, 7.75),))
    assert planned.cuts == {"KWZSA@0-12": (0.0, 12.0), "KWZSA@2.5-14.5": (2.5, 14.5)}
    assert "1 of 4 queries have no text and are left out" in caplog.text
    path = tmp_path / "nlq_test_unannotated.json"
    path.write_text(re.sub(r'"clip_(start|end)_sec": [0-9.]+, ', "", golden_file("ego4d_nlq").read_text()))
    assert {p.answer_spans_s for p in read_prompts(config(path, videos), VIDEO, 32)} == {None}


def test_a_pattern_finds_the_query_in_a_question(videos, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(golden_file("timelens2_chat").read_text().replace("Show the door.", 'Show \\"it\\"!'))
    pattern = r'(?:"|When is )(.*?)(?:"|\?|$)'
    read = read_prompts(config(path, videos, query_pattern=pattern, max_prompts=2), VIDEO, 32)
    assert [p.query for p in read] == ["the lamp on", "it"]


def test_cuts_may_be_ignored_where_files_are_cut_already(videos, tmp_path):
    dataset = config(golden_file("time_r1"), videos, cuts="ignore")
    assert [p.clip.clip_id for p in read_prompts(dataset, VIDEO, 32)][-1] == "KgO7MJNO3oo"


@pytest.mark.parametrize(
    ("annotators", "spans"),
    [
        ("mean", [[2.0, 9.0]]),
        ("majority", [[5.0, 10.0]]),
        ("first", [[0.0, 10.0]]),
        ("all", [[0.0, 10.0], [5.0, 10.0], [0.0, 5.0]]),
    ],
)
def test_the_annotators_of_didemo_count_as_asked(annotators, spans, videos, tmp_path):
    rows = rows_of(config(golden_file("didemo"), videos, annotators=annotators), tmp_path / "m.parquet")
    assert rows[0]["spans_s"] == spans


@pytest.mark.parametrize(
    ("cleaning", "query"),
    [
        ("as_written", " A\tLoud  Dog barks.. "),
        ("strip", "A\tLoud  Dog barks.."),
        ("parse_query", "A Loud Dog barks"),
        ("time_r1", "a\tloud  dog barks."),
    ],
)
@pytest.mark.parametrize("round_s", [None, 0.0, 0.1, 2.0])
def test_cleaning_and_rounding_are_as_asked(cleaning, query, round_s, videos, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"vid": "KWZSA", "query": " A\\tLoud  Dog barks.. ", "span": [1.26, 7.3]}\n')
    (read,) = read_prompts(config(path, videos, cleaning=cleaning, round_s=round_s), VIDEO, 32)
    assert read.query == query
    assert (
        read.answer_spans_s
        == {None: ((1.26, 7.3),), 0.0: ((1.26, 7.3),), 0.1: ((1.3, 7.3),), 2.0: ((2.0, 8.0),)}[round_s]
    )


def test_a_line_separator_inside_a_query_does_not_end_its_line(videos, tmp_path):
    path = tmp_path / "a.jsonl"
    first = '{"vid": "KWZSA", "query": "one\u2028two\x85three", "span": [1, 2]}'
    path.write_text(first + '\n{"vid": "KWZSA", "query": "q", "span": [1, 2]}\n')
    read = read_prompts(config(path, videos, cleaning="as_written"), VIDEO, 32)
    assert [(p.prompt_id, p.query) for p in read] == [("KWZSA:1", "one\u2028two\x85three"), ("KWZSA:2", "q")]


def failure(dataset: DatasetConfig, kind: type[InputError], *named: str) -> str:
    with pytest.raises(kind) as caught:
        read_prompts(dataset, VIDEO, 32)
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message
    for name in named:
        assert name in message, message
    return message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"annotators": "all"}, "annotators"),
        ({"lengths": "l.csv"}, "lengths"),
        ({"cuts": "ignore", "annotators": "mean"}, "annotators, cuts"),
    ],
)
def test_an_option_without_effect_is_an_error(options, named, videos):
    failure(
        config(golden_file("activitynet"), videos, **options),
        ConfigError,
        f"{named} would do nothing for format activitynet",
    )


def test_a_manifest_is_not_cleaned_again(videos, tmp_path):
    convert(config(golden_file("tacos"), videos), tmp_path / "m.parquet")
    failure(
        config(tmp_path / "m.parquet", videos, cleaning="strip"),
        ConfigError,
        "cleaning would do nothing for format manifest",
    )


def test_charades_sta_needs_lengths(videos):
    failure(config(golden_file("charades_sta"), videos, lengths=None), DataError, "charades_sta", "lengths")


KEYS = {
    "qvhighlights": ["vid", "query"],
    "timelens_bench": ["spans", "queries"],
    "timelens_100k": ["video_path", "events", "query", "span"],
    "timelens2": ["video_id", "annotations", "text", "timestamps"],
    "timelens2_chat": ["messages", "url"],
    "vue_tr": ["video_id", "query", "gt"],
    "moment_seeker": ["src_video_path", "qry_text", "answering_time_interval"],
    "ego4d_nlq": ["videos", "clips", "clip_uid", "video_start_sec", "annotations", "language_queries"],
    "time_r1": ["video", "timestamp", "sentence"],
    "tvgbench": ["path", "question", "answer"],
    "didemo": ["video", "description", "times"],
    "tacos": ["fps", "num_frames", "timestamps", "sentences"],
    "charades_json": ["timestamps", "sentences"],
    "activitynet": ["timestamps", "sentences"],
    "videomind": ["query", "span", "vid"],
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_a_missing_key_is_named_with_its_place(name, key, videos, tmp_path):
    path = tmp_path / golden_file(name).name
    path.write_text(golden_file(name).read_text().replace(f'"{key}"', '"other"'))
    failure(config(path, videos, name), DataError, str(path), f"lacks '{key}'")


BAD = {  # golden file -> (text in it, what stands there instead, what the error names)
    "qvhighlights": [
        ("[[0, 4], [6, 12]]", "[[0, 4, 5]]", "relevant_windows must be [start, end]"),
        ("[[0, 4], [6, 12]]", "[[null, 4]]", "must be a number"),
        ("[[0, 4], [6, 12]]", "[[true, 4]]", "must be a number"),
        ("[[0, 4], [6, 12]]", "[]", "no interval"),
        ("[[0, 4], [6, 12]]", "[[NaN, 4]]", "nan to 4.0 is not an interval"),
        ("[[0, 4], [6, 12]]", "[[4, 0]]", "4.0 to 0.0 is not an interval"),
        ("[[0, 4], [6, 12]]", "[[1" + "0" * 400 + ", 4]]", "must be a number"),
        ("[[0, 4], [6, 12]]", "[[1" + "0" * 5000 + ", 4]]", "cannot be read as JSON"),
        ('"A family plays basketball."', "7", "the query must be text"),
        ('"A family plays basketball."', r'"\ud800"', "surrogate"),
        ('"A family plays basketball."', '""', "the query is empty"),
        ('"duration": 12,', '"duration": -1,', "duration must be a number above 0"),
        ('"duration": 12,', '"duration": 1e999,', "duration must be a number above 0"),
        ('"qid": 8738,', '"vid": "x",', "'vid' appears twice"),
        ('"qid": 8738,', '"qid" 8738', "not JSON (Expecting ':' delimiter"),
        ('{"qid": 8738', '[{"qid": 8738', "not JSON"),
        ('"vid": "bP5KfdFJzC4_660.0_810.0"}', '"vid": "../KWZSA"}', "is not inside"),
        ('"vid": "bP5KfdFJzC4_660.0_810.0"}', '"vid": "/etc/passwd"}', "is not inside"),
        ('"vid": "bP5KfdFJzC4_660.0_810.0"}', '"vid": ""}', "is not inside"),
    ],
    "timelens_bench": [
        ("[5, 10], ", "", "queries and spans must be lists of one length, found 2 and 1"),
        ("[[5, 10], [0, 1.5]]", "3", "must be lists of one length"),
        ("[5, 10]", "[10, 5]", "10.0 to 5.0 is not an interval"),
        ("[5, 10]", '["5", "10"]', "must be a number, found '5'"),
        ("}}", "}, 3: 4}", "not JSON"),
        ("}}", '}, "x": 4}', "an object for each video"),
    ],
    "timelens_100k": [
        ('"span": [3, 4.5]', '"span": []', "no interval"),
        ('"span": [3, 4.5]', '"span": [[3, 4.5], 5]', "span must be a number"),
        ('[{"query": "a cat", "span": [3, 4.5]}]', '["a cat"]', "events must be a list of objects"),
        ('"didemo/5', '"../didemo/5', "is not inside"),
    ],
    "timelens2": [
        ("[[0.5, 3]]", "[[3, 0.5]]", "3.0 to 0.5 is not an interval"),
        (
            '[{"text": "the end", "timestamps": [[9.5, 12.0]]}]',
            '"x"',
            "must be a list of objects with text and",
        ),
    ],
    "timelens2_chat": [
        ("9.5-12.0", "from 9.5", "answer must name an even number of times"),
        ("9.5-12.0", "9.5-1:75", "answer must be seconds (62.5) or a clock time"),
        ("9.5-12.0", "no", "there is no interval"),
        ('"role": "assistant"', '"role": "user"', "messages must be turns of user and assistant"),
        ('video_url": {', 'video": {', "there must be a video_id, or a video_url in the first message"),
        ("Show the door.", " ", "the question does not match query_pattern"),
    ],
    "vue_tr": [
        ("[[1, 3], [5, 8.5]]", '["0:01", "0:03"]', "gt must be a number, found '0:01'"),
        ("[[1, 3], [5, 8.5]]", "[]", "there is no interval"),
    ],
    "moment_seeker": [("[[10.0, 11.5]]", "[[10.0]]", "answering_time_interval must be [start, end]")],
    "ego4d_nlq": [
        ('"clip_start_sec": 1.5, ', "", "query 1: clip_start_sec must be a number, found 'None'"),
        ('"clip_end_sec": 3.0', '"clip_end_sec": 1.5', "1.5 to 1.5 is not an interval"),
        ('"clip_end_sec": 3.0', '"clip_end_sec": 30', "the annotation ends at 30.0 s"),
        ('"video_start_sec": 2.5', '"video_start_sec": null', "clip I28Y0: video_start_sec must be a number"),
    ],
    "time_r1": [
        ('"timestamp": [1.0, 4.0]', '"timestamp": [[1.0, 4.0]]', "timestamp must be [start, end]"),
        ('"video_start": 2.5', '"video_start": null', "video_start must be a number"),
        ('"video_start": 2.5', '"video_start": 12', "the cut 12.0 to 10.5 is not part"),
        ('"video_start": 2.5', '"video_start": NaN', "the cut nan to 10.5 is not part"),
    ],
    "tvgbench": [
        ("3.4-8.1", "3.4 to 8.1", "answer must be like '13.4-28.1'"),
        ("3.4-8.1", "8.1", "answer must be like"),
        ("3.4-8.1", "3.4-", "answer must be like"),
        ("3.4-8.1", "1-3.4-8.1", "answer must be like"),
        ("3.4-8.1", "8.1-3.4", "8.1 to 3.4 is not an interval"),
        ("3.4-8.1", "nan-3.4", "nan to 3.4 is not an interval"),
        ("3.4-8.1", "-3.4-8.1", "-3.4 to 8.1 is not an interval"),
    ],
    "didemo": [
        ("[[2, 2], [2, 2]]", "[[2, 1.5]]", "pairs of chunk numbers"),
        ("[[2, 2], [2, 2]]", "[]", "pairs of chunk numbers"),
        ("[[2, 2], [2, 2]]", "[[2, 0]]", "10.0 to 5.0 is not an interval"),
        ("[[2, 2], [2, 2]]", "[[3, 3]]", "starts at 15.0 s"),
    ],
    "tacos": [
        ('"fps": 29.4', '"fps": 0', "fps must be a number above 0"),
        ('"fps": 29.4', '"fps": "29.4"', "fps must be a number"),
        ('"num_frames": 352', '"num_frames": NaN', "num_frames must be a number above 0"),
        ("[0, 147]", "[147, 0]", "5.0 to 0.0 is not an interval"),
    ],
    "videomind": [("[1.5, 3.0]", "[1.5, 30.0]", "the annotation ends at 30.0 s, its clip at 12.0 s")],
    "charades_json": [("[2.4, 8.2]", "[8.2, 2.4]", "8.2 to 2.4 is not an interval")],
    "activitynet": [("[4.33, 9.0]", "[9.0, 9.0]", "9.0 to 9.0 is not an interval")],
}


@pytest.mark.parametrize(
    ("name", "old", "new", "named"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_a_value_that_cannot_be_is_named_with_its_place(name, old, new, named, videos, tmp_path, monkeypatch):
    Planned(monkeypatch)
    path, text = tmp_path / golden_file(name).name, golden_file(name).read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    message = failure(config(path, videos, name), DataError, named)
    assert message.startswith(f"{path}:")


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_that_is_not_utf8_is_named(name, videos, tmp_path):
    path = tmp_path / golden_file(name).name
    path.write_bytes(golden_file(name).read_text().encode("utf-32"))
    for asked in ("auto", name):
        failure(config(path, videos, asked), DataError, str(path), "not UTF-8")


RECORD = {"vid": "KWZSA", "query": "q", "span": [1, 2]}
LINE = json.dumps(RECORD)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no annotations"),
        ("\n \r\n", "no annotations"),
        ("once upon a time", "text that begins with 'once upon a time' is none of the known formats"),
        ("<!DOCTYPE html>\n<p>", "text that begins with '<!DOCTYPE html>'"),
        ("vid,start,end\na,1,2", "text that begins with 'vid,start,end'"),
        ("{}", "none of the known formats"),
        ("[]", "none of the known formats"),
        ("[1]", "expected a JSON object"),
        ('{"a": 1}', "none of the known formats"),
        ('{"a": {"b": 1}}', "none of the known formats"),
        ('{"a": {"duration": 1', "not JSON"),
        (
            '{"info": {"v": 1}, "annotations": [{"image_id": "a", "caption": "q", "timestamp": [1, 2]}]}',
            "an object with 'info' (an object with 'v'), 'annotations' (a list of 1, the first an object "
            "with 'image_id', 'caption', 'timestamp' (a list)) is none of the known formats",
        ),
        ('{"a": [{"query": "q"}]}', "an object with 'a' (a list of 1, the first an object with 'query')"),
        ('{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7}', "'e' and 2 more keys is none"),
        ('{"version": 1}\n{"vid": "a", "query": "q", "span": [1, 2]}', "an object with 'version' is none"),
        (
            "[[1, 2], [3, 4]]",
            "item 1: expected a JSON object of an annotation, found a list of 2, the first 1",
        ),
        ('["a", "b"]', 'found "a"'),
        ("[null]", "found null"),
        (
            f'{LINE} {{"vid": "b"}}',
            """a.json:1: not JSON ('{"vid": "b"}' follows a whole value in the same line)""",
        ),
        (f"{LINE}\n[1]", "a.json:2: expected a JSON object of an annotation, found a list of 1, the first 1"),
        (f'{LINE}\n{{"vid": ', "a.json:2: not JSON (Expecting value"),
        ('{"vid": "a",\n"query": "q",\n', "a.json:3: not JSON"),
        ('{"vid": "a",\n"query": "q",\n', "the value begins in line 1"),
        ("# made by hand\n[]", "text that begins with '# made by hand'"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_file_of_no_format_is_named(text, named, videos, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    failure(config(path, videos), DataError, str(path), named)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (LINE, [1]),
        (json.dumps(RECORD, indent=2), [1]),
        ("\n\n".join(json.dumps(RECORD, indent=2) for _ in range(3)), [1, 10, 19]),  # a record has 8 lines
        (json.dumps([RECORD, RECORD], indent=2), [1, 2]),
    ],
)
def test_records_may_be_written_over_several_lines(text, numbers, videos, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    for name in ("auto", "videomind"):
        read = read_prompts(config(path, videos, name), VIDEO, 32)
        assert [prompt.prompt_id for prompt in read] == [f"KWZSA:{n}" for n in numbers]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("videomind", '{"data": [{"vid": "a"}]}', "lacks 'vid', is an object with 'data' (a list of 1"),
        ("activitynet", '[{"vid": "a"}]', "found a list of 1, the first an object with 'vid'"),
        (
            "activitynet",
            '{"a": {}}\n{"b": {}}',
            "found an object with 'a' (an object without content) and an",
        ),
        (
            "activitynet",
            '{"version": 1, "database": {"a": {}}}',
            "found an object with 'version', 'database' (an",
        ),
        ("activitynet", "3", "found 3"),
        ("activitynet", "", "found nothing"),
    ],
)
def test_json_of_another_structure_than_the_named_format_is_described(name, text, named, videos, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert "not JSON" not in failure(config(path, videos, name), DataError, str(path), named)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (gzip.compress(b"{}", mtime=0), "is not UTF-8 text but gzip: unpack it"),
        ("{}".encode("utf-16-le"), "(a zero at byte 1): save it as UTF-8"),
        (b"PAR1\x15", "but Parquet: use format auto"),
        (b"PK\x03\x04", "but zip"),
    ],
)
def test_a_file_that_is_no_text_is_named_by_what_it_is(content, named, videos, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    failure(config(path, videos, "videomind"), DataError, str(path), named)


def test_a_video_id_may_be_a_whole_number(videos, tmp_path):
    shutil.copyfile(videos / "KWZSA.mp4", videos / "20260101.mp4")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORD | {"vid": 20260101}))
    (read,) = read_prompts(config(path, videos), VIDEO, 32)
    assert read.prompt_id == "20260101:1" and read.clip.video_path == str(videos / "20260101.mp4")


@pytest.mark.parametrize(("name", "text"), [("activitynet", "{}"), ("time_r1", "[]"), ("videomind", "\n")])
def test_a_file_without_annotations_is_named(name, text, videos, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    failure(config(path, videos, name), DataError, str(path), "no annotations")


def test_an_unknown_video_is_named_with_its_place(videos, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"vid": "unknown", "query": "q", "span": [1, 2]}\n')
    failure(config(path, videos), ClipError, f"{path}:1: video", "unknown.mp4 is missing")


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("a", ["a.mkv", "a.mp4"], "a.mp4"),
        ("a", ["a/000.jpg", "a.avi"], "a.avi"),
        ("a", ["a/000.jpg"], "a"),
        ("a.mkv", ["a.mkv", "a.mp4"], "a.mkv"),
        ("a.mkv", ["a.mp4"], "a.mp4"),
        ("a.mov", ["a.mov.mp4"], "a.mov.mp4"),
        ("a.ts", ["a.ts"], "a.ts"),
        ("a_6.0_8.5", ["a_6.0_8.mp4", "a_6.0_8.5.mp4"], "a_6.0_8.5.mp4"),
        ("x/y/a.mp4", ["a.mp4", "y/a.mp4"], "y/a.mp4"),
        ("x/y/a.mp4", ["a.mp4", "x/y/a.avi"], "x/y/a.avi"),
        ("./x/../a.mp4", ["a.mp4"], "a.mp4"),
        ("s1", ["s1-cam-002.avi"], "s1-cam-002.avi"),
        ("größe", ["größe.mp4"], "größe.mp4"),
        ("none", ["a.mp4"], "none.mp4"),
        ("x/none.avi", ["a.mp4"], "x/none.avi"),
        ("x.none", ["a.mp4"], "x.none"),
        ("u@N00_1.mts", ["u@N00_1.mp4"], "u@N00_1.mp4"),  # as DiDeMo's names and its published files
        ("u@N00_1.m2ts", ["u@N00_1.mp4"], "u@N00_1.mp4"),
        ("u@N00_1.3g2", ["u@N00_1.mp4"], "u@N00_1.mp4"),
        ("u@N00_1.", ["u@N00_1.mp4"], "u@N00_1.mp4"),
        ("u@N00_1.mts", ["u@N00_1.mts.mp4", "u@N00_1.mp4"], "u@N00_1.mp4"),
        ("a.mp4", ["a.MP4"], "a.MP4"),
        ("a.MOV", ["a.mp4", "a.mkv"], "a.mp4"),
        ("a", ["a.m2ts"], "a.m2ts"),
        ("a", ["a.nut"], "a.nut"),  # any extension
        ("a.nut", ["a.xyz"], "a.xyz"),
        ("a.mp4", ["a.nut", "a.wmv"], "a.wmv"),
        ("a", ["a.json", "a.wav", "a.en.vtt", "a.npy", "a.ogv"], "a.ogv"),
        ("a", ["a.json", "a.jpg", "a.mp4.part"], "a.mp4"),  # nothing of these is a video
        ("a.b", ["a.mp4", "a.b.mp4"], "a.b.mp4"),  # what looks like an extension may be a part of the id
        ("a_6.0_8.5", ["a_6.0_8.mp4", "a_6.0.mp4"], "a_6.0_8.5.mp4"),  # a number is none
        ("s1.avi", ["s1-cam-002.mts"], "s1-cam-002.mts"),
        ("a.avi", ["a/000.jpg"], "a"),
        ("a.b", ["a.b/000.jpg"], "a.b"),
        ("a", ["a"], "a"),
        ("x/y/a.mts", ["y/a.mkv", "a.mp4"], "y/a.mkv"),
    ],
)
def test_a_video_is_the_first_file_by_the_rule(name, files, found, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert VideoFolder(str(tmp_path)).find(name, "here") == tmp_path / found


def names(tmp_path, *files: str) -> VideoFolder:
    for file in files:
        (tmp_path / file).touch()
    return VideoFolder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "files", "named"),
    [
        ("a", ["a.nut", "a.xyz"], "'a' may be a.nut, a.xyz: remove"),
        ("a", ["a.mp4", "a.MP4"], "'a' may be a.MP4, a.mp4: remove"),
        ("a.avi", ["a.v1", "a.v2", "a.v3", "a.v4"], "'a.avi' may be a.v1, a.v2 and 2 more: remove"),
    ],
)
def test_files_that_the_rule_cannot_choose_from_are_named(name, files, named, tmp_path):
    folder = names(tmp_path, *files)
    with pytest.raises(DataError, match=f"^here: the video {re.escape(named)}"):
        folder.find(name, "here")
    if files[0] == "a.nut":
        assert folder.find("a.nut", "here") == tmp_path / "a.nut"


@pytest.mark.parametrize("pair", [("a.one", "a.two"), ("a.one", "a"), ("a.mp4", "a.one")])
def test_two_ids_are_not_taken_for_one_file_because_they_look_like_names_with_extensions(pair, tmp_path):
    for first, second in (pair, pair[::-1]):
        folder = names(tmp_path, "a.mp4")
        folder.find(first, "here")
        with pytest.raises(DataError, match=r"are both found as a\.mp4: write one name"):
            folder.find(second, "there")


def test_the_same_video_may_be_named_with_and_without_extension(tmp_path):
    folder = names(tmp_path, "a.mp4")
    for name in ("a", "a.", "a.mp4", "a.mov", "x/a.avi", "a.MTS"):  # DiDeMo has both a and a.
        assert folder.find(name, "here") == tmp_path / "a.mp4"


def test_a_folder_is_listed_once_however_many_videos_are_looked_for(tmp_path, monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    folder = names(tmp_path, "a.mp4", "b.mkv")
    for i in range(500):
        folder.find(f"sub/{i}.mp4", "here")
        assert folder.find("b", "here") == tmp_path / "b.mkv"
    assert len(listed) == 2  # the folder, and the one that is not there


def test_a_link_to_nothing_is_no_video_and_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").symlink_to(tmp_path / "gone.mp4")
    assert names(tmp_path, "a.mkv").find("a", "here") == tmp_path / "a.mkv"

    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"cannot be listed \(Permission denied\)"):
        VideoFolder(str(tmp_path)).find("a", "here")


@pytest.mark.parametrize("name", ["..", "../a", "x/../../a", "/a", ".", "", "a\0b"])
def test_a_path_that_leaves_the_folder_is_an_error(name, tmp_path):
    with pytest.raises(DataError, match=r"^here: the video .* is not inside"):
        VideoFolder(str(tmp_path)).find(name, "here")


def test_an_absolute_path_inside_the_folder_is_found(videos, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"video_path": "{videos}/cosmo_cap/BVs52yd-RUQ.mp4", "query": "q", "span": [1, 2]}}\n')
    (read,) = read_prompts(config(path, videos), VIDEO, 32)
    assert (
        read.clip.video_path == str(videos / "cosmo_cap" / "BVs52yd-RUQ.mp4")
        and read.prompt_id == "BVs52yd-RUQ:1"
    )


MANIFEST_ROW = {**row("a:1", "KWZSA.mp4", "q", [[1.0, 2.0]], 12.0, None, None), "source": "a.json: item 1"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ([{"prompt_id": None}], "empty values in prompt_id"),
        ([{"spans_s": [[1.0]]}], "spans_s must be pairs"),
        ([{"spans_s": [[1.0, None]]}], "spans_s must be pairs"),
        ([{"spans_s": [[2.0, 1.0]]}], "2.0 to 1.0 is not an interval"),
        ([{"clip_start_s": 1.0}], "give both or none"),
        ([{"duration_s": -1.0}], "duration_s must be a number above 0"),
        ([{}, {}], "prompt_id a:1 appears twice"),
        ([{"video": "../a.mp4"}], "is not inside"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_row(changes, named, videos, tmp_path):
    path = tmp_path / "m.parquet"
    write_manifest([{**MANIFEST_ROW, **change} for change in changes], path, {})
    failure(config(path, videos), DataError, str(path), named)


def test_a_manifest_of_other_columns_or_types_or_no_parquet_is_named(videos, tmp_path):
    path = tmp_path / "m.parquet"
    write_manifest([MANIFEST_ROW], path, {})
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["query", "fps"]), path)
    failure(config(path, videos), DataError, str(path), "lacks the columns query, fps")
    pq.write_table(table.set_column(MANIFEST.get_field_index("spans_s"), "spans_s", [["x"]]), path)
    failure(config(path, videos), DataError, str(path), "another type")
    path.write_bytes(path.read_bytes()[:50])
    failure(config(path, videos), DataError, str(path), "not a manifest")
    failure(config(golden_file("tacos"), videos, "manifest"), DataError, "tacos.json", "not a manifest")
    failure(
        config(tmp_path / "none.parquet", videos, "manifest"), DataError, "none.parquet", "cannot be read"
    )
