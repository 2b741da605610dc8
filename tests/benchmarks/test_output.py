"""What benchmarks print and write, without the runs that they measure."""

import json

import pytest

from benchmarks.command import (
    append_row,
    in_new_process,
    make_parser,
    print_result,
    read_rows,
    spread,
    temporary_demo,
)


def test_the_last_line_is_the_result_as_json(capsys):
    rows = [
        {"name": "a", "the_size": 1234},
        {"name": "b", "the_size": 2.3456},
        {"name": "c", "the_size": None},
        {"name": "d", "the_size": [0.25, 12.0]},
    ]
    print_result({"x": 1.5}, "title", rows, "a note")
    *shown, note, last = capsys.readouterr().out.splitlines()
    assert (note, json.loads(last)) == ("a note", {"x": 1.5})
    assert "title" in shown[0]
    cells = [line.strip("│┃ ").replace("┃", "│").split("│") for line in shown if line[0] in "│┃"]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["name", "the size"],
        ["a", "1,234"],
        ["b", "2.35"],
        ["c", "-"],
        ["d", "0.25 to 12"],
    ]


def test_arguments_are_quick_and_where_asked_for_overrides():
    parsed = make_parser("step", "about", "fewer steps", overrides=True).parse_args(["seed=3", "--quick"])
    assert parsed.quick and parsed.overrides == ["seed=3"]
    with pytest.raises(SystemExit):
        make_parser("decode", "about", "fewer clips").parse_args(["seed=3"])


def test_a_temporary_demo_keeps_overrides_and_leaves_nothing_behind():
    with temporary_demo("num_steps=7") as (config, folder):
        assert config.num_steps == 7 and str(folder.parent) == config.runs_dir and folder.parent.is_dir()
    assert not folder.parent.exists()


def test_work_in_a_new_process_returns_its_result():
    assert in_new_process(divmod, 7, 2) == (3, 1)


def test_rows_of_a_file_are_read_back(tmp_path):
    rows = [{"kind": "a", "miou": 0.5}, {"kind": "b", "miou": None}]
    for one in rows:
        append_row(tmp_path / "rows.jsonl", one)
    assert read_rows(tmp_path / "rows.jsonl") == rows and read_rows(tmp_path / "none.jsonl") == []


def test_a_spread_has_the_mean_and_the_range():
    assert [spread(v) for v in ([0.5, 1.0], [2.0], [10.0, 30.0])] == [
        "0.750 (0.500 to 1.000)",
        "2.00 (2.00 to 2.00)",
        "20 (10 to 30)",
    ]
