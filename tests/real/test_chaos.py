"""A run whose processes are killed and stopped under it, and one that is killed as a whole and resumed, again and again.

CHAOS_SEED chooses the moments and the order, CHAOS_HANG what is stopped: actor, replica, scheduler or rank.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from demo.clips import write_split
from tests.real.conftest import DEMO
from tests.real.test_launch import ROOT, metrics_of, trajectories_of
from video_opd.config_file import load_config
from video_opd.models.forward import load_model

TITLES = {  # of Ray's processes, as `ps` shows them
    "actor": "ray::RolloutActor",
    "replica": "ray::ServeReplica",
    "scheduler": "ray::SchedulerActor",
    "rank": "ray::LearnerRank",
}
PATIENCE_S = 240.0
PARAMETER_TOLERANCE = 1e-3  # engines merge calls as they come, and float sums depend on the batch
GROUPS, STEPS = 6, 40


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> list[str]:
    """Overrides of a training split of 40 prompts: what GROUPS * STEPS prompts are a whole number of passes over."""
    folder = tmp_path_factory.mktemp("pool") / "train"
    write_split(folder, "train", 24, ("colour", "shape"))
    annotations = folder / "annotations.txt"
    lines = annotations.read_text().splitlines()
    annotations.write_text("\n".join(lines[:40]) + "\n")
    assert len(lines) >= 40
    names = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    return [f"data.train.{key}={folder / name}" for key, name in names.items()]


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """launch.py with its output in folder/output.txt."""
    with (folder / "output.txt").open("a") as output:
        command = [sys.executable, "-u", str(ROOT / "launch.py"), "--address", "local", *arguments]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def processes(run: subprocess.Popen, role: str) -> list[psutil.Process]:
    """The run's own processes of a role."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if (
                " ".join(process.cmdline()).startswith(TITLES[role])
                and process.status() != psutil.STATUS_STOPPED
            ):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def last_step(folder: Path) -> int:
    """-1 before the first."""
    path = folder / "metrics.jsonl"
    return metrics_of(folder)[-1]["step"] if path.exists() and path.read_text().endswith("\n") else -1


def wait_for(condition, run: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert run.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def end(run: subprocess.Popen, folder: Path, expected: int = 0) -> str:
    """Waits for the end, and returns what was printed. Whatever is left of a run that fails is killed."""
    try:
        code = run.wait(PATIENCE_S)
    finally:
        kill_all(run)
    output = (folder / "output.txt").read_text()
    assert code == expected, output[-4000:]
    return output


def kill_all(run: subprocess.Popen) -> None:
    """SIGKILL for the driver and everything below it."""
    try:
        family = [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    run.wait(30)


@pytest.fixture(scope="module")
def survived(overrides, pool, tmp_path_factory) -> tuple[Path, str, list[tuple[int, str, str]]]:
    """(run folder, what it printed, what was done to it: step, role, signal)."""
    folder = tmp_path_factory.mktemp("chaos") / "chaos"
    folder.mkdir()
    options = [
        *(
            f"num_steps={STEPS}",
            f"groups_per_step={GROUPS}",
            "max_policy_lag=1",
            "checkpoint_every=3",
            "max_retries=8",
        ),
        *(
            "rollout.num_actors=2",
            "rollout.prompts_per_call=3",
            "rollout.prompts_per_result=1",
            "rollout.max_response_tokens=6",
        ),
        *(
            "teacher_pool.num_replicas=2",
            "learner.world_size=2",
            "learner.micro_batch=3",
            "data.eval.max_prompts=4",
        ),
        *(
            "request_timeout_s=20",
            "video.decode_timeout_s=15",
            "start_timeout_s=120",
            "watchdog_s=20",
            "checks.max_logprob_gap=null",
        ),
        *(f"runs_dir={folder.parent / 'runs'}", "run_name=chaos"),
    ]
    rng = random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    events = [(role, signal.SIGKILL) for role in TITLES] + [
        (os.environ.get("CHAOS_HANG", "actor"), signal.SIGSTOP)
    ]
    rng.shuffle(events)
    run_folder, done = folder.parent / "runs" / "chaos", []
    run = start(folder, *overrides, *pool, *options)
    stopped: list[psutil.Process] = []
    try:
        for at, (role, number) in zip(
            sorted(rng.sample(range(1, STEPS - 4), len(events))), events, strict=True
        ):
            wait_for(lambda at=at: last_step(run_folder) >= at, run, f"step {at}")
            time.sleep(rng.random())
            wait_for(lambda role=role: processes(run, role), run, f"a {role} to hit")
            victim = rng.choice(processes(run, role))
            os.kill(victim.pid, number)
            stopped += [victim] if number == signal.SIGSTOP else []
            done.append((last_step(run_folder), role, number.name))
        output = end(run, folder)
    except BaseException:
        kill_all(run)
        print((folder / "output.txt").read_text()[-6000:], done)
        raise
    assert not [p for p in stopped if p.is_running()], "the process that hung is still there"
    return run_folder, output, done


def test_a_run_ends_by_itself_whatever_is_killed_or_hangs(survived):
    _, output, done = survived
    assert {(role, name) for _, role, name in done} >= {(role, "SIGKILL") for role in TITLES}
    actors = sum(role == "actor" for _, role, _ in done)
    assert len(re.findall(r"actor-\d+ was lost and is replaced", output)) >= actors
    assert "the curriculum was lost and is rebuilt" in output
    assert re.search(
        r"the learner's \w+ was lost: .*; it is restarted, and the run goes back from step \d+ to \d+",
        output,
    )


def test_every_scheduled_prompt_is_trained_on_exactly_once(survived):
    folder, output, _ = survived
    rows, metrics = trajectories_of(folder), metrics_of(folder)
    assert [m["step"] for m in metrics] == list(range(STEPS)), output[-2000:]
    assert Counter(r["step"] for r in rows) == dict.fromkeys(range(STEPS), GROUPS)
    assert all(0 <= r["step"] - r["policy_version"] <= 1 for r in rows)
    assert len({r["trajectory_id"] for r in rows}) == len(rows)
    records = pq.read_table(folder / "curriculum" / "records.parquet").to_pylist()
    assert not any(r["dropped"] for r in records)
    trained = Counter(r["prompt_id"] for r in rows)
    assert {r["prompt_id"]: r["num_rollouts"] for r in records} == trained
    assert set(trained.values()) == {GROUPS * STEPS // 40}, "passes over the pool are whole"
    assert all(len(r["teacher_logprobs"]) == len(r["response_token_ids"]) for r in rows)


KILLS, OF_STEPS, KILLED_STEPS, STARTING_S = 10, 4, 48, 8.0  # so many of the kills while it steps


def killed_options(folder: Path) -> list[str]:
    return [
        *(
            f"num_steps={KILLED_STEPS}",
            f"groups_per_step={GROUPS}",
            "max_policy_lag=0",
            "checkpoint_every=1",
            "learner.lr=1e-3",
        ),
        *(
            "rollout.prompts_per_call=3",
            "rollout.prompts_per_result=1",
            "rollout.max_response_tokens=6",
            "learner.micro_batch=3",
        ),
        *("data.eval.max_prompts=2", "request_timeout_s=120", "start_timeout_s=120", f"runs_dir={folder}"),
    ]


def test_a_run_killed_at_ten_random_moments_ends_as_an_undisturbed_one_does(overrides, pool, tmp_path):
    """Lag 0, same seed: the same prompts at every step; parameters within PARAMETER_TOLERANCE of the largest that any moved."""
    options = killed_options(tmp_path)
    undisturbed = start(tmp_path, *overrides, *pool, *options, "run_name=undisturbed")
    end(undisturbed, tmp_path)
    folder, rng = tmp_path / "killed", random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    run = start(tmp_path, *overrides, *pool, *options, "run_name=killed")
    moments, of_steps = [], {0, *rng.sample(range(1, KILLS), OF_STEPS - 1)}
    for number in range(KILLS):
        before = last_step(folder)
        try:
            if number not in of_steps:  # while it starts, or restores
                time.sleep(rng.uniform(0, STARTING_S))
            else:
                wait_for(lambda: (folder / "checkpoints").exists(), run, "the first checkpoint")
                wait_for(lambda before=before: last_step(folder) != before, run, "a step")
                time.sleep(rng.uniform(0, 2))
        finally:
            kill_all(run)
        moments.append(last_step(folder))
        run = start(tmp_path, "--resume", str(folder))
    output = end(run, tmp_path)
    assert len(set(moments)) >= 3, moments

    def prompts_of(name: str) -> list[tuple[int, str]]:
        return [
            (r["step"], r["prompt_id"])
            for r in sorted(trajectories_of(tmp_path / name), key=lambda r: r["step"])
        ]

    assert prompts_of("killed") == prompts_of("undisturbed"), output[-2000:]
    assert [m["step"] for m in metrics_of(folder)] == list(range(KILLED_STEPS))
    ends = [
        dict(
            load_model(
                str(tmp_path / name / f"checkpoints/step-{KILLED_STEPS}/student"), "float32"
            ).named_parameters()
        )
        for name in ("killed", "undisturbed")
    ]
    begin = dict(load_model(load_config(DEMO, overrides).student, "float32").named_parameters())
    with torch.no_grad():
        moved = max(float((ends[1][n] - begin[n]).abs().max()) for n in begin)
        apart = max(float((ends[0][n] - ends[1][n]).abs().max()) for n in begin)
    assert moved > 1e-3
    assert apart < PARAMETER_TOLERANCE * moved, (apart, moved)
