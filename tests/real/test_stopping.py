"""A run loses its Ray, begins anew, is stopped by a signal, resumed elsewhere and evaluated.

It has the demo's own models. Of its processes, and of another Ray's whose driver is killed, nothing is left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest

from tests.real.runs import (
    end,
    family,
    last_step,
    metrics_of,
    run_launch,
    run_module,
    start,
    trajectories_of,
    wait_for,
    wait_until_gone,
    write_data,
)
from video_opd import ROOT
from video_opd.files.checkpoint import checkpoint_steps
from video_opd.files.run_folder import COMMANDS
from video_opd.models.forward import load_model

PROMPTS, A_CALL = 16, 12  # more than one call
GROUPS = 8


class Stopped(NamedTuple):
    """A run whose process group got SIGTERM twice after its second step: it had asked for a thousand.

    It had begun before, and had lost its Ray after its second step.
    """

    folder: Path
    url: str  # of the copy of its checkpoints
    lost: str  # what it said when it lost its Ray
    resumed_s: float  # when it began anew
    said: str  # then
    everybody: list[psutil.Process]  # its processes, of both times

    @property
    def step(self) -> int:
        (step,) = checkpoint_steps(self.folder)
        return step

    @property
    def state(self) -> dict:
        return json.loads((self.folder / "checkpoints" / f"step-{self.step}" / "state.json").read_text())


KILLED = """
import time
from video_opd.cluster.join import start_local
start_local(num_cpus=1, include_dashboard=False)
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def orphans() -> list[psutil.Process]:
    """The processes of a Ray whose driver was killed; Ray's agents notice after a minute."""
    run = subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    output: Any = run.stdout
    with output:
        wait_for(lambda: output.readline() == "started\n", run, "the start of Ray")
    driver, *of_ray = family(run.pid)
    sessions = {os.getsid(p.pid) for p in of_ray}
    driver.kill()
    run.wait()
    assert len(of_ray) > 3 and os.getsid(0) not in sessions
    return of_ray


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, orphans) -> Stopped:
    """The demo's models have answers that are worth comparing."""
    folder = tmp_path_factory.mktemp("stopping")
    data = [
        option
        for split, count in (("train", 16), ("eval", 16))
        for option in write_data(folder, split, count, ("colour", "shape"))
    ]
    options = [
        *(f"{name}={ROOT / 'demo' / 'models' / name}" for name in ("student", "teacher")),
        *(f"runs_dir={folder}", "run_name=stopped", f"checkpoint_url=file://{folder / 'store'}"),
        *("num_steps=1000", f"groups_per_step={GROUPS}", "max_policy_lag=0", "eval_every=1"),
        *(f"data.eval.max_prompts={PROMPTS}", f"rollout.prompts_per_call={A_CALL}"),
        *("start_timeout_s=600", "request_timeout_s=120"),
    ]
    run, of_run = start(folder, *data, *options), folder / "stopped"
    wait_for(lambda: last_step(of_run) >= 1, run, "step 1")
    everybody = family(run.pid)
    next(p for p in everybody if p.name() == "gcs_server").kill()
    lost = end(run, folder, 1)
    assert checkpoint_steps(of_run) == []
    (of_run / "curriculum").mkdir()
    (of_run / "curriculum" / "round-9.parquet").touch()

    resumed_s = time.time()
    run = start(folder, "--resume", str(of_run))
    wait_for(
        lambda: last_step(of_run) >= 1 and metrics_of(of_run)[0]["wall_s"] > resumed_s, run, "step 1 again"
    )
    everybody += family(run.pid)
    for _ in range(2):  # as `timeout` does
        os.killpg(run.pid, signal.SIGTERM)
    said = end(run, folder, 128 + signal.SIGTERM)
    url = f"file://{folder / 'store'}/stopped"
    return Stopped(of_run, url, lost, resumed_s, said.removeprefix(lost), everybody)


def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint_and_one_line(stopped):
    step = stopped.step
    assert [m["step"] for m in metrics_of(stopped.folder)] == list(range(step))
    last = stopped.said.strip().splitlines()[-1]
    assert last == f"stopped by SIGTERM at step {step}: continue with --resume {stopped.folder}"
    assert "Traceback" not in stopped.said
    assert len(trajectories_of(stopped.folder)) == step * GROUPS


def test_a_run_ends_with_its_ray_and_begins_anew(stopped):
    """It is lost before its first checkpoint, so what it did is done again."""
    lost = "error: Ray ended under the run (its gcs_server was ended by SIGKILL)"
    assert stopped.lost.strip().splitlines()[-1] == f"{lost}: continue with --resume {stopped.folder}"
    assert metrics_of(stopped.folder)[0]["wall_s"] > stopped.resumed_s
    assert not (stopped.folder / "curriculum" / "round-9.parquet").exists()


@pytest.fixture(scope="module")
def resumed(stopped, shared_ray, tmp_path_factory) -> Path:
    """One step more, from the copy of the checkpoint."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    more = [f"num_steps={stopped.step + 1}", f"runs_dir={elsewhere}", "checkpoint_url=null"]
    done = run_launch("--resume", stopped.url, *more)
    assert done.returncode == 0, done.stderr[-4000:]
    return elsewhere / "stopped"


def test_it_goes_on_from_a_copy_and_reports_the_evaluations_of_its_true_start(stopped, resumed):
    step = stopped.step
    assert [m["step"] for m in metrics_of(resumed)] == list(range(step + 1))
    assert metrics_of(resumed)[:step] == metrics_of(stopped.folder)
    assert checkpoint_steps(resumed) == [step, step + 1]
    started, *resumes = (resumed / COMMANDS).read_text().splitlines()
    assert "run_name=stopped" in started and ["--resume" in line for line in resumes] == [True, True]
    summary = json.loads((resumed / "summary.json").read_text())
    for name in ("teacher", "student_before"):
        assert summary[name] == stopped.state["evaluations"][name]
        assert summary["examples"][name].keys() == summary["examples"]["student_after"].keys()
    assert summary["rollouts"] == (step + 1) * GROUPS


def test_the_exported_student_is_that_of_the_best_evaluation_and_loads_in_transformers(stopped, resumed):
    last = stopped.step + 1
    state = json.loads((resumed / "checkpoints" / f"step-{last}" / "state.json").read_text())
    names = {n: f"step_{n}" for n in range(1, last + 1)}  # the signal may have cut the stopped step's short
    miou = {n: of[name]["miou"] for of in [state["evaluations"]] for n, name in names.items() if name in of}
    assert last in miou and len(miou) >= last - 1
    exported = json.loads((resumed / "student" / "export.json").read_text())
    assert exported["miou"] == miou[exported["step"]]
    kept = resumed / "checkpoints" / f"step-{exported['step']}" / "student"
    assert kept.is_dir(), "of a step whose weights are here"
    ours, theirs = (
        dict(load_model(str(f), "float32").named_parameters()) for f in (resumed / "student", kept)
    )
    assert ours.keys() == theirs.keys() and all((ours[n] == theirs[n]).all() for n in ours)


EVALUATE = """
import sys
from evaluation.__main__ import main
sys.exit(main(sys.argv[1:3]) or main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def evaluated(resumed, tmp_path_factory) -> tuple[str, Path]:
    """What the command printed of the run; the results of the exported student, by the same process."""
    folder = tmp_path_factory.mktemp("evaluated")
    exported = ["--model", resumed / "student", "--config", resumed / "config.yaml", "--out", folder]
    done = run_module("-c", EVALUATE, "--run", resumed, *exported, "--no-baselines")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, folder


def only(values: dict, like: dict) -> dict:
    return {key: values[key] for key in like}


def test_an_evaluated_checkpoint_has_launchs_own_numbers_and_answers(resumed, evaluated):
    summary = json.loads((resumed / "summary.json").read_text())
    after = summary["student_after"]
    result = json.loads((resumed / "evaluation" / "strict.json").read_text())
    assert only(result["result"], after) == after
    assert after["miou"] > 0.3 and after["n"] == PROMPTS, "numbers worth comparing"
    assert result["baselines"].keys() == summary["baselines"].keys()
    for name, values in summary["baselines"].items():
        assert only(result["baselines"][name], values) == values
    rows = pq.read_table(resumed / "evaluation" / "strict.parquet").to_pylist()
    assert {r["prompt_id"]: r["text"] for r in rows} == summary["examples"]["student_after"]
    assert f"{after['miou']:.3f}" in evaluated[0] and f"n {PROMPTS}, unparsed" in evaluated[0]
    low, high = result["intervals_95"]["miou"]
    assert low < result["result"]["miou"] < high
    assert (resumed / "evaluation" / "strict.png").read_bytes().startswith(b"\x89PNG")


def test_vllm_loads_the_exported_student_and_finds_the_numbers_it_was_exported_with(resumed, evaluated):
    exported = json.loads((resumed / "student" / "export.json").read_text())
    result = json.loads((evaluated[1] / "strict.json").read_text())["result"]
    assert result["miou"] == exported["miou"] > 0.3


def test_no_process_of_a_run_or_of_a_ray_in_a_session_of_its_own_survives_the_driver(stopped, orphans):
    """Last: it takes them a while to notice."""
    wait_until_gone(stopped.everybody + orphans)
