"""A run that is killed as a whole and resumed, repeatedly, and whose processes are then killed and stopped.

CHAOS_SEED chooses the moments and the order; CHAOS_HANG chooses what is stopped (actor, replica, scheduler or
rank); CHAOS_KILLS says how often the whole run is killed.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest

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
from video_opd.files.checkpoint import checkpoint_steps

KILLS = int(os.environ.get("CHAOS_KILLS", "2"))
STARTING_S, STEPPING_S = 5.0, 0.5
STEPS, PROMPTS = 5 * (4 + (KILLS + 1) // 2), 30  # a whole number of passes over the prompts


class Attack(NamedTuple):
    role: str
    number: signal.Signals
    victim: psutil.Process


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


def kill_as_a_whole(run: subprocess.Popen, run_folder: Path, number: int, rng: random.Random) -> int:
    """Kills every process; every other time while it steps, after its first checkpoint, else while it starts.

    Returns the last step then.
    """
    before = last_step(run_folder)
    try:
        if number % 2:
            time.sleep(rng.uniform(0, STARTING_S))
        else:
            wait_for(lambda: checkpoint_steps(run_folder), run, "the first checkpoint")
            wait_for(lambda: last_step(run_folder) > before, run, "a step")
            time.sleep(rng.uniform(0, STEPPING_S))
    finally:
        kill_all(run)
    return last_step(run_folder)


def attack(run: subprocess.Popen, run_folder: Path, rng: random.Random) -> Iterator[Attack]:
    """Kills a process of each role and stops one, each after another step."""
    events = [(role, signal.SIGKILL) for role in TITLES]
    events.append((os.environ.get("CHAOS_HANG", "actor"), signal.SIGSTOP))
    rng.shuffle(events)
    steps = sorted(rng.sample(range(last_step(run_folder) + 1, STEPS - 4), len(events)))
    for at, (role, number) in zip(steps, events, strict=True):
        wait_for(lambda at=at: last_step(run_folder) >= at, run, f"step {at}")
        time.sleep(rng.random())
        wait_for(lambda role=role: processes(run, role), run, f"a {role} to hit")
        victim = rng.choice(processes(run, role))
        os.kill(victim.pid, number)
        yield Attack(role, number, victim)


@pytest.fixture(scope="module")
def survived(overrides, pool, tmp_path_factory) -> tuple[Path, str, list[Attack]]:
    """(run folder, what it printed, what was done to it after it had been killed as a whole and resumed)."""
    folder = tmp_path_factory.mktemp("chaos") / "chaos"
    folder.mkdir()
    options = [
        *(*SMALL, f"num_steps={STEPS}", "max_policy_lag=1", "checkpoint_every=3", "max_retries=8"),
        *("request_timeout_s=20", "video.decode_timeout_s=15", "watchdog_s=20"),
        *("checks.max_logprob_gap=null", f"runs_dir={folder.parent / 'runs'}", "run_name=chaos"),
    ]
    more = ["rollout.num_actors=2", "teacher_pool.num_replicas=2", "learner.world_size=2"]
    rng = random.Random(int(os.environ.get("CHAOS_SEED", "0")))
    run_folder, moments, done = folder.parent / "runs" / "chaos", [], []
    run = start(folder, *overrides, *pool, *options)
    try:
        for number in range(KILLS):
            moments.append(kill_as_a_whole(run, run_folder, number, rng))
            run = start(folder, "--resume", str(run_folder), *more)
        done += attack(run, run_folder, rng)
        output = end(run, folder)
    except BaseException:
        kill_all(run)
        print((folder / "output.txt").read_text()[-6000:], moments, done)
        raise
    assert len(set(moments)) >= (KILLS + 1) // 2, moments
    stopped = [a.victim for a in done if a.number == signal.SIGSTOP]
    assert not [p for p in stopped if p.is_running()], "the process that hung is still there"
    return run_folder, output, done


def test_a_run_ends_by_itself_whatever_is_killed_or_hangs(survived):
    _, output, done = survived
    assert {a.role for a in done if a.number == signal.SIGKILL} == TITLES.keys()
    actors = sum(a.role == "actor" for a in done)
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
