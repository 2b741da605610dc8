"""Steps a second at lag 0 and lag 1: of the demo, and of phases that take emulated times.

`python -m benchmarks.overlap [--quick]`. The emulated run is launch.train with its real buffer, pools, Ray actors, Serve
deployment and object store; only the engines sleep instead: a step's rollouts ROLLOUT_S, its scores SCORE_S, its update
UPDATE_S. "whole": an actor hands a step's rollouts on together, when the last is finished; "as they finish": in four
parts. At lag 1 two steps are under way, so a step takes at least its slowest phase, and at least half of what one step's
prompts need from end to end. The last line is one JSON object.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

import launch
from actors.actor_pool import ActorPool
from benchmarks import emulated_parts, emulated_teacher
from benchmarks.emulated_parts import EmulatedActor, EmulatedRank
from benchmarks.emulated_teacher import EmulatedReplica
from curriculum.curriculum import Curriculum
from driver.records.sinks import read_metrics
from driver.run import Run
from driver.start_ray import start_ray
from learner.learner import Learner
from preflight.inputs import Plan
from teacher_service.pool import TeacherPool
from video_opd.config import Config
from video_opd.config_file import load_demo

ROLLOUT_S, SCORE_S, UPDATE_S = 4.0, 2.0, 3.0
SLOWEST_S = max(ROLLOUT_S, SCORE_S, UPDATE_S)
GROUPS, PARTS = 8, 4
WARM_UP_STEPS = 2  # the pipeline fills


def demo_config(overrides: list[str]) -> Config:
    return load_demo(overrides)


def step_seconds(run_dir: Path) -> list[float]:
    """From one step's line to the next, the first ones left out."""
    ends = [line["wall_s"] for line in read_metrics(run_dir)][WARM_UP_STEPS:]
    return [after - before for before, after in itertools.pairwise(ends)]


def emulated_config(lag: int, parts: int, num_steps: int, runs: str) -> Config:
    """The demo's, for parts that sleep; a score call takes its share of SCORE_S."""
    env = {
        emulated_parts.ROLLOUT_S: ROLLOUT_S,
        emulated_parts.UPDATE_S: UPDATE_S,
        emulated_teacher.CALL_S: SCORE_S / parts,
    }
    return demo_config(
        [
            *(f"worker_env.{name}='{seconds}'" for name, seconds in env.items()),
            *(
                f"max_policy_lag={lag}",
                f"groups_per_step={GROUPS}",
                f"num_steps={num_steps}",
                f"runs_dir={runs}",
            ),
            *(f"rollout.prompts_per_call={GROUPS}", f"rollout.prompts_per_result={GROUPS // parts}"),
            *("loss.kind=opd", "teacher_pool.max_batch_requests=1", "checks.max_logprob_gap=null"),
        ]
    )


async def train_emulated(config: Config, plan: Plan, folder: Path) -> None:
    name = f"video_opd/{folder.name}"
    run = Run(
        folder=folder,
        config=config,
        given=config,
        plan=plan,
        control=None,
        actors=ActorPool(name, config, EmulatedActor),
        teacher=TeacherPool(name, config, config.teacher_models[0], EmulatedReplica),
        learner=Learner(name, config, EmulatedRank),
        curriculum=Curriculum(name, plan.train, config),
        rewards=[],
    )
    assert run.teacher
    await asyncio.gather(run.actors.start(), run.learner.start(), run.teacher.start())
    await launch.publish_weights(run, policy_version=0)
    await launch.train(run)
    run.actors.stop()
    run.teacher.stop()
    run.learner.stop()


def emulate(lag: int, parts: int, num_steps: int) -> float:
    """Mean seconds of a step: steps alternate at lag 1, so that a median would flatter."""
    with tempfile.TemporaryDirectory() as runs:
        config = emulated_config(lag, parts, num_steps, runs)
        plan = launch.prepare(config)
        start_ray(config, address="local")
        try:
            folder = Path(runs) / "emulated"
            folder.mkdir()
            asyncio.run(train_emulated(config, plan, folder))
        finally:
            ray.shutdown()
        return statistics.mean(step_seconds(folder))


def train_demo(lag: int, num_steps: int) -> float:
    """Median steps a second of the demo itself."""
    with tempfile.TemporaryDirectory() as runs:
        overrides = [
            f"max_policy_lag={lag}",
            f"num_steps={num_steps}",
            f"runs_dir={runs}",
            "run_name=demo",
            "data.eval.max_prompts=8",
        ]
        launch.launch(demo_config(overrides))
        return 1 / statistics.median(step_seconds(Path(runs) / "demo"))


def in_new_process(work: Callable[..., float], *arguments: Any) -> float:
    """A Ray and a Serve of its own each time: threads of Serve outlive ray.shutdown in their process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="8 emulated steps and 10 of the demo instead of 20 and 40"
    )
    quick = parser.parse_args().quick
    emulated_steps, demo_steps = (8, 10) if quick else (20, 40)
    rows: list[dict[str, Any]] = []
    for handed_on, parts in (("whole", 1), ("as they finish", PARTS)):
        for lag in (0, 1):
            seconds = in_new_process(emulate, lag, parts, emulated_steps + WARM_UP_STEPS + 1)
            rows.append(
                {
                    "handed_on": handed_on,
                    "lag": lag,
                    "seconds_per_step": seconds,
                    "over_slowest": seconds / SLOWEST_S,
                }
            )
    demo = {lag: in_new_process(train_demo, lag, demo_steps + WARM_UP_STEPS + 1) for lag in (0, 1)}
    table = Table(
        "rollouts handed on",
        "lag",
        "s a step",
        "over the slowest phase",
        title="emulated: rollout 4 s, score 2 s, update 3 s",
    )
    for row in rows:
        table.add_row(
            row["handed_on"], str(row["lag"]), f"{row['seconds_per_step']:.2f}", f"{row['over_slowest']:.3f}"
        )
    Console().print(table)
    print(f"demo: {demo[0]:.2f} steps/s at lag 0, {demo[1]:.2f} at lag 1")
    worst = max(row["over_slowest"] for row in rows if row["lag"] == 1)
    result = {
        "lag0_steps_per_s": demo[0],
        "lag1_steps_per_s": demo[1],
        "emulated_lag1_over_slowest": worst,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
