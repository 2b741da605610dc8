"""report.html of 10,000 steps and 3,000 prompts: small, self-contained, escaped, with its extremes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from driver.clock import PHASES
from driver.records.answers import (
    disputed_answers,
    error_tables,
    largest_changes,
    prompt_ious,
)
from driver.records.report import MAX_COLUMNS, thinned, write_report
from tests.driver.test_report import SCORES
from tests.fakes import make_prompt
from tests.video_opd.test_config import MINIMAL
from video_opd import ROOT
from video_opd.config_data import VideoConfig
from video_opd.config_file import parse_config
from video_opd.errors import ModelError
from video_opd.grounding import blind_baselines
from video_opd.models.lengths import read_tokenizer
from video_opd.schemas import TRAJECTORIES

STUDENT = ROOT / "demo" / "models" / "student"
HOSTILE = "<script>alert('x')</script>"


def write_trajectories(folder: Path, step: int, rows: list[dict], torn: bool = False) -> None:
    """One batch for each of the rows, from `step` on."""
    folder.mkdir(exist_ok=True)
    path = folder / f"from-step-{step:06d}.arrows"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TRAJECTORIES) as writer:
        for number, row in enumerate(rows):
            writer.write_batch(pa.RecordBatch.from_pylist([{"step": step + number} | row], TRAJECTORIES))
    if torn:
        path.write_bytes(path.read_bytes()[:-300])


def row(prompt_id: str, text: str, student: list[float], teacher: list[float] | None) -> dict:
    """Token ids of the text, with the probabilities of both."""
    ids = read_tokenizer(STUDENT).encode(text, add_special_tokens=False).ids[: len(student)]
    logprobs = {
        "actor_logprobs": np.log(student),
        "teacher_logprobs": None if teacher is None else np.log(teacher),
    }
    return {"prompt_id": prompt_id, "prompt_fingerprint": "f", "response_token_ids": ids} | logprobs


def summary_of(prompts, examples) -> dict:
    return {
        **dict.fromkeys(("teacher", "student_before", "student_after"), SCORES),
        "baselines": blind_baselines(prompts, prompts) | {"no_video": None},
        **{"steps": 10_000, "seed": 0, "loss": "opd", "seconds": {"total": 60.0, "start_up": 1.0}},
        "dropped": {f"{HOSTILE}{i}": f"teacher <b>IoU</b> {i}" for i in range(3000)},
        "failed_eval": {"gone": HOSTILE},
        "video": VideoConfig().budget,
        **{"tokens": {"rollout": 0, "scored": 0}, "rollouts": 0, "examples": examples},
    }


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> tuple[Path, list, dict]:
    """Folder, held-out prompts and answers by evaluation. One prompt got much worse, one much better."""
    folder = tmp_path_factory.mktemp("runs") / "<b>long"
    folder.mkdir()
    rng, names = np.random.default_rng(0), ("actors/miou", "learner/reverse_kl", "learner/entropy")
    others = [f"time/{name}_s" for name in (*PHASES, "idle")]
    others += [f"learner/ratio_{p}" for p in ("p01", "p50", "p99")]
    with (folder / "metrics.jsonl").open("w") as file:
        for step, values in enumerate(rng.uniform(0.4, 0.6, (10_000, len(names)))):
            line = {"step": step} | dict(zip(names, values, strict=True)) | dict.fromkeys(others, 1.0)
            file.write(json.dumps(line) + "\n")
    starts = [i % 8 for i in range(3000)]
    prompts = [
        replace(make_prompt(f"p{i}", ((start, start + 2.0),), clip_id=f"v{i // 2}"), query=HOSTILE)
        for i, start in enumerate(starts)
    ]
    right = {p.prompt_id: f"{s:.1f} to {s + 2:.1f}" for p, s in zip(prompts, starts, strict=True)}
    half = {p.prompt_id: f"{s + 1:.1f} to {s + 2:.1f}" for p, s in zip(prompts, starts, strict=True)}
    examples = {
        "teacher": right,
        "student_before": half | {"p7": right["p7"], "p1234": "?"},
        "student_after": half | {"p7": "?", "p1234": right["p1234"]},
    }
    write_trajectories(folder / "trajectories", 0, [row("early", "From 1 to", [0.9] * 3, [1e-9] * 3)] * 60)
    later = [row(HOSTILE, "From 2.0 to", [0.5, 0.9, 0.9], [0.5, 0.01, 0.9])]
    write_trajectories(folder / "trajectories", 60, later * 70, torn=True)
    return folder, prompts, examples


def report_of(long_run, **changes) -> str:
    folder, prompts, examples = long_run
    cache = {"cache_dir": str(folder.parent / "frames")}
    config = parse_config(MINIMAL | {"student": str(STUDENT), "video": cache}, "test")
    write_report(folder, config, prompts, summary_of(prompts, examples) | changes)
    return (folder / "report.html").read_text()


def test_a_long_run_has_a_small_whole_report_in_which_nothing_is_markup(long_run):
    html = report_of(long_run)
    assert len(html) < 1_000_000
    assert not re.search(r"<script|(src|href)=\"(?!data:)", html) and "<b>" not in html
    assert html.count("&lt;script&gt;") >= 50, "of the dropped prompts, which are 3,000"
    assert html.count("frames, truth and answers") == 2
    assert html.index("p7: IoU before 1.00, after 0.00, teacher 1.00") < html.index("p1234: IoU before 0.00")
    assert "<td>2 to 2 s</td><td>3000</td><td>0.500</td><td>0.500</td><td>1.000</td>" in html
    assert html.count('title="student 0.900, teacher 0.010"') == 1
    assert re.search(r"step 79, &lt;script&gt;", html), "the first of the last 50 whole steps"
    assert "early" not in html, "the last 50 steps are in another file"


def test_a_run_without_teacher_labels_or_trajectories_has_a_report(long_run, tmp_path):
    folder, prompts, examples = long_run
    (tmp_path / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    unlabelled = [replace(p, answer_spans_s=None) for p in prompts[:5]]
    alone = tmp_path, unlabelled, {"student_after": examples["student_after"]}
    html = report_of(
        alone,
        teacher=None,
        student_before=None,
        baselines={"no_video": None, "best_constant": None, "random": SCORES},
    )
    assert html.count("frames, truth and answers") == 3 and "Mean IoU by event" not in html
    assert "Where student and teacher disagree" not in html


def test_curves_keep_every_extreme():
    rng = np.random.default_rng(1)
    values = rng.normal(size=10_000)
    values[[1234, 7777]] = -50.0, 99.0
    values[[5, 6]] = math.nan, math.inf
    step, low, median, high = thinned(range(10_000), values.tolist(), values.tolist())
    assert len(step) == MAX_COLUMNS and (np.diff(step) > 0).all()
    assert (low.min(), high.max()) == (-50.0, 99.0)
    assert step[low.argmin()] <= 1234 < step[low.argmin() + 1]
    assert (low <= median).all() and (median <= high).all() and np.abs(median).max() < 1
    short = thinned([3, 4, 5], [0.1, math.nan, 0.3], [1.0, 1.0, 2.0])
    assert short.tolist() == [[3, 5], [0.1, 0.3], [0.1, 0.3], [1, 2]]
    assert thinned([], [], []).shape == (4, 0)


def test_the_largest_changes_and_errors_worked_by_hand():
    """Events of 1, 1, 4, 8 s, and a set of two intervals of 1 s: 2 s long, its middle that of the hull."""
    truths = [((0.0, 1.0),), ((11.0, 12.0),), ((4.0, 8.0),), ((2.0, 10.0),), ((3.0, 4.0), (6.0, 7.0))]
    prompts = [make_prompt(f"p{i}", truth) for i, truth in enumerate(truths)]
    before = {"p0": "0 to 1", "p1": "11 to 12", "p2": "4 to 6", "p3": "2 to 4"}
    after = {"p0": "0 to 1", "p1": "1 to 2", "p2": "4 to 8", "p3": "2 to 6", "p4": "3 to 4"}
    ious = prompt_ious(prompts, {"student_before": before, "student_after": after, "step_4": after})
    assert {name: of.tolist() for name, of in ious.items()} == {
        "student_before": [1.0, 1.0, 0.5, 0.25, 0.0],
        "student_after": [1.0, 0.0, 1.0, 0.5, 1.0],
    }
    shown = largest_changes(prompts, ious)
    assert [p.prompt_id for _, p in shown] == ["p1", "p4", "p2", "p3"], (
        "the worst, then the best; p0 is equal"
    )
    assert shown[0][0] == "p1: IoU before 1.00, after 0.00"
    length, middle = error_tables(prompts, ious)
    assert length.models == ["before", "after"]
    assert [(name, n) for name, n, _ in length.rows][-1] == ("4.8 to 8 s", 1)
    assert sum(n for _, n, _ in length.rows) == 5 and length.rows[-1][2] == ["0.250", "0.500"]
    assert middle.rows == [
        ("0 to 20 %", 1, ["1.000", "1.000"]),
        ("40 to 60 %", 3, ["0.250", "0.833"]),
        ("80 to 100 %", 1, ["1.000", "0.000"]),
    ]


def test_disputed_tokens_are_coloured_by_who_doubts_them(tmp_path):
    rows = [
        row("calm", "From 1", [0.5, 0.5], [0.5, 0.5]),
        row("mild", "From 1", [0.5, 0.5], [0.5, 0.4]),
        row("sharp", "From 1", [0.9, 0.01], [0.9 / math.e**3, 0.01 * math.e**1.5]),
        row("nobody's", "From 1", [0.9, 0.9], None),
        row("truth", "From 1", [1.0, 1.0], [0.01, 0.01]) | {"prompt_fingerprint": None},  # nobody sampled it
        row("sharp", "From 2", [0.5, 0.5], [0.5, 0.4]),
    ]
    write_trajectories(tmp_path, 0, rows)
    sharp, mild = disputed_answers(tmp_path, STUDENT)
    assert (sharp.prompt_id, sharp.step, mild.prompt_id) == ("sharp", 2, "mild")
    assert (
        "".join(text for text, _, _ in sharp.tokens)
        == "From 1"[: len("".join(t for t, _, _ in sharp.tokens))]
    )
    assert [colour for _, colour, _ in sharp.tokens] == ["rgba(214,39,40,1.00)", "rgba(44,160,44,0.50)"]
    assert sharp.tokens[0][2] == "student 0.900, teacher 0.045"
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        disputed_answers(tmp_path, tmp_path)
    assert disputed_answers(tmp_path / "nowhere", tmp_path) == [], "no log: nothing is asked of a tokenizer"
