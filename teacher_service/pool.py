"""The caller's side of a teacher: starts its replicas, sends them work, survives their deaths, measures what they do."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ApplicationStatus

from teacher_service.replica import Reply, ScoreResult, TeacherReplica
from teacher_service.scaling import DEPLOYMENT, Bounds, app_name, autoscaling, read_pool
from video_opd.cluster.deadline import with_deadline
from video_opd.cluster.faults import retried
from video_opd.config import Config, TeacherConfig, TeacherModel
from video_opd.errors import RunError
from video_opd.types import FailedPrompt, Prediction, Prompt, TrajectoryGroup

BACK_PRESSURE_PAUSE_S = 0.2
START_POLL_S = 0.2


class Usage:
    """What the calls of a lap cost. Pure: times and counts are passed in."""

    def __init__(self, now_s: float, running: float):
        self._since_s, self._running = now_s, running
        self._clear()

    def _clear(self) -> None:
        self._num_calls, self._queue_s, self._engine_s, self._num_retries = 0, 0.0, 0.0, 0

    def count(self, call_s: float, reply: Reply) -> None:
        """A call that took `call_s` was answered. Each call of a merged batch counts its share of the batch's engine seconds."""
        self._num_calls += 1
        self._queue_s += max(0.0, call_s - reply.engine_s)
        self._engine_s += reply.engine_s / reply.num_calls

    def count_retry(self) -> None:
        self._num_retries += 1

    def take_metrics(self, now_s: float, running: float, wanted: float) -> dict[str, float]:
        """Of the calls answered since the lap before; NaN where there is nothing to say. `running` replicas, NaN: unknown.

        Utilisation is over the mean of the replicas that ran at the lap's start and at its end.
        """
        replica_s = (self._running + running) / 2 * (now_s - self._since_s)
        metrics = {
            "queue_s": self._queue_s / self._num_calls if self._num_calls else math.nan,
            "utilisation": self._engine_s / replica_s if replica_s else math.nan,
            "replicas": running,
            "replicas_wanted": wanted,
            "retries": float(self._num_retries),
        }
        self._since_s = now_s
        self._running = self._running if math.isnan(running) else running
        self._clear()
        return metrics


def placement(pool: TeacherConfig, environment: dict[str, str]) -> dict[str, Any]:
    """Where a replica runs. One in several parts takes a bundle for each, all on one node.

    On GPUs vLLM starts the parts as Ray actors, one in each bundle's GPU; the replica is beside the first and takes none itself.
    """
    actor = {"num_cpus": pool.num_cpus, "resources": {"teacher": 1}, "runtime_env": {"env_vars": environment}}
    if pool.tensor_parallel == 1:
        return {"ray_actor_options": actor | {"num_gpus": pool.num_gpus}}
    share = {name: amount for name, amount in (("CPU", pool.num_cpus), ("GPU", pool.num_gpus)) if amount}
    return {
        "ray_actor_options": actor | {"num_gpus": 0},
        "placement_group_bundles": [share | {"teacher": 1}, *[share] * (pool.tensor_parallel - 1)],
        "placement_group_strategy": "STRICT_PACK",
    }


def deployment_options(config: Config) -> dict[str, Any]:
    """What Serve is told of a teacher's replicas."""
    pool = config.teacher_pool
    scaled = {"num_replicas": pool.num_replicas}
    if pool.max_replicas is not None:
        bounds = Bounds(pool.min_replicas or 1, pool.max_replicas)
        scaled = {"autoscaling_config": autoscaling(pool, bounds, pool.num_replicas)}
    return {
        **scaled,
        "max_ongoing_requests": 2 * pool.max_batch_requests,
        "max_queued_requests": pool.max_queued_requests,
        "max_constructor_retry_count": max(1, config.max_retries),
        "health_check_period_s": pool.health_check_s,
        "health_check_timeout_s": pool.health_check_s,
        "graceful_shutdown_timeout_s": config.request_timeout_s,  # a call that has begun may end
        **placement(pool, config.worker_env),
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }


class TeacherPool:
    """One teacher: a Serve deployment called by handle. Arguments and results travel as Ray objects.

    A call whose replica died, or that has no answer within config.request_timeout_s, is made again, config.max_retries times.
    """

    def __init__(
        self, run: str, config: Config, teacher: TeacherModel, replica: type[TeacherReplica] = TeacherReplica
    ):
        """`run` is the prefix of the run's names, video_opd/NAME; `replica` runs in the deployment's processes."""
        self.app = app_name(run, teacher.name)
        self._config, self._teacher, self._replica = config, teacher, replica
        self._handle: Any = None
        self._usage = Usage(time.monotonic(), config.teacher_pool.num_replicas)
        self._outstanding = self._waiting = 0

    async def start(self) -> None:
        """Returns when every replica answers. Raises RunError at config.start_timeout_s."""
        logging.getLogger("ray.serve").setLevel(
            logging.ERROR
        )  # it warns of every probe of a replica that hangs
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(self._replica, name=DEPLOYMENT, **deployment_options(self._config))
        target = serve.RunTarget(
            deployment.bind(self._config, self._teacher), name=self.app, route_prefix=None
        )
        serve.run_many([target], wait_for_applications_running=False)
        self._handle = serve.get_app_handle(self.app)
        await with_deadline(self._config.start_timeout_s, self._running(), "the start of the teacher service")
        self._usage = Usage(time.monotonic(), self._config.teacher_pool.num_replicas)

    async def _running(self) -> None:
        """Waits until the application runs. Raises RunError when Serve gives up on it."""
        while (application := serve.status().applications[self.app]).status != ApplicationStatus.RUNNING:
            if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                why = "\n".join(d.message for d in application.deployments.values()) or application.message
                raise RunError(f"teacher {self._teacher.name} did not start: {why.strip()[-2000:]}")
            await asyncio.sleep(START_POLL_S)

    async def score(self, groups: ray.ObjectRef | Sequence[TrajectoryGroup]) -> list[ScoreResult]:
        """See TeacherReplica.score. A reference is fetched by the replica, past the caller.

        Raises PartLostError when the call was lost once more than max_retries; ObjectLostError when what the reference stands
        for is gone, since only who made it can make it again.
        """
        return await self._call("score", groups)

    async def predict(
        self, prompts: Sequence[Prompt], num_answers: int = 1, temperature: float = 0.0
    ) -> list[list[Prediction] | FailedPrompt]:
        """See TeacherReplica.predict. The work is spread over the replicas."""
        size = self._config.rollout.prompts_per_call
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        pool = self._config.teacher_pool
        at_once = max(await self._num_running(), pool.max_replicas or 1)
        places = asyncio.Semaphore(at_once)  # a call's deadline covers its own work alone

        async def predict(chunk: Sequence[Prompt]) -> list[list[Prediction] | FailedPrompt]:
            async with places:
                return await self._call("predict", chunk, num_answers, temperature)

        results = await asyncio.gather(*(predict(chunk) for chunk in chunks))
        return [answer for chunk in results for answer in chunk]

    async def _call(self, method: str, *arguments: Any) -> Any:
        """The results of a call that may be lost. What a replica raises itself, a lost argument included, is not repeated."""
        started, attempts = time.monotonic(), 0

        async def attempt() -> Reply | RayTaskError:
            nonlocal attempts
            attempts += 1
            if attempts > 1:
                self._usage.count_retry()
            try:
                return await self._attempt(method, arguments)
            except RayTaskError as raised:
                return raised

        self._outstanding += 1
        try:
            reply = await retried(
                attempt, self._config.max_retries, f"a {method} call to teacher {self._teacher.name}"
            )
        finally:
            self._outstanding -= 1
        if isinstance(reply, RayTaskError):
            raise reply
        self._usage.count(time.monotonic() - started, reply)
        return reply.results

    async def _attempt(self, method: str, arguments: Sequence[Any]) -> Reply:
        deadline = time.monotonic() + self._config.request_timeout_s
        while True:
            response = getattr(self._handle, method).remote(*arguments)
            try:
                return await with_deadline(
                    deadline - time.monotonic(), response, f"a {method} call to teacher {self._teacher.name}"
                )
            except BackPressureError:  # every replica's queue is full: the pool's way to say wait
                self._waiting += 1
                try:
                    await asyncio.sleep(BACK_PRESSURE_PAUSE_S)
                finally:
                    self._waiting -= 1

    async def _replicas(self) -> tuple[float, float]:
        """(running, wanted); NaN where Serve does not answer, which is no reason to end a run."""
        try:
            pool = await asyncio.to_thread(read_pool, self.app)
        except RunError:
            return math.nan, math.nan
        return float(pool.running), float(pool.wanted)

    async def _num_running(self) -> int:
        running, _ = await self._replicas()
        return self._config.teacher_pool.num_replicas if math.isnan(running) else int(running)

    async def counts(self) -> dict[str, float]:
        """As of now: calls without an answer, those of them that found every queue full and are not with Serve, and replicas."""
        running, wanted = await self._replicas()
        calls = {"teacher/calls": float(self._outstanding), "teacher/calls_held_back": float(self._waiting)}
        return calls | {"teacher/replicas": running, "teacher/replicas_wanted": wanted}

    async def take_metrics(self) -> dict[str, float]:
        """Metrics since the lap before: teacher/queue_s, /utilisation, /replicas, /replicas_wanted and /retries. See Usage."""
        running, wanted = await self._replicas()
        return {
            f"teacher/{name}": value
            for name, value in self._usage.take_metrics(time.monotonic(), running, wanted).items()
        }

    def stop(self) -> None:
        """Deletes the deployment; other Serve applications of the cluster stay."""
        serve.delete(self.app, _blocking=False)
