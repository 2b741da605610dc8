"""Steps per second at lag 0 and lag 1: of the demo, and of the loop around engines that sleep.

`python -m benchmarks.overlap [--quick]`. The emulated run is launch.train; for one step the engines sleep
ROLLOUT_S, SCORE_S and UPDATE_S. An actor returns a step's rollouts "whole", when the last is finished, or "as
they finish", in four parts. At lag 1 two steps are in flight, so a step takes at least its slowest phase, and
half of the time that one step's prompts need from end to end. The last line is one JSON object.
"""

import asyncio
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

import ray

import launch
from actors.actor_pool import ActorPool
from benchmarks import emulated_parts, emulated_teacher
from benchmarks.command import WARM_UP_STEPS, in_new_process, make_parser, print_result, temporary_demo
from benchmarks.emulated_parts import EmulatedActor, EmulatedRank
from benchmarks.emulated_teacher import EmulatedReplica
from curriculum.curriculum import Curriculum
from driver.command_line import prepare
from driver.records.sinks import read_metrics
from driver.run import Run, publish_weights
from driver.start_ray import start_ray
from learner.learner import Learner
from preflight.inputs import Plan
from teacher_service.pool import TeacherPool
from video_opd.config import Config

ROLLOUT_S, SCORE_S, UPDATE_S = 4.0, 2.0, 3.0
SLOWEST_S = max(ROLLOUT_S, SCORE_S, UPDATE_S)
GROUPS, PARTS = 8, 4


def step_seconds(run_dir: Path) -> list[float]:
    """Seconds from one step's line to the next, after the warm-up."""
    ends = [line["wall_s"] for line in read_metrics(run_dir)][WARM_UP_STEPS:]
    return [after - before for before, after in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Classes:
    """What runs in the processes of a run."""

    actor: type = EmulatedActor
    replica: type = EmulatedReplica
    rank: type = EmulatedRank


def train_emulated(config: Config, folder: Path, classes: Classes = Classes()) -> None:
    """launch.train in a Ray of its own; `folder` becomes the run's."""
    plan = prepare(config)
    start_ray(config, address="local")
    try:
        folder.mkdir()
        asyncio.run(_train(config, plan, folder, classes))
    finally:
        ray.shutdown()


async def _train(config: Config, plan: Plan, folder: Path, classes: Classes) -> None:
    name = f"video_opd/{folder.name}"
    teacher = TeacherPool(name, config, config.teacher_models[0], classes.replica)
    actors, learner = ActorPool(name, config, classes.actor), Learner(name, config, classes.rank)
    curriculum = Curriculum(name, plan.train.pool, config)
    run = Run(folder, config, config, plan, None, actors, teacher, learner, curriculum, rewards=[])
    await asyncio.gather(run.actors.start(), run.learner.start(), teacher.start())
    await publish_weights(run, policy_version=0)
    await launch.train(run)
    for part in (run.actors, teacher, run.learner):
        part.stop()


def emulate(lag: int, parts: int, num_steps: int) -> float:
    """Mean seconds of a step around engines that sleep. At lag 1 steps alternate: a median would flatter."""
    sleeps = {emulated_parts.ROLLOUT_S: ROLLOUT_S, emulated_parts.UPDATE_S: UPDATE_S}
    sleeps[emulated_teacher.CALL_S] = SCORE_S / parts  # a call's share
    overrides = [f"worker_env.{name}='{seconds}'" for name, seconds in sleeps.items()]
    overrides += [f"max_policy_lag={lag}", f"groups_per_step={GROUPS}", f"num_steps={num_steps}"]
    overrides += [f"rollout.prompts_per_call={GROUPS}", f"rollout.prompts_per_result={GROUPS // parts}"]
    overrides += ["loss.kind=opd", "teacher_pool.max_batch_requests=1", "checks.max_logprob_gap=null"]
    with temporary_demo(*overrides) as (config, folder):
        train_emulated(config, folder)
        return statistics.mean(step_seconds(folder))


def train_demo(lag: int, num_steps: int) -> float:
    """Median steps per second of the demo itself."""
    overrides = [f"max_policy_lag={lag}", f"num_steps={num_steps}", "data.eval.max_prompts=8"]
    with temporary_demo(*overrides) as (config, folder):
        launch.launch(config)
        return 1 / statistics.median(step_seconds(folder))


def main() -> None:
    parser = make_parser("overlap", __doc__, "8 emulated steps and 10 of the demo instead of 20 and 40")
    emulated_steps, demo_steps = (8, 10) if parser.parse_args().quick else (20, 40)
    extra, rows = WARM_UP_STEPS + 1, []
    for handed_on, parts in (("whole", 1), ("as they finish", PARTS)):
        for lag in (0, 1):
            seconds = in_new_process(emulate, lag, parts, emulated_steps + extra)
            row = {"handed_on": handed_on, "lag": lag, "seconds_per_step": seconds}
            rows.append(row | {"over_slowest": seconds / SLOWEST_S})
    lag0, lag1 = (in_new_process(train_demo, lag, demo_steps + extra) for lag in (0, 1))
    over_slowest = max(row["over_slowest"] for row in rows if row["lag"] == 1)
    result = {"lag0_steps_per_s": lag0, "lag1_steps_per_s": lag1}
    result |= {"emulated_lag1_over_slowest": over_slowest, "rows": rows}
    title = f"emulated: rollout {ROLLOUT_S:.0f} s, score {SCORE_S:.0f} s, update {UPDATE_S:.0f} s"
    print_result(result, title, rows, f"demo: {lag0:.2f} steps/s at lag 0, {lag1:.2f} at lag 1")


if __name__ == "__main__":
    main()
