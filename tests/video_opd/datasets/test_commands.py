"""`python -m video_opd.datasets check | convert` on real clips: findings, what is left out, exit codes."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from demo.clips import DURATION_S, VIDEO_FPS
from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets import check, read_prompts
from video_opd.datasets.__main__ import main
from video_opd.schemas import MANIFEST

ROOT = Path(__file__).resolve().parents[3]
GOOD = {"vid": "train00000", "query": "q", "span": [1, 2], "duration": 12}


@pytest.fixture
def folder(split_folder, tmp_path):
    """A copy of the split that a test may damage."""
    return shutil.copytree(split_folder, tmp_path / "split")


def charades(folder: Path) -> list[str]:
    return [
        str(folder / "annotations.txt"),
        "--lengths",
        str(folder / "lengths.csv"),
        "--videos",
        str(folder / "videos"),
    ]


def jsonl(folder: Path, *records: dict) -> list[str]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(path), "--videos", str(folder / "videos")]


def kinds(output: str) -> list[str]:
    """The kinds of the findings printed, in order; the last line is the summary."""
    return [line.partition(": ")[0] for line in output.splitlines()[:-1]]


def test_a_clean_split_has_no_findings_and_exit_code_0(folder, capsys):
    count = len((folder / "annotations.txt").read_text().splitlines())
    for asked in ("auto", "charades_sta"):
        assert main(["check", *charades(folder), "--format", asked]) == 0
        assert capsys.readouterr().out == f"{count} annotations, 0 with findings\n"


FINDINGS = [
    ({**GOOD, "vid": "none"}, "missing_video"),
    ({**GOOD, "vid": "train00001"}, "unreadable_video"),
    ({**GOOD, "span": [1, 13]}, "beyond_duration"),
    ({**GOOD, "span": [12, 13]}, "beyond_duration"),
    ({**GOOD, "span": [2, 1]}, "reversed"),
    ({**GOOD, "span": [2, 2]}, "zero_length"),
    ({**GOOD, "span": [-1, 2]}, "before_start"),
    ({**GOOD, "span": [float("nan"), 2]}, "not_a_number"),
    ({**GOOD, "span": []}, "no_span"),
    ({**GOOD, "query": " . "}, "empty_query"),
    ({**GOOD, "duration": 13.5, "query": "longer"}, "duration_differs"),
    ({**GOOD, "query": "q."}, "duplicate"),  # once cleaned
]


@pytest.mark.parametrize(("record", "kind"), FINDINGS)
def test_each_finding_is_reported_with_its_place_and_exit_code_1(record, kind, folder, capsys):
    (folder / "videos" / "train00001.mp4").write_bytes(b"no video")
    assert main(["check", *jsonl(folder, GOOD, record)]) == 1
    output = capsys.readouterr().out
    assert kinds(output) == [kind] and output.startswith(f"{kind}: {folder / 'a.jsonl'}:2: ")
    assert output.splitlines()[-1] == f"2 annotations, 1 with findings: {kind} 1"


def test_the_sound_one_of_two_equal_annotations_is_kept(folder):
    output = folder / "m.parquet"
    assert (
        main(["convert", *jsonl(folder, {**GOOD, "duration": 13.5}, GOOD, GOOD), "--output", str(output)])
        == 0
    )
    assert pq.read_table(output)["prompt_id"].to_pylist() == ["train00000:2"]


def test_the_same_finding_of_a_video_is_printed_once_with_the_number_of_its_annotations(folder, capsys):
    records = [{**GOOD, "vid": "none", "query": f"q{i}"} for i in range(4)] + [
        {**GOOD, "vid": f"none{i}"} for i in range(3)
    ]
    assert main(["check", *jsonl(folder, *records), "--limit", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("missing_video") and lines[0].endswith("(and 3 more annotations)")
    assert lines[2:] == [
        "missing_video: 2 more; see them with --limit",
        "7 annotations, 7 with findings: missing_video 7",
    ]


def test_tolerances_and_allowances_are_as_asked(folder, capsys):
    given = jsonl(folder, {**GOOD, "duration": 12.9, "span": [1, 13]})
    assert main(["check", *given]) == 1 and kinds(capsys.readouterr().out) == ["beyond_duration"]
    assert main(["check", *given, "--tolerance-s", "0.5", "--clamp-s", "1"]) == 1
    assert kinds(capsys.readouterr().out) == ["duration_differs"]
    assert main(["check", *given, "--clamp-s", "1"]) == 0


def test_the_tolerance_that_is_advised_admits_the_duration(folder, capsys):
    given = jsonl(folder, {**GOOD, "duration": 14.27})
    assert main(["check", *given]) == 1
    advised = re.search(r"allow --tolerance-s ([\d.]+) or more", capsys.readouterr().out)
    assert advised and main(["check", *given, "--tolerance-s", advised[1]]) == 0


def test_an_end_that_is_rounded_past_the_clip_is_cut_there(folder):
    given = jsonl(folder, {**GOOD, "duration": 11.9, "span": [1.4, 11.9]})
    assert main(["check", *given, "--round-s", "2"]) == 0
    assert main(["convert", *given, "--round-s", "2", "--output", str(folder / "m.parquet")]) == 0
    assert pq.read_table(folder / "m.parquet")["spans_s"].to_pylist() == [[[2.0, 11.9]]]


def test_a_manifest_in_float32_has_no_findings_that_the_same_in_float64_has_not(folder):
    given = jsonl(folder, {**GOOD, "duration": 11.92, "span": [9.1, 11.92]})
    output = folder / "m.parquet"
    assert main(["convert", *given, "--output", str(output)]) == 0
    table = pq.read_table(output)
    pair = pa.list_(pa.list_(pa.float32()))
    table = table.set_column(3, "spans_s", table["spans_s"].cast(pair))
    assert table["spans_s"][0].as_py()[0][1] > 11.92
    pq.write_table(table, output)
    assert main(["check", str(output), "--videos", str(folder / "videos")]) == 0


def test_equal_times_up_to_dust_are_duplicates(folder, capsys):
    assert main(["check", *jsonl(folder, GOOD, {**GOOD, "span": [1 + 1e-9, 2]})]) == 1
    assert kinds(capsys.readouterr().out) == ["duplicate"]


def break_pictures(path: Path) -> None:
    """Overwrites the last pictures of an mp4: it can still be opened."""
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") - 4
    end = start + int.from_bytes(content[start : start + 4])
    content[end - (end - start) // 3 : end] = bytes((end - start) // 3)
    path.write_bytes(content)


@pytest.mark.parametrize(("read", "found"), [("some", True), ("all", True), ("none", False)])
def test_a_video_that_opens_but_cannot_be_decoded_is_found_unless_its_pictures_are_not_asked_for(
    read, found, folder, capsys
):
    break_pictures(folder / "videos" / "train00001.mp4")
    given = jsonl(folder, GOOD, {**GOOD, "vid": "train00001"}, {**GOOD, "vid": "train00001", "query": "r"})
    given += ["--decoder", "pyav"]  # decord decodes ahead, so it may fail already when the file is opened
    assert main(["check", *given, "--read", read]) == int(found)
    output = capsys.readouterr()
    assert kinds(output.out) == ["unreadable_video"] * found and not output.err  # no bar but on a terminal
    assert ("cannot be decoded" in output.out and "(and 1 more annotations)" in output.out) == found


def test_a_few_pictures_or_all_that_a_run_sees_are_decoded_and_each_video_once(folder, monkeypatch):
    seen: list[list[int]] = []
    monkeypatch.setattr(check, "read_frames", lambda clip, _: seen.append(clip.frame_indices.tolist()))
    given = jsonl(folder, GOOD, {**GOOD, "query": "r"}, {**GOOD, "query": "s"})
    for read in ("some", "all", "none"):
        assert main(["check", *given, "--read", read]) == 0
    of_run = list(range(0, DURATION_S * VIDEO_FPS, 2))
    assert seen == [[*of_run[:2], *of_run[10:12], *of_run[-2:]], of_run]


def shift(path: Path, seconds: float) -> None:
    """Copies a video's pictures with other times: those below 0 are hidden, a late one is waited for."""
    source = path.rename(path.with_suffix(".old"))
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream: Any = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets: list[Any] = [packet for packet in old.demux(stream) if packet.size]
        for packet in packets:
            packet.stream = copy
            packet.pts += round(seconds / stream.time_base)
            packet.dts += round(seconds / stream.time_base)
            new.mux(packet)
    source.unlink()


@pytest.mark.parametrize(
    ("seconds", "kind", "said"),
    [
        (-2.0, "hidden_pictures", f"has {2 * VIDEO_FPS} pictures before the first that is shown"),
        (1.5, "late_picture", "shows its first picture 1.50 s after the file begins"),
        (0.1, None, ""),
    ],
)
def test_pictures_that_are_hidden_or_late_are_noted_and_are_no_fault(seconds, kind, said, folder, capsys):
    shift(folder / "videos" / "train00000.mp4", seconds)
    duration = DURATION_S + min(0.0, seconds)
    given = jsonl(folder, {**GOOD, "duration": duration}, {**GOOD, "duration": duration, "query": "r"})
    assert main(["check", *given]) == 0
    output = capsys.readouterr().out
    assert kinds(output) == [kind] * bool(kind) and said in output
    noted = f"; noted: {kind} 2" if kind else ""
    assert output.endswith(f"2 annotations, 0 with findings{noted}\n")
    assert main(["convert", *given, "--output", str(folder / "m.parquet")]) == 0
    assert len(pq.read_table(folder / "m.parquet")) == 2
    assert (folder / "m.left_out.csv").read_text().count("\n") == 1


def test_a_folder_of_frames_is_checked_at_the_rate_that_is_given(folder, capsys):
    frames = folder / "videos" / "frames"
    frames.mkdir()
    for i in range(24):
        Image.new("RGB", (32, 32)).save(frames / f"{i:03d}.png")
    given = jsonl(folder, {**GOOD, "vid": "frames", "duration": 12})
    assert main(["check", *given]) == 1 and "video.frame_folder_fps" in capsys.readouterr().out
    assert main(["check", *given, "--frame-folder-fps", "2"]) == 0


def didemo(folder: Path, num_segments: float, times: list) -> list[str]:
    record = {"video": "train00000.3g2", "description": "q", "times": times, "num_segments": num_segments}
    (folder / "didemo.json").write_text(json.dumps([record]))
    return [str(folder / "didemo.json"), "--videos", str(folder / "videos")]


@pytest.mark.parametrize(
    ("num_segments", "times", "cuts", "found", "row"),
    [
        (2, [[0, 1]], "apply", [], ([[0.0, 10.0]], 0.0, 10.0)),
        (2, [[0, 1]], "ignore", [], ([[0.0, 10.0]], None, None)),
        (3, [[2, 2]], "apply", [], ([[10.0, 12.0]], 0.0, 12.0)),  # the last chunk ends with the file
        (2, [[2, 2]], "apply", ["beyond_duration"], None),
        (4, [[0, 1]], "apply", ["bad_cut"], None),  # its last chunk would begin after the file's end
        (4, [[0, 1]], "ignore", [], ([[0.0, 10.0]], None, None)),
    ],
)
def test_the_annotated_part_of_a_didemo_video_is_the_clip(
    num_segments, times, cuts, found, row, folder, capsys
):
    arguments = [*didemo(folder, num_segments, times), "--cuts", cuts]
    assert main(["check", *arguments]) == bool(found)
    assert kinds(capsys.readouterr().out) == found
    if not found:
        assert main(["convert", *arguments, "--output", str(folder / "m.parquet")]) == 0
        (of_manifest,) = pq.read_table(folder / "m.parquet").to_pylist()
        assert tuple(of_manifest[key] for key in ("spans_s", "clip_start_s", "clip_end_s")) == row


def test_an_impossible_number_of_chunks_is_named(folder, capsys):
    assert main(["check", *didemo(folder, -1, [[0, 1]])]) == 2
    assert "item 1: num_segments must be a number above 0, found '-1'" in capsys.readouterr().err


def test_the_advice_for_a_bad_cut_of_a_manifest_names_no_option_that_manifests_lack(folder, capsys):
    assert main(["convert", *didemo(folder, 2, [[0, 1]]), "--output", str(folder / "m.parquet")]) == 0
    table = pq.read_table(folder / "m.parquet")
    pq.write_table(table.set_column(6, "clip_end_s", pa.array([99.0])), folder / "m.parquet")
    assert main(["check", str(folder / "m.parquet"), "--videos", str(folder / "videos")]) == 1
    output = capsys.readouterr().out
    assert "bad_cut" in output and "cuts=ignore" not in output


@pytest.mark.parametrize(
    ("fps", "num_frames", "found"),
    [
        (VIDEO_FPS, DURATION_S * VIDEO_FPS, []),
        (VIDEO_FPS * 1.005, DURATION_S * VIDEO_FPS, []),
        (29.4, round(29.4 * DURATION_S), []),  # the file was encoded again at another rate: seconds are right
        (VIDEO_FPS * 2, DURATION_S * VIDEO_FPS, ["wrong_fps"]),
        (VIDEO_FPS / 2, DURATION_S * VIDEO_FPS, ["wrong_fps"]),
        (VIDEO_FPS, 2 * DURATION_S * VIDEO_FPS, ["duration_differs"]),
    ],
)
def test_frames_counted_at_another_rate_than_the_files_are_found(fps, num_frames, found, folder, capsys):
    path = folder / "tacos.json"
    record = {"fps": fps, "num_frames": num_frames, "timestamps": [[0, fps]], "sentences": ["a"]}
    path.write_text(json.dumps({"train00000.avi": record}))
    assert main(["check", str(path), "--videos", str(folder / "videos")]) == bool(found)
    assert kinds(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("cut", "found"),
    [
        ((2.0, 10.0), []),
        ((4.0, 12.5), []),  # by rounding
        ((2.0, 14.0), ["bad_cut"]),
        ((120.6, 128.6), ["bad_cut"]),
        ((10.0, 2.0), ["bad_cut"]),
        ((-1.0, 7.0), ["bad_cut"]),
        ((0.0, 4.0), ["duration_differs", "beyond_duration"]),
    ],
)
def test_parts_that_the_file_does_not_have_are_found(cut, found, folder, capsys):
    path = folder / "time_r1.json"
    record = {"video": "x/train00000.mp4", "duration": 8.0, "timestamp": [0, 7.5], "sentence": "s"}
    path.write_text(json.dumps([record | {"video_start": cut[0], "video_end": cut[1]}]))
    arguments = [str(path), "--videos", str(folder / "videos")]
    assert main(["check", *arguments]) == bool(found)
    assert kinds(capsys.readouterr().out) == found
    if not found:
        assert main(["convert", *arguments, "--output", str(folder / "m.parquet")]) == 0
        (row,) = pq.read_table(folder / "m.parquet").to_pylist()
        assert (row["clip_start_s"], row["clip_end_s"]) == (cut[0], min(cut[1], DURATION_S))


def test_convert_writes_what_check_accepts_and_lists_the_rest(folder, capsys):
    (folder / "videos" / "train00001.mp4").write_bytes(b"no video")
    records = [
        GOOD,
        *(record for record, _ in FINDINGS),
        {**GOOD, "query": "last", "span": [[0, 1], [11, 12.0]]},
    ]
    arguments = jsonl(folder, *records)
    output = folder / "new" / "train.parquet"
    assert main(["convert", *arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{output}: 2 prompts; left out {len(FINDINGS)} (")
    assert sorted(p.name for p in output.parent.iterdir()) == ["train.left_out.csv", "train.parquet"]
    table = pq.read_table(output)
    assert table.schema.equals(MANIFEST) and table["prompt_id"].to_pylist() == [
        "train00000:1",
        f"train00000:{len(records)}",
    ]
    assert table["source"].to_pylist() == ["a.jsonl:1", f"a.jsonl:{len(records)}"]
    made_by = {b"format": b"videomind", b"cleaning": b"parse_query", b"round_s": b"0.0", b"clamp_s": b"0.0"}
    assert table.schema.metadata == {b"video_opd." + key: value for key, value in made_by.items()}
    assert str(folder).encode() not in output.read_bytes()
    left_out = list(csv.DictReader((output.parent / "train.left_out.csv").open()))
    assert [(row["source"], row["kind"]) for row in left_out] == [
        (f"a.jsonl:{i}", k) for i, (_, k) in enumerate(FINDINGS, 2)
    ]
    assert all(row["reason"] for row in left_out)
    assert main(["check", str(output), "--videos", str(folder / "videos")]) == 0


def test_the_manifest_of_a_split_gives_its_prompts(folder):
    output = folder / "m.parquet"
    assert main(["convert", *charades(folder), "--output", str(output)]) == 0
    video, videos, lengths = VideoConfig(max_frames=24), str(folder / "videos"), str(folder / "lengths.csv")
    direct = read_prompts(
        DatasetConfig(annotations=str(folder / "annotations.txt"), lengths=lengths, videos=videos), video, 32
    )
    again = read_prompts(DatasetConfig(format="manifest", annotations=str(output), videos=videos), video, 32)
    lines = (folder / "annotations.txt").read_text().splitlines()
    assert [p.prompt_id for p in direct] == [f"{line.split()[0]}:{i}" for i, line in enumerate(lines, 1)]
    for one, other in zip(direct, again, strict=True):
        assert (one.prompt_id, one.query, one.answer_spans_s) == (
            other.prompt_id,
            other.query,
            other.answer_spans_s,
        )
        assert (one.clip.clip_id, one.clip.video_path) == (other.clip.clip_id, other.clip.video_path)


def test_a_stopped_or_impossible_conversion_leaves_the_old_files(folder, capsys):
    output = folder / "m.parquet"
    assert main(["convert", *charades(folder), "--output", str(output)]) == 0
    before = output.read_bytes()
    assert main(["convert", *jsonl(folder, {**GOOD, "span": [2, 1]}), "--output", str(output)]) == 2
    assert "no annotations to convert: 1 are left out, first" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_convert_does_not_overwrite_its_input_and_names_a_place_where_it_cannot_write(folder, capsys):
    arguments = jsonl(folder, GOOD)
    before = (folder / "a.jsonl").read_text()
    assert main(["convert", *arguments, "--output", str(folder / "a.jsonl")]) == 2
    assert (
        "is the annotation file itself" in capsys.readouterr().err
        and (folder / "a.jsonl").read_text() == before
    )
    assert main(["convert", *arguments, "--output", str(folder / "a.jsonl" / "m.parquet")]) == 2
    assert "cannot be written" in capsys.readouterr().err


FILES = {
    "latin1.txt": "train00000 1 2##caf\xe9".encode("latin-1"),
    "columns.csv": b"id,seconds\ntrain00000,12\n",
    "one.csv": b"id,length\ntrain00009,12\n",
    "torn.json": b'{"train00000": {"duration": 12',
    "empty.jsonl": b"\n",
    "leaves.jsonl": json.dumps({**GOOD, "vid": "../../x"}).encode(),
    "charades.json": b'{"train00000": {"duration": 12, "timestamps": [[1, 2]], "sentences": ["a"]}}',
}


@pytest.mark.parametrize("command", ["check", "convert"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["latin1.txt"], "not UTF-8"),
        (["annotations.txt"], "needs the csv of the videos' lengths"),
        (["annotations.txt", "--lengths", "columns.csv"], "needs the columns id and length"),
        (["annotations.txt", "--lengths", "one.csv"], "has no length in"),
        (["torn.json"], "not JSON"),
        (["empty.jsonl"], "has no annotations"),
        (["empty.jsonl", "--format", "videomind"], "has no annotations"),
        (["leaves.jsonl"], "not inside"),
        (["none.json"], "cannot be read"),
        (["charades.json", "--videos", "nowhere"], "does not exist"),
        (["charades.json", "--format", "timelens_bench"], "lacks 'queries'"),
        (
            ["charades.json", "--format", "charades_sta", "--lengths", "lengths.csv"],
            "VIDEO_ID start end##sentence",
        ),
        (["annotations.txt", "--format", "activitynet"], "not JSON"),
        (["charades.json", "--annotators", "all"], "would do nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    output = ["--output", "m.parquet"] if command == "convert" else []
    assert main([command, "--videos", "videos", *arguments, *output]) == 2
    error = capsys.readouterr().err
    assert named in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (folder / "m.parquet").exists()


@pytest.mark.parametrize(
    "option", [["--clamp-s", "-1"], ["--tolerance-s", "nan"], ["--round-s", "x"], ["--format", "x"]]
)
def test_an_option_out_of_range_is_exit_code_2(option, folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", *charades(folder), *option])
    assert ended.value.code == 2 and option[0] in capsys.readouterr().err


def test_the_command_runs_as_a_module(folder):
    command = [sys.executable, "-m", "video_opd.datasets", "check", *charades(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("annotations, 0 with findings\n"), done.stderr
