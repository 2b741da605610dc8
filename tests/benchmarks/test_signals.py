"""benchmarks.signals: what each option is compared with, and the table that it writes."""

import json
from pathlib import Path

import pytest

from benchmarks import command, signals
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


def test_a_command_tunes_by_the_objective_and_writes_the_table_into_the_document(
    tmp_path, monkeypatch, capsys
):
    ran: list[Case] = []

    def fake(_, case: Case, out: Path) -> dict:
        ran.append(case)
        scores = {"miou": 0.6 if case.kind == "opd" else 0.7, "r1_07": 0.5, "second_task": 0.9}
        curve = [{"step": 0, "miou": 0.5}]
        return scores | {"teacher_miou": 0.99, "curve": curve}

    monkeypatch.setattr(command, "in_new_process", fake)
    monkeypatch.setattr(study, "ensure_gaps", lambda folder: [])
    monkeypatch.setattr(study, "code_digest", lambda: "code")
    monkeypatch.setattr(study, "data_digest", lambda out: "data")
    document = tmp_path / "results.md"
    document.write_text("<!-- signals -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(
        "sys.argv", ["x", "--quick", "--out", str(tmp_path / "out"), "--paste", str(document)]
    )
    signals.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["signals"]
    assert {(case.part, case.kind) for case in ran} == {
        ("start", "start"), ("tune", "opd"), ("learn", "opd"), ("learn", "task reward")
    }  # fmt: skip
    assert row["less the objective alone"].startswith("+0.100")
    assert "| task reward |" in document.read_text() and "old" not in document.read_text()
