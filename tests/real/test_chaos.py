"""A run whose processes are killed and stopped, and one that is killed as a whole and resumed, repeatedly.

CHAOS_SEED chooses the moments and the order; CHAOS_HANG chooses what is stopped (actor, replica, scheduler or
rank); CHAOS_KILLS says how often a whole run is killed.
"""

import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from tests.real.conftest import DEMO
from tests.real.runs import (
    GROUPS,
    SMALL,
    TITLES,
    end,
    kill_all,
    last_step,
    metrics_of,
    processes,
    start,
    trajectories_of,
    wait_for,
    write_data,
)
from video_opd.config_file import load_config
from video_opd.models.forward import load_model

PARAMETER_TOLERANCE = 1e-3  # engines merge calls as they come, and float sums depend on the batch
STEPS, PROMPTS = 20, 30  # a whole number of passes over the prompts


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> list[str]:
    """Overrides of a training split of PROMPTS prompts."""
    folder = tmp_path_factory.mktemp("pool")
    data = write_data(folder, "train", 24, ("colour", "shape"))
    annotations = folder / "train" / "annotations.txt"
    lines = annotations.read_text().splitlines()
    assert len(lines) >= PROMPTS
    annotations.write_text("\n".join(lines[:PROMPTS]) + "\n")
    return data


@pytest.fixture(scope="module")
def survived(overrides, pool, tmp_path_factory) -> tuple[Path, str, list[tuple[int, str, str]]]:
    """(run folder, what it printed, what was done to it: step, role, signal)."""
    folder = tmp_path_factory.mktemp("chaos") / "chaos"
    folder.mkdir()
    options = [
        *(*SMALL, f"num_steps={STEPS}", "max_policy_lag=1", "checkpoint_every=3", "max_retries=8"),
        *("rollout.num_actors=2", "teacher_pool.num_replicas=2", "learner.world_size=2"),
        *("request_timeout_s=20", "video.decode_timeout_s=15", "watchdog_s=20"),
        *("checks.max_logprob_gap=null", f"runs_dir={folder.parent / 'runs'}", "run_name=chaos"),
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
    lost = r"(the learner's \w+ was lost|went with the learner): .*"
    assert re.search(rf"{lost}; it is restarted, and the run goes back from step \d+ to \d+", output)


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
    assert set(trained.values()) == {GROUPS * STEPS // PROMPTS}, "passes over the pool are whole"
    assert all(len(r["teacher_logprobs"]) == len(r["response_token_ids"]) for r in rows)


KILLS = int(os.environ.get("CHAOS_KILLS", "2"))
KILLED_STEPS, STARTING_S, STEPPING_S = 12, 8.0, 1.0


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one_does(overrides, pool, tmp_path):
    """Lag 0, same seed: the same prompts at every step, and parameters within PARAMETER_TOLERANCE.

    Every other kill comes while the run steps, the others while it starts or restores.
    """
    options = [
        *(*SMALL, f"num_steps={KILLED_STEPS}", "max_policy_lag=0", "checkpoint_every=1", "learner.lr=1e-3"),
        *("data.eval.max_prompts=2", f"runs_dir={tmp_path}"),
    ]
    end(start(tmp_path, *overrides, *pool, *options, "run_name=undisturbed"), tmp_path)
    folder, rng = tmp_path / "killed", random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    run = start(tmp_path, *overrides, *pool, *options, "run_name=killed")
    moments = []
    for number in range(KILLS):
        before = last_step(folder)
        try:
            if number % 2:
                time.sleep(rng.uniform(0, STARTING_S))
            else:
                wait_for(lambda: (folder / "checkpoints").exists(), run, "the first checkpoint")
                wait_for(lambda before=before: last_step(folder) > before, run, "a step")
                time.sleep(rng.uniform(0, STEPPING_S))
        finally:
            kill_all(run)
        moments.append(last_step(folder))
        run = start(tmp_path, "--resume", str(folder))
    output = end(run, tmp_path)
    assert len(set(moments)) >= (KILLS + 1) // 2, moments

    def prompts_of(name: str) -> list[tuple[int, str]]:
        rows = sorted(trajectories_of(tmp_path / name), key=lambda r: r["step"])
        return [(r["step"], r["prompt_id"]) for r in rows]

    def student_of(name: str) -> dict[str, torch.Tensor]:
        student = tmp_path / name / "checkpoints" / f"step-{KILLED_STEPS}" / "student"
        return dict(load_model(str(student), "float32").named_parameters())

    assert prompts_of("killed") == prompts_of("undisturbed"), output[-2000:]
    assert [m["step"] for m in metrics_of(folder)] == list(range(KILLED_STEPS))
    killed, undisturbed = student_of("killed"), student_of("undisturbed")
    begin = dict(load_model(load_config(DEMO, overrides).student, "float32").named_parameters())
    with torch.no_grad():
        moved = max(float((undisturbed[n] - begin[n]).abs().max()) for n in begin)
        apart = max(float((killed[n] - undisturbed[n]).abs().max()) for n in begin)
    assert moved > 1e-3
    assert apart < PARAMETER_TOLERANCE * moved, (apart, moved)
