"""A run that is told to stop, and goes on elsewhere: the real command, shrunk."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.real.test_launch import GROUPS, ROOT, SHRUNK, metrics_of, run_launch, trajectories_of
from video_opd.config_file import load_config
from video_opd.files.checkpoint import checkpoint_steps
from video_opd.models.forward import load_model

WAIT_S = 120


def wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + WAIT_S
    while not what():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture(scope="module")
def stopped(overrides, tmp_path_factory) -> tuple[Path, str]:
    """A run that got SIGTERM after its second step, and what it said; it asked for a thousand."""
    run = Path(load_config(ROOT / "configs" / "demo.yaml", overrides).runs_dir) / "stopped"
    store = tmp_path_factory.mktemp("store")
    more = [
        "num_steps=1000",
        "run_name=stopped",
        "loss.kind=opd",
        "eval_every=1",
        f"checkpoint_url=file://{store}",
    ]
    command = [sys.executable, str(ROOT / "launch.py"), *overrides, *SHRUNK, *more]
    with (
        (store / "stderr").open("w") as stderr,
        subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL) as process,
    ):
        wait_for(
            lambda: (
                (run / "metrics.jsonl").is_file()
                and len((run / "metrics.jsonl").read_text().splitlines()) > 1
            ),
            process,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 143
    return run, (store / "stderr").read_text()


def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint_and_one_line(stopped):
    run, said = stopped
    (step,) = checkpoint_steps(run)
    assert [m["step"] for m in metrics_of(run)] == list(range(step))
    assert said.strip().splitlines()[-1] == f"stopped by SIGTERM at step {step}: continue with --resume {run}"
    assert "Traceback" not in said
    assert len(trajectories_of(run)) == step * GROUPS


@pytest.fixture(scope="module")
def resumed(stopped, shared_ray, tmp_path_factory) -> Path:
    """One step more, from the copy of the checkpoint, with another number of ranks, actors and teachers."""
    run, _ = stopped
    (step,) = checkpoint_steps(run)
    url = yaml.safe_load((run / "config.yaml").read_text())["checkpoint_url"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    more = [f"num_steps={step + 1}", f"runs_dir={elsewhere}", "checkpoint_url=null"]
    parts = ["learner.world_size=2", "rollout.num_actors=2", "teacher_pool.num_replicas=2"]
    done = run_launch("--resume", f"{url}/stopped", *more, *parts)
    assert done.returncode == 0, done.stderr[-4000:]
    return elsewhere / "stopped"


def test_it_goes_on_from_a_copy_and_reports_the_evaluations_of_its_true_start(stopped, resumed):
    (step,) = checkpoint_steps(stopped[0])
    state = json.loads((stopped[0] / "checkpoints" / f"step-{step}" / "state.json").read_text())
    assert [m["step"] for m in metrics_of(resumed)] == list(range(step + 1))
    assert metrics_of(resumed)[:step] == metrics_of(stopped[0])
    assert checkpoint_steps(resumed) == [step, step + 1]
    summary = json.loads((resumed / "summary.json").read_text())
    for name in ("teacher", "student_before"):
        assert summary[name] == state["evaluations"][name]
        assert summary["examples"][name].keys() == summary["examples"]["student_after"].keys()
    assert summary["rollouts"] == (step + 1) * GROUPS


def test_the_exported_student_is_that_of_the_best_evaluation_and_loads_in_transformers(stopped, resumed):
    (step,) = checkpoint_steps(stopped[0])
    state = json.loads((resumed / "checkpoints" / f"step-{step + 1}" / "state.json").read_text())
    miou = {n: state["evaluations"][f"step_{n}"]["miou"] for n in range(1, step + 2)}
    exported = json.loads((resumed / "student" / "export.json").read_text())
    assert exported["miou"] == miou[exported["step"]]
    kept = resumed / "checkpoints" / f"step-{exported['step']}" / "student"
    assert kept.is_dir(), "of a step whose weights are here"
    ours, theirs = (
        dict(load_model(str(f), "float32").named_parameters()) for f in (resumed / "student", kept)
    )
    assert ours.keys() == theirs.keys() and all((ours[n] == theirs[n]).all() for n in ours)
