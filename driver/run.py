"""A run: its parts and its state; publishing weights, asking the student."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import ObjectLostError

from actors.actor_pool import ActorPool
from actors.rollout_actor import Answers
from curriculum.curriculum import Curriculum
from driver.buffer import TrajectoryBuffer
from driver.clock import PhaseClock
from driver.progress import Progress, SavedRun
from driver.records.trackers import Trackers
from driver.run_state import RunState
from driver.start_ray import idle_replicas, python_path
from driver.upload import Uploads
from learner.learner import Learner
from preflight.inputs import Plan
from preflight.memory_fit import MemoryPlan, with_kv_caches
from teacher_service.following import Weights
from teacher_service.pool import TeacherPool
from teacher_service.teachers import Teachers, create_teacher
from video_opd.cluster.faults import cause_of
from video_opd.cluster.run_control import create_control
from video_opd.config import Config
from video_opd.errors import LearnerLostError
from video_opd.hub import with_models_of
from video_opd.logs import log
from video_opd.passes import Arrived
from video_opd.prometheus import Gauges, count
from video_opd.rewards import Reward, load_rewards
from video_opd.types import Prompt

T = TypeVar("T")


@dataclass
class Run:
    """The parts of a run, and where it stands."""

    folder: Path
    config: Config
    given: Config  # as config.yaml has it: `config` also names the run, and models by their folders here
    plan: Plan
    control: Any  # the RunControl actor
    actors: ActorPool
    teacher: TeacherPool | Teachers | None  # None: neither the objective nor the curriculum asks one
    learner: Learner
    curriculum: Curriculum
    rewards: list[Reward]  # empty: the objective needs none
    uploads: Uploads | None = None  # None: checkpoints stay here
    trackers: Trackers | None = None  # None: metrics.jsonl alone
    gauges: Gauges = field(default_factory=Gauges)  # for Prometheus
    clock: PhaseClock = field(default_factory=PhaseClock)
    state: RunState = field(default_factory=RunState)
    progress: Progress = field(default_factory=Progress)
    resume_from: SavedRun | None = None  # the checkpoint of a resume, until it is restored
    newest_checkpoint: int | None = None  # its step; None: there is no whole checkpoint
    next_selection: int | None = None  # the step before whose update prompts are selected next; None: never
    idle_replicas: int = 0  # more of the teacher, until the learner starts; 0: it does not wait for TRPV
    published: int = -1  # the version of the actors' weights
    buffer: TrajectoryBuffer | None = None  # of the round; None: none has begun
    gap_is_checked: bool = False  # see check_logprob_gap
    not_saved: list[str] = field(default_factory=list)  # why the last checkpoint or student are not
    num_restarts: Counter[int] = field(default_factory=Counter)  # of the learner, by the step it went back to

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def totals(self) -> Counter[str]:
        return self.progress.totals

    @property
    def evaluations(self) -> dict[str, dict[str, float]]:
        return self.progress.evaluations

    @property
    def is_over(self) -> bool:
        """No further step may begin: a signal came, or the budget of tokens is spent."""
        budget = self.config.max_scored_tokens or math.inf
        return self.state.stopped_by is not None or self.totals["scored_tokens"] >= budget


def create_parts(
    folder: Path,
    given: Config,
    plan: Plan,
    memory: MemoryPlan,
    resume_from: SavedRun | None = None,
    trackers: Trackers | None = None,
) -> Run:
    """Creates the processes of a run. Raises ConfigError if a run of that name is on this Ray."""
    name, env = f"video_opd/{folder.name}", python_path() | given.worker_env
    for warning in given.warnings():
        log.warning("warning: %s", warning)
    config = with_kv_caches(memory).model_copy(update={"run_name": folder.name, "worker_env": env})
    shipped = with_models_of(config, given)  # other nodes have the models of the hub in other folders
    url, limits = config.checkpoint_url, (config.max_retries, config.upload_timeout_s)
    progress = resume_from.progress if resume_from else Progress()
    run = Run(
        folder=folder,
        config=config,
        given=given,
        plan=plan,
        control=create_control(name),
        actors=ActorPool(name, shipped),
        teacher=create_teacher(name, shipped),
        learner=Learner(name, shipped),
        curriculum=Curriculum(name, plan.train.pool, shipped),
        rewards=load_rewards(config.loss.rewards) if config.loss.needs.rewards else [],
        uploads=Uploads(url, folder, *limits) if url else None,
        trackers=trackers,
        progress=progress,
        resume_from=resume_from,
        newest_checkpoint=progress.step if resume_from else None,
        idle_replicas=0 if resume_from else idle_replicas(config),
    )
    if not run.idle_replicas:
        run.learner.reserve()
    return run


async def start_parts(run: Run) -> None:
    """Returns when all are up. On shared GPUs the learner is last: its memory grows as it trains.

    Engines of one GPU start one after another by themselves (video_opd/models/shared_gpu.py). A learner on
    whose GPUs the teacher answers first is left to rounds.validate_first.
    """
    async with asyncio.TaskGroup() as starts:  # one that fails ends the others
        for part in (run.actors, run.teacher):
            if part is not None:
                starts.create_task(part.start())
        if not (run.idle_replicas or run.config.shares_gpus):
            starts.create_task(run.learner.start())
    if run.config.shares_gpus and not run.idle_replicas:
        await run.learner.start()


async def publish_weights(run: Run, policy_version: int) -> None:
    """Publishes the learner's weights to every actor as one version. Raises LearnerLostError."""
    try:
        update = await run.actors.publish(policy_version, run.learner)
    except ObjectLostError as error:
        raise LearnerLostError(
            f"weights of version {policy_version} went with the learner: {cause_of(error)}"
        ) from error
    if isinstance(run.teacher, Teachers):
        run.teacher.take_published(Weights(policy_version, run.actors.published_buckets))
    run.totals["published_bytes"] += update.num_bytes
    count("published_bytes", update.num_bytes)
    count("publish_seconds", update.duration_s)
    count("publications")
    run.published = policy_version


async def unless_stopped(run: Run, call: Awaitable[T]) -> T | None:
    """The call's result; None if a signal asks the run to stop first, which cancels the call."""
    result = asyncio.ensure_future(call)
    stop = asyncio.ensure_future(run.state.wait_until(lambda: run.state.stopped_by))
    try:
        await asyncio.wait({result, stop}, return_when=asyncio.FIRST_COMPLETED)
        return result.result() if result.done() else None
    finally:
        result.cancel()
        stop.cancel()


async def publish_current(run: Run) -> None:
    """Publishes the weights of the current step, if the actors have others."""
    if run.published != run.step:  # an objective without rollouts does not publish every step
        await publish_weights(run, run.step)


async def ask_student(
    run: Run,
    prompts: Sequence[Prompt],
    arrived: Arrived,
    num_answers: int = 1,
    temperature: float = 0.0,
    blank_video: bool = False,
) -> Answers:
    """The student's answers with the weights of the current step; temperature 0: the greedy one."""
    await publish_current(run)
    return await run.actors.predict(prompts, num_answers, temperature, blank_video, arrived)
