"""`python -m evaluation` of a run's checkpoint against what launch.py itself said of that student."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from demo.clips import write_split
from tests.real.test_launch import ROOT, run_launch

PROMPTS = 40  # more than one call of prompts_per_call
RUN = "evaluated"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """The demo with its own models, whose answers are worth comparing, on a few clips of its kind."""
    folder = tmp_path_factory.mktemp("demo")
    for split, count in (("train", 16), ("eval", 32)):
        write_split(folder / split, split, count, ("colour", "shape"))
    files = (("annotations", "annotations.txt"), ("lengths", "lengths.csv"), ("videos", "videos"))
    data = [
        f"data.{split}.{key}={folder / split / name}" for split in ("train", "eval") for key, name in files
    ]
    models = [f"{name}={ROOT / 'demo' / 'models' / name}" for name in ("student", "teacher")]
    return [*models, *data, f"data.eval.max_prompts={PROMPTS}", f"runs_dir={folder / 'runs'}"]


@pytest.fixture(scope="module")
def run(shared_ray, overrides) -> Path:
    done = run_launch(*overrides, "num_steps=2", "groups_per_step=8", "max_policy_lag=0", f"run_name={RUN}")
    assert done.returncode == 0, done.stderr[-4000:]
    return Path(next(o for o in overrides if o.startswith("runs_dir=")).removeprefix("runs_dir=")) / RUN


def evaluate(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "evaluation", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def only(values: dict, like: dict) -> dict:
    return {key: values[key] for key in like}


def test_a_runs_checkpoint_has_launchs_own_numbers_and_answers(run):
    summary = json.loads((run / "summary.json").read_text())
    printed = evaluate("--run", run)
    result = json.loads((run / "evaluation" / "strict.json").read_text())
    assert only(result["result"], summary["student_after"]) == summary["student_after"]
    assert summary["student_after"]["miou"] > 0.3 and summary["student_after"]["n"] == PROMPTS, (
        "numbers worth comparing"
    )
    assert result["baselines"].keys() == summary["baselines"].keys()
    for name, values in summary["baselines"].items():
        assert only(result["baselines"][name], values) == values
    rows = pq.read_table(run / "evaluation" / "strict.parquet").to_pylist()
    assert {r["prompt_id"]: r["text"] for r in rows} == summary["examples"]["student_after"]
    assert f"{summary['student_after']['miou']:.3f}" in printed and f"n {PROMPTS}, unparsed" in printed
    low, high = result["intervals_95"]["miou"]
    assert low < result["result"]["miou"] < high
    assert (run / "evaluation" / "strict.png").read_bytes().startswith(b"\x89PNG")


def test_the_exported_student_is_loaded_by_vllm_and_has_the_numbers_that_it_was_exported_with(run, tmp_path):
    exported = json.loads((run / "student" / "export.json").read_text())
    assert exported["step"] == 2
    evaluate("--model", run / "student", "--config", run / "config.yaml", "--out", tmp_path, "--no-baselines")
    assert json.loads((tmp_path / "strict.json").read_text())["result"]["miou"] == exported["miou"] > 0.3
