"""Scored tokens a second by number of teacher replicas, with an engine that takes CALL_S a call and computes nothing.

`python -m benchmarks.teacher_scaling [--quick]`. All else is what a run has: TeacherPool, the Serve deployment and its replicas,
trajectories in the object store, which the replica fetches; the number of replicas is changed while calls go on. An engine that
sleeps measures what the service adds, on any number of cores. Calls are not merged (max_batch_requests=1, one call of CALL_S in a
replica at a time, one more waits there), and callers keep LOAD calls a replica under way. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import time
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from benchmarks import emulated_teacher
from benchmarks.emulated_teacher import EmulatedReplica, make_groups
from driver.start_ray import start_ray
from teacher_service.pool import TeacherPool
from teacher_service.scaling import read_pool, set_replicas
from video_opd.cluster.deadline import with_deadline
from video_opd.config import Config
from video_opd.config_file import load_demo

CALL_S, LOAD, SIZES = 0.5, 3, (1, 2, 4, 8)
GROUPS, ROLLOUTS, PROMPT_TOKENS, RESPONSE_TOKENS = 4, 4, 4096, 32  # of a call: 256 KiB of prompt tokens
START_S, POLL_S = 120.0, 0.2


def demo_config() -> Config:
    """The demo's, for replicas that compute nothing."""
    pool = {"max_batch_requests": 1, "batch_wait_s": 0, "num_cpus": 0.1}
    overrides = [f"teacher_pool.{key}={value}" for key, value in pool.items()]
    overrides += [f"worker_env.{emulated_teacher.CALL_S}='{CALL_S}'", f"start_timeout_s={START_S}"]
    return load_demo(overrides)


async def until_reached(pool: TeacherPool, replicas: int) -> None:
    """Returns when so many run."""

    async def poll() -> None:
        while (
            status := await asyncio.to_thread(read_pool, pool.app)
        ).running != replicas or not status.reached:
            await asyncio.sleep(POLL_S)

    await with_deadline(START_S, poll(), f"{replicas} replicas")


def calls_within(answers_s: np.ndarray, start_s: float, end_s: float) -> float:
    """Calls of the window; one at its edges counts by the share of its CALL_S that lies within, so that nothing is rounded."""
    inside = np.minimum(answers_s, end_s) - np.maximum(answers_s - CALL_S, start_s)
    return float(np.clip(inside, 0, None).sum() / CALL_S)


async def measure(
    pool: TeacherPool, replicas: int, references: list[Any], window_s: float
) -> dict[str, float]:
    """Closed loop of LOAD calls a replica: tokens a second of the window."""
    await asyncio.to_thread(set_replicas, pool.app, replicas)
    await until_reached(pool, replicas)
    began, answers = time.monotonic() + 4 * CALL_S, []  # by then all replicas are busy

    async def caller(number: int) -> None:
        while time.monotonic() < began + window_s:
            await pool.score(references[number % len(references)])
            answers.append(time.monotonic())

    await asyncio.gather(*(caller(i) for i in range(LOAD * replicas)))
    metrics = await pool.take_metrics()
    calls = calls_within(np.array(answers), began, began + window_s)
    rate = calls * GROUPS * ROLLOUTS * RESPONSE_TOKENS / window_s
    return {"replicas": replicas, "tokens_per_s": rate, "calls": calls, "queue_s": metrics["teacher/queue_s"]}


async def run(window_s: float) -> dict[str, Any]:
    config = demo_config()
    start_ray(config, address="local")
    try:
        pool = TeacherPool("video_opd/benchmark", config, config.teacher_models[0], EmulatedReplica)
        await pool.start()
        references = [
            ray.put(make_groups(i, GROUPS, ROLLOUTS, PROMPT_TOKENS, RESPONSE_TOKENS))
            for i in range(LOAD * max(SIZES))
        ]
        rows = [await measure(pool, size, references, window_s) for size in SIZES]
        pool.stop()
    finally:
        ray.shutdown()
    by_size = {row["replicas"]: row["tokens_per_s"] for row in rows}
    return {"rows": rows, "efficiency_8": by_size[8] / (8 * by_size[1]), "call_s": CALL_S}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher_scaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="windows of 6 s instead of 20")
    result = asyncio.run(run(6.0 if parser.parse_args().quick else 20.0))
    first = result["rows"][0]["tokens_per_s"]
    table = Table(
        "replicas", "tokens/s", "of linear", "calls", "queue s", title=f"{CALL_S} s a call, calls not merged"
    )
    for row in result["rows"]:
        share = row["tokens_per_s"] / (row["replicas"] * first)
        table.add_row(
            str(row["replicas"]),
            f"{row['tokens_per_s']:.0f}",
            f"{share:.1%}",
            f"{row['calls']:.1f}",
            f"{row['queue_s']:.2f}",
        )
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
