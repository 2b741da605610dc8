"""The parts of a run and the Ray they run on."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.actor_pool import ActorPool
from curriculum.scheduler import Curriculum
from learner.learner import Learner
from teacher_service.pool import TeacherPool
from teacher_service.teachers import Teachers, create_teacher
from video_opd.config import Config
from video_opd.errors import ConfigError
from video_opd.metrics import PhaseClock
from video_opd.plan import Plan
from video_opd.rewards import Reward, load_rewards
from video_opd.types import FailedPrompt, Prediction, Prompt

HERE = Path(__file__).resolve().parent.parent
SERVE_ENV = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}  # one that hangs cannot drain: it gives its device to the next


@dataclass
class Run:
    """The parts of a run, and what it has seen so far."""

    folder: Path
    config: Config
    plan: Plan
    actors: ActorPool
    teacher: TeacherPool | Teachers | None  # None: neither the objective nor the curriculum asks one
    learner: Learner
    curriculum: Curriculum
    rewards: list[Reward]  # empty: the objective needs none
    clock: PhaseClock = field(default_factory=PhaseClock)
    totals: Counter[str] = field(default_factory=Counter)
    evaluations: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[Prediction]] = field(default_factory=dict)
    failed_eval: dict[str, str] = field(default_factory=dict)  # prompt id: why; each counts as IoU 0
    step: int = 0  # the next to do
    published: int = -1  # the version that the actors have
    round_end: int | None = None  # the step at which the curriculum selects again; None: never
    gap_is_checked: bool = False

    @property
    def out_of_budget(self) -> bool:
        return self.totals["scored_tokens"] >= (self.config.max_scored_tokens or math.inf)


def start_ray(config: Config, address: str | None) -> None:
    """Connects to `address`, or starts a Ray of this machine alone."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are not to yield to the driver
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "namespace": "video_opd",
        "runtime_env": {"env_vars": {"PYTHONPATH": paths, **SERVE_ENV}},
    }
    if address:
        try:
            ray.init(address=address, **shared)
        except ConnectionError as error:
            raise ConfigError(f"no Ray cluster answers at {address}: start one with `ray up cluster.yaml` ({error})") from error
        return
    roles = {"rollout": config.rollout.num_actors, "teacher": 64, "learner": config.learner.world_size}
    cpus = max(os.cpu_count() or 1, 4 + sum(roles.values()) - 64)
    context = ray.init(address="local", num_cpus=cpus, resources={k: float(v) for k, v in roles.items() if v}, **shared)
    print(f"Ray dashboard: http://{context.dashboard_url}" if context.dashboard_url else "Ray dashboard: not installed")


def create_parts(folder: Path, config: Config, plan: Plan) -> Run:
    """The parts of a run, their processes on their way."""
    name = f"video_opd/{folder.name}"
    return Run(
        folder=folder,
        config=config,
        plan=plan,
        actors=ActorPool(name, config),
        teacher=create_teacher(name, config),
        learner=Learner(name, config),
        curriculum=Curriculum(name, plan.train, config),
        rewards=load_rewards(config.loss.rewards) if config.loss.needs.rewards else [],
    )


async def publish_weights(run: Run, policy_version: int) -> None:
    """The learner's weights to every actor, as one version."""
    buckets, num_bytes = await run.learner.put_weights(policy_version)
    update = await run.actors.load_weights(policy_version, buckets, num_bytes)
    run.totals["published_bytes"] += update.num_bytes
    run.published = policy_version


async def ask_student(run: Run, prompts: Sequence[Prompt], blank_video: bool = False) -> list[Prediction | FailedPrompt]:
    """The student's greedy answers, with the weights of the step where the run stands."""
    if run.published != run.step:  # without rollouts nobody needed them before
        await publish_weights(run, run.step)
    return await run.actors.predict(prompts, blank_video)
