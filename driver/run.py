"""The parts of a run and the Ray they run on."""

import asyncio
import math
import signal
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import ObjectLostError

from actors.actor_pool import ActorPool
from curriculum.curriculum import Curriculum
from driver.buffer import TrajectoryBuffer
from driver.clock import PhaseClock
from driver.start_ray import python_path
from driver.upload import Uploads
from learner.learner import Learner
from preflight.inputs import Plan
from teacher_service.pool import TeacherPool
from teacher_service.teachers import Teachers, create_teacher
from video_opd.cluster.faults import cause_of
from video_opd.cluster.run_control import create_control
from video_opd.config import Config
from video_opd.errors import LearnerLostError
from video_opd.prometheus import Gauges, count
from video_opd.rewards import Reward, load_rewards
from video_opd.types import FailedPrompt, Prediction, Prompt

T = TypeVar("T")


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class Run:
    """The parts of a run, and what it has seen so far."""

    folder: Path
    config: Config
    given: Config  # as config.yaml has it: `config` also names the run
    plan: Plan
    control: Any  # the RunControl actor
    actors: ActorPool
    teacher: TeacherPool | Teachers | None  # None: neither the objective nor the curriculum asks one
    learner: Learner
    curriculum: Curriculum
    rewards: list[Reward]  # empty: the objective needs none
    buffer: TrajectoryBuffer | None = None  # of the round; None: none has begun
    gauges: Gauges = field(default_factory=Gauges)  # for Prometheus
    clock: PhaseClock = field(default_factory=PhaseClock)
    totals: Counter[str] = field(default_factory=Counter)
    evaluations: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[Prediction]] = field(default_factory=dict)
    failed_eval: dict[str, str] = field(default_factory=dict)  # prompt id: why; each counts as IoU 0
    step: int = 0  # the next to do
    published: int = -1  # the version that the actors have
    next_selection: int | None = None  # the step at which the curriculum selects again; None: never
    gap_is_checked: bool = False
    num_restarts: Counter[int] = field(
        default_factory=Counter
    )  # of the learner, by the step that it went back to
    uploads: Uploads | None = None  # None: checkpoints stay here
    resume_from: int | None = (
        None  # the step whose checkpoint it is to go on from; None: it stands where it is to
    )
    checkpointed: int | None = None  # the step of the newest whole checkpoint
    stopped_by: signal.Signals | None = None
    stop: asyncio.Event = field(
        default_factory=asyncio.Event
    )  # set: the run is to end after the step under way
    settled: asyncio.Event = field(
        default_factory=_set_event
    )  # cleared: learner, curriculum and `step` do not fit each other
    saving: bool = False  # a checkpoint or an export is being written

    @property
    def out_of_budget(self) -> bool:
        return self.totals["scored_tokens"] >= (self.config.max_scored_tokens or math.inf)

    @property
    def is_over(self) -> bool:
        """Whether no further step is to begin, whatever num_steps says."""
        return self.out_of_budget or self.stop.is_set()


def create_parts(folder: Path, given: Config, plan: Plan, resume_from: int | None = None) -> Run:
    """The parts of a run, their processes on their way. Raises ConfigError where a run of that name goes on."""
    name = f"video_opd/{folder.name}"
    config = given.model_copy(
        update={"run_name": folder.name, "worker_env": python_path() | given.worker_env}
    )
    return Run(
        folder=folder,
        config=config,
        given=given,
        plan=plan,
        step=resume_from or 0,
        resume_from=resume_from,
        control=create_control(name),
        actors=ActorPool(name, config),
        teacher=create_teacher(name, config),
        learner=Learner(name, config),
        curriculum=Curriculum(name, plan.train, config),
        rewards=load_rewards(config.loss.rewards) if config.loss.needs.rewards else [],
        uploads=Uploads(config.checkpoint_url, folder, config.max_retries, config.upload_timeout_s)
        if config.checkpoint_url
        else None,
    )


async def publish_weights(run: Run, policy_version: int) -> None:
    """Publishes the learner's weights to every actor as one version. Raises LearnerLostError."""
    try:
        update = await run.actors.publish(policy_version, run.learner)
    except ObjectLostError as error:
        raise LearnerLostError(
            f"weights of version {policy_version} went with the learner: {cause_of(error)}"
        ) from error
    run.totals["published_bytes"] += update.num_bytes
    count("published_bytes", update.num_bytes)
    count("publish_seconds", update.duration_s)
    count("publications")
    run.published = policy_version


async def unless_stopped(run: Run, call: Awaitable[T]) -> T | None:
    """The call's result, or None, and the call is given up, where a signal asks the run to stop first."""
    asked, stop = asyncio.ensure_future(call), asyncio.ensure_future(run.stop.wait())
    try:
        await asyncio.wait({asked, stop}, return_when=asyncio.FIRST_COMPLETED)
        return asked.result() if asked.done() else None
    finally:
        asked.cancel()
        stop.cancel()


async def ask_student(
    run: Run, prompts: Sequence[Prompt], blank_video: bool = False
) -> list[Prediction | FailedPrompt]:
    """The student's greedy answers, with the weights of the step where the run stands."""
    if run.published != run.step:  # without rollouts nobody needed them before
        await publish_weights(run, run.step)
    return await run.actors.predict(prompts, blank_video)
