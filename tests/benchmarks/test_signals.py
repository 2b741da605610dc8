"""benchmarks.signals and signal_moves: what each option is compared with, and the tables that they write."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import command, signal_moves, signals
from benchmarks.claims import study
from benchmarks.claims.case import Case
from benchmarks.claims.measure import config_of
from benchmarks.claims.reading import Group
from video_opd import ROOT


@pytest.mark.parametrize("kind", signals.OPTIONS)
def test_an_option_differs_from_its_objective_in_the_loss_or_the_teachers_alone(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    base = signals.OPTIONS[kind].base
    own, alone = (
        config_of(Case("learn", name, "clean", 1, 2e-4, 32, signals.overrides(name, 32)), tmp_path)
        for name in (kind, base)
    )
    assert (own.loss, own.teacher_models) != (alone.loss, alone.teacher_models)
    assert own.loss.kind == alone.loss.kind == base
    same = {"loss": alone.loss, "teacher": alone.teacher, "teachers": (), "run_name": alone.run_name}
    assert own.model_copy(update=same) == alone


def row_of(seed: int, miou: float) -> dict:
    return {"seed": seed, "miou": miou}


def test_a_row_has_the_difference_of_the_same_seeds():
    groups = [
        Group("opd", "clean", 1e-4, [row_of(0, 0.5), row_of(1, 0.7)]),
        Group("task reward", "clean", 1e-4, [row_of(0, 0.6), row_of(1, 0.9)]),
    ]
    (row,) = signals.rows_of(groups)
    assert row["option"] == "task reward" and row["beside"] == "`opd`" and row["keys"] == "`task_weight: 0.5`"
    assert row["mIoU"] == "0.750 (0.600 to 0.900)"
    assert row["less the objective alone"] == "+0.150 (+0.100 to +0.200; above in 2 of 2 seeds)"


def pretend(monkeypatch, tmp_path: Path, name: str, measure) -> Path:
    """Sets the stage for `main()` with --quick, whose runs `measure` stands in for; returns the document."""
    monkeypatch.setattr(command, "in_new_process", measure)
    monkeypatch.setattr(study, "ensure_gaps", lambda folder: [])
    monkeypatch.setattr(study, "code_digest", lambda: "code")
    monkeypatch.setattr(study, "data_digest", lambda out: "data")
    document = tmp_path / "results.md"
    document.write_text(f"<!-- {name} -->\nold\n<!-- end -->\n")
    arguments = ["x", "--quick", "--out", str(tmp_path / "out"), "--paste", str(document)]
    monkeypatch.setattr("sys.argv", arguments)
    return document


def test_a_command_tunes_by_the_objective_and_writes_the_table_into_the_document(
    tmp_path, monkeypatch, capsys
):
    ran: list[Case] = []

    def fake(_, case: Case, out: Path) -> dict:
        ran.append(case)
        scores = {"miou": 0.6 if case.kind == "opd" else 0.7, "r1_07": 0.5, "second_task": 0.9}
        curve = [{"step": 0, "miou": 0.5}]
        return scores | {"teacher_miou": 0.99, "curve": curve}

    document = pretend(monkeypatch, tmp_path, "signals", fake)
    signals.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["signals"]
    assert {(case.part, case.kind) for case in ran} == {
        ("start", "start"), ("tune", "opd"), ("learn", "opd"), ("learn", "task reward")
    }  # fmt: skip
    assert row["less the objective alone"].startswith("+0.100")
    assert "| task reward |" in document.read_text() and "old" not in document.read_text()


def arguments(**values) -> argparse.Namespace:
    return argparse.Namespace(**{"seeds": 2, "lr": 2e-4, "steps": 20, "overrides": [], **values})


def test_an_option_and_its_control_train_on_the_same_prompts_and_differ_in_the_loss_alone(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    for name, option in signals.OPTIONS.items():
        own = signal_moves.cases_of(name, option.overrides, arguments())
        controls = signal_moves.control_cases(option, arguments())
        assert bool(controls) == (option.control is not None) and len(own) == 2
        for case, control in zip(own[: len(controls)], controls, strict=True):
            mine, other = (config_of(c, tmp_path) for c in (case, control))
            assert mine.data.sources[""].max_prompts == mine.groups_per_step == 32
            assert mine.loss != other.loss and mine.loss.kind == other.loss.kind
            assert mine.model_copy(update={"loss": other.loss, "run_name": other.run_name}) == other


def test_a_metric_is_beside_that_of_the_control_with_the_same_seed():
    def row(seed: int, first: float, last: float) -> dict:
        return {"seed": seed, "metrics": {"learner/entropy": [first, last]}}

    name = "forward KL where unsure"
    own, controls = [row(0, 0.1, 0.3), row(1, 0.2, 0.1)], [row(1, 0.2, 0.2), row(0, 0.1, 0.1)]
    found = signal_moves.row_of(name, own, controls)
    assert found["first quarter of the updates"] == "0.150 (0.100 to 0.200)"
    assert found["last quarter"] == "0.200 (0.100 to 0.300)"
    assert found["change"] == "+0.050 (-0.100 to +0.200; above in 1 of 2 seeds)"
    assert found["control"] == "`opd_topk` alone"
    assert found["last quarter less the control's"] == "+0.050 (-0.100 to +0.200; above in 1 of 2 seeds)"
    alone = signal_moves.row_of(name, own, [])
    assert alone["control"] == alone["last quarter less the control's"] == "-"


def test_the_second_command_runs_the_control_too_and_writes_its_table(tmp_path, monkeypatch, capsys):
    ran: list[Case] = []

    def fake(_, case: Case, out: Path) -> dict:
        ran.append(case)
        return {"metrics": {"actors/miou": [0.5, 0.7 if case.kind == "task reward" else 0.6]}}

    document = pretend(monkeypatch, tmp_path, "signal_moves", fake)
    signal_moves.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["signal_moves"]
    assert {(case.part, case.kind, case.steps) for case in ran} == {
        ("move", "task reward", 4), ("move", "opd control", 4)
    }  # fmt: skip
    assert row["last quarter less the control's"].startswith("+0.100")
    assert "| task reward |" in document.read_text() and "old" not in document.read_text()
