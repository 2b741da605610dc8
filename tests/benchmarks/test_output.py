"""What benchmarks print and write, without the runs that they measure."""

import json

import pytest

from benchmarks.command import (
    append_row,
    by_kind,
    in_new_process,
    make_parser,
    print_result,
    read_rows,
    spread,
    temporary_demo,
)
from benchmarks.objectives import report


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


def point(step: int, miou: float) -> dict[str, float]:
    spent = {"wall_s": step * 2.0, "rollout_tokens": 0.0, "teacher_tokens": step * 10.0}
    return {"step": step, "miou": miou, "r1_07": miou, **spent}


def row(kind: str, seed: int, step_s: float, miou: float) -> dict:
    curve = [point(0, 0.5), point(10, miou)]
    scores = {"miou": miou, "r1_07": miou, "step_s": step_s, "wall_s": 10 * step_s}
    costs = {"rollout_tokens": 0, "teacher_tokens": 100, "overrides": [], "teacher_miou": None}
    return {"kind": kind, "seed": seed, "steps": 10, **scores, **costs, "curve": curve}


def test_objectives_are_compared_in_a_table_a_picture_and_a_report(tmp_path, capsys):
    rows = [row("opd_topk", 0, 1.0, 0.8), row("opd_topk", 1, 1.0, 0.6), row("grpo", 0, 4.0, 0.7)]
    for one in rows:
        append_row(tmp_path / "rows.jsonl", one)
    assert read_rows(tmp_path / "rows.jsonl") == rows and read_rows(tmp_path / "none.jsonl") == []
    report(rows, 0.75, tmp_path)
    *shown, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["wall_ratio_opd_grpo"] == 0.25 and len(result["rows"]) == 3
    wanted = {"objective", "seed", "updates", "miou", "r1_07", "wall_s", "rollout_tokens", "teacher_tokens"}
    assert wanted <= result["rows"][0].keys()
    assert any("0.700 (0.600 to 0.800)" in line and "20 (1 of 2 seeds)" in line for line in shown)
    assert any("not reached" in line for line in shown)
    assert (tmp_path / "objectives.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "report.html").read_text()
    assert "<td>0.700 (0.600 to 0.800)</td>" in html and "data:image/png;base64," in html


def test_rows_are_grouped_in_order_and_shown_with_their_spread():
    rows = [{"kind": "b"}, {"kind": "a"}, {"kind": "b", "seed": 1}]
    assert by_kind(rows) == {"b": [rows[0], rows[2]], "a": [rows[1]]}
    assert [spread(v) for v in ([0.5, 1.0], [2.0], [10.0, 30.0])] == [
        "0.750 (0.500 to 1.000)",
        "2.00 (2.00 to 2.00)",
        "20 (10 to 30)",
    ]
