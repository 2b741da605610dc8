"""benchmarks.claims: which runs are done again, what they are given, and how long they take."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import launch
from benchmarks import command, curriculum_ablation, objectives
from benchmarks.claims import kinds, study
from benchmarks.claims.case import Case
from benchmarks.claims.measure import config_of, first_and_last, measure, result_of
from benchmarks.claims.rows import DECIDE, Rows, code_digest, estimate_s, run_missing, seconds_of
from benchmarks.command import read_rows
from demo import gaps
from video_opd import ROOT

CASE = Case("learn", "opd", "clean", seed=1, lr=2e-4, steps=40, overrides=("loss.kind=opd",))
OTHERS = [
    replace(CASE, **{name: value})
    for name, value in {
        "part": "tune", "kind": "sft", "labels": "wrong", "seed": 2, "lr": 5e-5, "steps": 41, "overrides": ()
    }.items()
]  # fmt: skip


def rows_of(folder: Path, code: str = "c1", data: str = "d1", *reused: str) -> Rows:
    return Rows(folder / "rows.jsonl", code, data, reused)


def test_a_row_belongs_to_all_that_decides_it(tmp_path):
    rows_of(tmp_path).add(CASE, {"miou": 0.7})
    again = rows_of(tmp_path)
    assert again[CASE]["miou"] == 0.7 and again[CASE]["seed"] == 1
    assert not [case for case in OTHERS if case in again]
    assert len({case.name for case in [CASE, *OTHERS]}) == 8  # nor do they share a run folder


def test_rows_of_other_code_or_data_are_named_and_not_used(tmp_path):
    rows_of(tmp_path).add(CASE, {"miou": 0.7})
    assert CASE not in rows_of(tmp_path, "c2") and CASE not in rows_of(tmp_path, "c1", "d2")
    assert "1 rows are of other code (c1)" in rows_of(tmp_path, "c2").describe()
    assert "other code" not in rows_of(tmp_path).describe()
    assert CASE in rows_of(tmp_path, "c2", "d1", "c1")  # --reuse c1
    assert CASE not in rows_of(tmp_path, "c2", "d2", "c1")


def test_the_digest_of_the_code_leaves_comments_out(tmp_path):
    assert all((ROOT / part).exists() for part in DECIDE)
    for part in DECIDE:
        file = tmp_path / part if part.endswith(".py") else tmp_path / part / "a.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("lr: 1\n")
    first = code_digest(tmp_path)
    (tmp_path / "learner" / "a.py").write_text("x  =  1  # one\n")
    assert code_digest(tmp_path) == first
    (tmp_path / "learner" / "a.py").write_text("x = 2\n")
    second = code_digest(tmp_path)
    (tmp_path / "configs" / "demo.yaml").write_text("lr: 2\n")
    assert len({first, second, code_digest(tmp_path)}) == 3


def test_a_command_goes_on_where_it_was_interrupted_or_a_run_failed(tmp_path, capsys):
    cases, ran = [replace(CASE, seed=seed) for seed in range(3)], []

    def run(case: Case) -> dict:
        ran.append(case.seed)
        if case.seed == 2 and ran.count(2) == 1:
            raise RuntimeError("the machine went away")
        return {"miou": 0.1 * case.seed}

    with pytest.raises(
        SystemExit, match=r"1 runs failed \(learn-opd-.*: RuntimeError: the machine went away\)"
    ):
        run_missing(cases, rows_of(tmp_path), 1, {}, run)
    assert [row["seed"] for row in read_rows(tmp_path / "rows.jsonl")] == [0, 1]
    again = rows_of(tmp_path)
    run_missing(cases, again, 2, {}, run)
    run_missing(cases, again, 2, {}, run)
    assert ran == [0, 1, 2, 2] and all(case in again for case in cases)
    assert "1 of 1 runs, about 0 min left" in capsys.readouterr().out


def test_many_failures_end_the_command(tmp_path):
    cases, ran = [replace(CASE, seed=seed) for seed in range(9)], []

    def run(case: Case) -> dict:
        ran.append(case.seed)
        raise ValueError("as every run")

    with pytest.raises(SystemExit, match="3 runs failed"):
        run_missing(cases, rows_of(tmp_path), 1, {}, run)
    assert ran == [0, 1, 2]


def test_the_estimate_knows_updates_starts_and_jobs():
    timing, learn = replace(CASE, part="time", steps=10), replace(CASE, kind="grpo")
    assert seconds_of(timing, {"opd": 2.0}) == pytest.approx(25 + 20)
    assert seconds_of(learn, {"grpo": 3.0}) == pytest.approx(2.2 * (25 + 120 + 10 * 3))
    assert seconds_of(learn, {}) > seconds_of(replace(CASE, kind="sft"), {})
    for overrides in (kinds.TVDF, kinds.SCHEDULE, kinds.OBJECTIVES[kinds.OWN]):
        assert seconds_of(replace(CASE, overrides=overrides), {}) == pytest.approx(
            seconds_of(CASE, {}) + 2.2 * 70
        )
    assert estimate_s([timing, learn, learn], {"opd": 2.0, "grpo": 3.0}, jobs=2) == pytest.approx(45 + 385)


def study_of(tmp_path: Path, **given) -> study.Study:
    arguments = {
        "seeds": 5,
        "steps": 40,
        "lrs": [5e-5, 2e-4, 8e-4],
        "jobs": 2,
        "overrides": [],
        "out": tmp_path,
    }
    of = [("opd", "none"), ("grpo", "clean"), ("grpo", "wrong")]
    return study.Study(
        argparse.Namespace(**arguments | given),
        rows_of(tmp_path),
        of,
        kinds.objective_overrides,
        lambda k: k,
        True,
    )


def test_all_kinds_have_the_same_trials_and_seeds(tmp_path):
    of = study_of(tmp_path, overrides=["video.fps=1"])
    trials = [of.trials(kind) for kind in of.kinds]
    assert {tuple(case.lr for case in cases) for cases in trials} == {(5e-5, 2e-4, 8e-4)}
    assert [cases[0].labels for cases in trials] == ["clean", "clean", "wrong"]
    learned = of.learning(("grpo", "wrong"), 2e-4, ["learner.betas=[0.9, 0.95]"])
    assert [case.seed for case in learned] == [0, 1, 2, 3, 4]
    assert learned[0].overrides[-2:] == ("video.fps=1", "learner.betas=[0.9, 0.95]")
    assert of.timing(("grpo", "wrong")) == of.timing(("grpo", "clean"))
    assert of.timings() == [replace(of.timings()[1], kind="warm-up"), *map(of.timing, of.kinds)]
    assert replace(of, is_timed=False).timings() == []


def test_the_estimate_leaves_out_runs_that_have_learned_at_the_rate_they_were_tuned_to(tmp_path, capsys):
    of = study_of(tmp_path)
    of.print_estimate()
    for case in of.learning(("grpo", "wrong"), 8e-4)[:4]:
        of.rows.add(case, {})
    of.print_estimate()
    first, then = capsys.readouterr().out.splitlines()
    assert "15 to learn" in first and "11 to learn" in then


@pytest.mark.parametrize("kind", [*kinds.OBJECTIVES, *kinds.CURRICULA])
def test_runs_share_all_but_what_is_compared(tmp_path, kind):
    is_objective = kind in kinds.OBJECTIVES
    overrides = (kinds.objective_overrides if is_objective else kinds.curriculum_overrides)(kind, 40)
    learn = config_of(replace(CASE, kind=kind, labels="wrong", overrides=overrides), tmp_path)
    same = (learn.groups_per_step, learn.max_policy_lag, learn.learner.lr, learn.seed)
    assert same == (32, 0, 2e-4, 1)
    assert (learn.learner.warmup_frac, learn.learner.final_lr_frac) == (0, 1)
    assert learn.num_steps == (120 if kind == "gate" else 40)
    assert learn.eval_every == 4
    assert "/eval/" in learn.data.eval.videos and "wrong" in learn.data.sources[""].annotations
    tune = config_of(replace(CASE, kind=kind, part="tune", overrides=overrides), tmp_path)
    assert "/validation/" in tune.data.eval.videos and not tune.eval_every
    assert "wrong" not in tune.data.sources[""].annotations
    seen = learn.curriculum.num_selected
    if kind == kinds.OWN:
        assert seen and seen * learn.curriculum.passes_per_round == 40 * 32
        assert not learn.needs_teacher
    elif learn.curriculum.kind == "tvdf":
        assert seen == 40 * 32 // 4


def test_a_run_becomes_a_row_with_its_curve(tmp_path):
    config = config_of(replace(CASE, overrides=kinds.GRPO), tmp_path)
    lines: list[dict[str, float]] = [
        {
            "step": s,
            "wall_s": 100 + 2 * s + 9 * (s > 4),
            "actors/rollouts": 256 * (s + 1),
            "teacher/scored_tokens": 0,
        }
        for s in range(7)
    ]
    lines[4] |= {"eval/miou": 0.6, "eval/r1@0.7": 0.5}
    summary = {"failed_eval": {}, "steps": 7, "seconds": {"train": 50.0, "evaluate": 8.0}, "teacher": None}
    summary |= {"dropped": {}, "suspended_rollouts": 3}
    for name, miou in (("student_before", 0.5), ("student_after", 0.7)):
        summary[name] = {"miou": miou, "r1@0.7": miou}
    found = result_of(summary, lines, config)
    assert [(p["step"], p["prompts"], p["rollouts"], p["miou"]) for p in found["curve"]] == [
        (0, 0, 0, 0.5),
        (5, 160, 1280, 0.6),
        (7, 224, 1792, 0.7),
    ]
    assert (found["miou"], found["update_s"], found["train_s"], found["select_s"]) == (0.7, 2.0, 42.0, 0.0)
    assert json.dumps(found)
    with pytest.raises(RuntimeError, match="could not be read"):
        result_of(summary | {"failed_eval": {"a": "unreadable"}}, lines, config)
    off_policy = config_of(replace(CASE, overrides=("loss={kind: sft}",)), tmp_path)
    assert [p["prompts"] for p in result_of(summary, lines, off_policy)["curve"]] == [0, 160, 224]


def test_a_metric_is_read_in_the_first_and_the_last_quarter():
    lines = [{"learner/a": float(step), "wall_s": 1.0} for step in range(9)]
    lines[8] |= {"learner/b": 1.0}  # not in every step that is read
    assert first_and_last(lines, "learner/") == {"learner/a": [0.5, 7.5]}
    assert first_and_last(lines[:1], "learner/") == {"learner/a": [0.0, 0.0]}


@pytest.mark.parametrize("part", ["tune", "time", "learn"])
def test_the_last_student_answers_the_second_task_and_one_run_keeps_the_teachers_answers(
    tmp_path, monkeypatch, part
):
    case, asked = replace(CASE, part=part, steps=2), []
    folder = tmp_path / "runs" / case.name

    def launched(config, address) -> dict:
        assert address == "local" and not (folder / "old").exists() and config.run_name == case.name
        os.write(1, b"a line of the run\n")
        (folder / "checkpoints" / "step-2" / "student").mkdir(parents=True)
        (folder / "student").mkdir()  # the best on the evaluation split
        (folder / "curriculum").mkdir()
        (folder / "curriculum" / "teacher_answers.parquet").touch()
        lines = [{"step": step, "wall_s": 10.0 + step} for step in range(2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores = {"miou": 0.5, "r1@0.7": 0.5}
        summary = {"student_before": scores, "student_after": scores, "failed_eval": {}, "teacher": scores}
        return summary | {"steps": 2, "seconds": {"train": 3.0}, "dropped": {}, "suspended_rollouts": 0}

    monkeypatch.setattr(launch, "launch", launched)
    monkeypatch.setattr(gaps, "second_task", lambda model, data: asked.append(model) or 0.75)
    (folder / "old").mkdir(parents=True)
    row = measure(case, tmp_path)
    assert row.get("second_task") == (0.75 if part == "learn" else None)
    assert asked == ([folder / "checkpoints" / "step-2" / "student"] if part == "learn" else [])
    assert not (folder / "checkpoints").exists() and (folder / "metrics.jsonl").exists()
    assert (folder / "curriculum" / "teacher_answers.parquet").exists() == (part == "time")
    assert (tmp_path / "logs" / f"{case.name}.txt").read_text() == "a line of the run\n"


def measured(case: Case) -> dict:
    """A row in which a learning rate above 1e-4 is best, and grpo takes four times as long."""
    if case.part == "start":
        return {"second_task": 0.9, "run_s": 1.0}
    end = 0.6 + 0.01 * case.seed + (0.05 if case.lr > 1e-4 else 0.0)
    points = [
        {
            "step": s,
            "prompts": 32 * s,
            "rollouts": 32 * s,
            "teacher_tokens": 224 * s,
            "miou": miou,
            "r1_07": miou,
        }
        for s, miou in ((0, 0.5), (case.steps, end))
    ]
    costs = {"update_s": 4.0 if case.kind == "grpo" else 1.0, "select_s": 2.0, "train_s": 9.0, "run_s": 20.0}
    scores = {"miou": end, "r1_07": end, "second_task": 0.9, "teacher_miou": 0.99}
    return scores | costs | {"dropped": 0, "suspended": 0, "curve": points}


@pytest.mark.parametrize("benchmark", [objectives, curriculum_ablation])
def test_a_whole_command_tunes_learns_and_writes_and_then_has_nothing_to_do(
    tmp_path, benchmark, monkeypatch, capsys
):
    ran: list[Case] = []

    def fake(_, case: Case, out: Path) -> dict:
        ran.append(case)
        return measured(case)

    monkeypatch.setattr(command, "in_new_process", fake)
    monkeypatch.setattr(study, "ensure_gaps", lambda folder: [])
    monkeypatch.setattr(study, "code_digest", lambda: "code")
    monkeypatch.setattr(study, "data_digest", lambda out: "data")
    document = tmp_path / "results.md"
    document.write_text("<!-- objectives_claims -->\n<!-- end -->\n<!-- curricula_claims -->\n<!-- end -->\n")
    arguments = ["x", "--quick", "--out", str(tmp_path / "out"), "--paste", str(document)]
    monkeypatch.setattr("sys.argv", arguments)
    benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = [case.part for case in ran]
    assert parts[0] == "start" and "time" in parts and "tune" in parts
    assert set(parts[parts.index("learn") :]) == {"learn"}
    learned = [case for case in ran if case.part == "learn"]
    best = 2e-4 if benchmark is objectives else 5e-5  # the only one that the ablation tries when quick
    assert learned and {case.lr for case in learned} == {best}
    assert result["claims"] and "| claim of the paper | seen here? |" in document.read_text()
    ran.clear()
    benchmark.main()
    assert ran == []
    monkeypatch.setattr("sys.argv", [*arguments, "--sweep", "learner.lr", "1e-3", "1e-2"])
    benchmark.main()
    assert {case.overrides[-1] for case in ran} == {"learner.lr=1e-3", "learner.lr=1e-2"}
    assert "| `learner.lr` |" in (tmp_path / "out" / "sweep_learner.lr.md").read_text()
