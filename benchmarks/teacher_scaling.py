"""Scored tokens per second by number of teacher replicas, around an engine that sleeps CALL_S per call.

`python -m benchmarks.teacher_scaling [--quick]`. All else is what a run has: this measures what the service
adds, on any number of cores. Calls are not merged (max_batch_requests=1: a replica works on one call while
one more waits there); callers keep LOAD calls per replica in flight. The last line is one JSON object.
"""

import asyncio
import time
from typing import Any

import numpy as np
import ray

from benchmarks import emulated_teacher
from benchmarks.command import Row, make_parser, print_result
from benchmarks.emulated_teacher import EmulatedReplica, make_groups
from driver.start_ray import start_ray
from teacher_service.pool import TeacherPool
from teacher_service.scaling import read_pool, set_replicas
from video_opd.config_file import load_demo

CALL_S, LOAD, SIZES = 0.5, 3, (1, 2, 4, 8)
CALL = GROUPS, ROLLOUTS, PROMPT_TOKENS, RESPONSE_TOKENS = 4, 4, 4096, 32  # 256 KiB of prompt tokens
START_S, POLL_S = 120.0, 0.2
POOL = ["teacher_pool.max_batch_requests=1", "teacher_pool.batch_wait_s=0", "teacher_pool.num_cpus=0.1"]
OVERRIDES = [*POOL, f"worker_env.{emulated_teacher.CALL_S}='{CALL_S}'", f"start_timeout_s={START_S}"]


async def scale_to(pool: TeacherPool, replicas: int) -> None:
    """Returns when that many replicas run. Raises TimeoutError."""
    await asyncio.to_thread(set_replicas, pool.app, replicas)
    async with asyncio.timeout(START_S):
        status = await asyncio.to_thread(read_pool, pool.app)
        while status.running != replicas or not status.reached:
            await asyncio.sleep(POLL_S)
            status = await asyncio.to_thread(read_pool, pool.app)


def calls_within(answers_s: np.ndarray, start_s: float, end_s: float) -> float:
    """Calls in the window. A call at its edge counts by the share of its CALL_S that lies inside."""
    inside = np.minimum(answers_s, end_s) - np.maximum(answers_s - CALL_S, start_s)
    return float(np.clip(inside, 0, None).sum() / CALL_S)


async def measure(pool: TeacherPool, replicas: int, references: list[Any], window_s: float) -> Row:
    """Tokens per second in the window, with LOAD callers per replica that each wait for their answer."""
    await scale_to(pool, replicas)
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


async def run(window_s: float) -> list[Row]:
    config = load_demo(OVERRIDES)
    start_ray(config, address="local")
    try:
        pool = TeacherPool("video_opd/benchmark", config, config.teacher_models[0], EmulatedReplica)
        await pool.start()
        references = [ray.put(make_groups(i, *CALL)) for i in range(LOAD * max(SIZES))]
        rows = [await measure(pool, size, references, window_s) for size in SIZES]
        pool.stop()
    finally:
        ray.shutdown()
    return rows


def main() -> None:
    parser = make_parser("teacher_scaling", __doc__, "windows of 6 s instead of 20")
    rows = asyncio.run(run(6.0 if parser.parse_args().quick else 20.0))
    linear = [row["tokens_per_s"] / (row["replicas"] * rows[0]["tokens_per_s"]) for row in rows]
    shown = [row | {"of_linear": f"{share:.1%}"} for row, share in zip(rows, linear, strict=True)]
    result = {"rows": rows, "efficiency_8": linear[-1], "call_s": CALL_S}
    print_result(result, f"{CALL_S} s a call, calls not merged", shown)


if __name__ == "__main__":
    main()
