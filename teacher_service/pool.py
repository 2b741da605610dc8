"""The driver's side of a teacher: starts replicas, sends them work, repeats lost calls, measures usage."""

import asyncio
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ApplicationStatus

from teacher_service.calls import Reply, ScoreResult
from teacher_service.following import Weights
from teacher_service.replica import Answers, Prompts, TeacherReplica
from teacher_service.scaling import DEPLOYMENT, GONE_WRONG, Bounds, app_name, autoscaling, read_pool
from video_opd.cluster.deadline import with_deadline
from video_opd.cluster.faults import retried
from video_opd.cluster.placement import bundles_of
from video_opd.config import Config
from video_opd.config_teachers import TeacherConfig, TeacherModel
from video_opd.errors import RunError
from video_opd.passes import CALLS_AN_ENGINE, Arrived, ask_by_video
from video_opd.types import TrajectoryGroup

Replica = type[TeacherReplica]
BACK_PRESSURE_PAUSE_S = 0.2
START_POLL_S = 0.2
_one_at_a_time = threading.Lock()  # Serve's functions are not for several threads
MOST_TURNS = 2 * CALLS_AN_ENGINE  # Serve compares two replicas, so one may have more calls than the others


class Usage:
    """The cost of the calls since the last take_metrics. Pure: callers pass times and numbers of replicas."""

    def __init__(self, now_s: float, running: float):
        self._since_s, self._running = now_s, running
        self._sums: defaultdict[str, float] = defaultdict(float)  # since then
        self._version: dict[str, float] = {}  # of the weights of the last call; empty: the folder's

    def add(self, call_s: float, reply: Reply) -> None:
        """Adds a call answered after `call_s`, with its share of what its merged batch took."""
        self._sums["calls"] += 1
        self._sums["queue_s"] += max(0.0, call_s - reply.engine_s)
        for name in ("engine_s", "computed_tokens", "separate_tokens"):
            self._sums[name] += getattr(reply, name) / reply.num_calls
        if reply.policy_version is not None:
            self._version = {"version": float(reply.policy_version)}

    def add_retry(self) -> None:
        self._sums["retries"] += 1

    def take_metrics(self, now_s: float, running: float, wanted: float) -> dict[str, float]:
        """Metrics of the calls answered since the last time; NaN: unknown, also the numbers of replicas."""
        mean_running = (self._running + running) / 2  # at the start and the end of that time
        sums, replica_s = self._sums, mean_running * (now_s - self._since_s)
        self._since_s, self._sums = now_s, defaultdict(float)
        self._running = self._running if math.isnan(running) else running
        return {
            "queue_s": sums["queue_s"] / sums["calls"] if sums["calls"] else math.nan,
            "utilisation": sums["engine_s"] / replica_s if replica_s else math.nan,
            "replicas": running,
            "replicas_wanted": wanted,
            "retries": sums["retries"],
            "computed_tokens": float(round(sums["computed_tokens"])),
            "separate_tokens": float(round(sums["separate_tokens"])),
            **self._version,
        }


def placement(pool: TeacherConfig, environment: dict[str, str]) -> dict[str, Any]:
    """Serve's options for where a replica runs. With tensor_parallel: a bundle per shard, all on one node."""
    actor = {"num_cpus": pool.num_cpus, "resources": {"teacher": 1}, "runtime_env": {"env_vars": environment}}
    if pool.tensor_parallel == 1:
        return {"ray_actor_options": actor | {"num_gpus": pool.num_gpus}}
    bundles = bundles_of(pool, "teacher")
    group = {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_PACK"}
    return group | {"ray_actor_options": actor | {"num_gpus": 0}}


def deployment_options(config: Config) -> dict[str, Any]:
    """Serve's options for a teacher's replicas."""
    pool = config.teacher_pool
    number: dict[str, Any] = {"num_replicas": pool.num_replicas}
    if pool.max_replicas is not None:
        bounds = Bounds(pool.min_replicas or 1, pool.max_replicas)
        number = {"autoscaling_config": autoscaling(pool, bounds, pool.num_replicas)}
    return {
        "max_ongoing_requests": 2 * pool.max_batch_requests,
        "max_queued_requests": pool.max_queued_requests,
        "max_constructor_retry_count": max(1, config.max_retries),
        "health_check_period_s": pool.health_check_s,
        "health_check_timeout_s": pool.health_check_s,
        "graceful_shutdown_timeout_s": config.request_timeout_s,  # calls under way may finish
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
        **number,
        **placement(pool, config.worker_env),
    }


class TeacherPool:
    """One teacher: a Serve deployment called by handle. Arguments and results travel as Ray objects.

    Repeats a call whose replica died or that took longer than config.request_timeout_s, max_retries times.
    """

    def __init__(self, run: str, config: Config, teacher: TeacherModel, replica: Replica = TeacherReplica):
        """`run` is the prefix of the run's names, video_opd/NAME; `replica` is the deployment's class."""
        self.app = app_name(run, teacher.name)
        self._config, self._teacher, self._replica = config, teacher, replica
        self._handle: Any = None
        self._usage = Usage(time.monotonic(), config.teacher_pool.num_replicas)
        self._outstanding = self._waiting = 0
        self._known = (float(config.teacher_pool.num_replicas),) * 2  # running and wanted, when last asked

    async def start(self) -> None:
        """Returns when every replica answers. Raises RunError after config.start_timeout_s."""
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns of each probe of a hanging replica
        deploying = asyncio.ensure_future(asyncio.to_thread(self._deploy))  # takes seconds: others start
        try:
            await asyncio.shield(deploying)
        finally:
            await asyncio.wait([deploying])  # also when this is cancelled: `stop` deletes what was deployed
        self._handle = serve.get_app_handle(self.app)
        await with_deadline(self._config.start_timeout_s, self._running(), "the start of the teacher service")
        self._usage = Usage(time.monotonic(), self._config.teacher_pool.num_replicas)

    def _deploy(self) -> None:
        with _one_at_a_time:
            serve.start(proxy_location="Disabled")
            deployment = serve.deployment(self._replica, name=DEPLOYMENT, **deployment_options(self._config))
            application = deployment.bind(self._config, self._teacher)
            target = serve.RunTarget(application, name=self.app, route_prefix=None)
            serve.run_many([target], wait_for_applications_running=False)

    async def _running(self) -> None:
        """Waits until the application runs. Raises RunError when Serve gives up on it."""
        while (application := serve.status().applications[self.app]).status != ApplicationStatus.RUNNING:
            if application.status in GONE_WRONG:
                why = "\n".join(d.message for d in application.deployments.values()) or application.message
                raise RunError(f"teacher {self._teacher.name} did not start: {why.strip()[-2000:]}")
            await asyncio.sleep(START_POLL_S)

    async def score(
        self,
        groups: ray.ObjectRef | Sequence[TrajectoryGroup],
        for_selection: bool = False,
        weights: Weights | None = None,
    ) -> list[ScoreResult]:
        """See TeacherReplica.score. The replica itself fetches references.

        Raises PartLostError after max_retries repeats, ObjectLostError if the groups' object is lost, and
        WeightsLostError if those of the weights are.
        """
        reply = await self._call("score", groups, for_selection, weights)
        wanted, used = weights and weights.policy_version, reply.policy_version
        assert used == wanted, f"weights {used} scored what weights {wanted} were to score"
        return reply.results

    async def predict(
        self,
        prompts: Prompts,
        num_answers: int = 1,
        temperature: float = 0.0,
        arrived: Arrived | None = None,
    ) -> Answers:
        """See TeacherReplica.predict and passes.ask_by_video. Spreads the prompts over the replicas."""
        pool = self._config.teacher_pool

        async def ask(call: Prompts) -> Answers:
            reply = await self._call("predict", call, num_answers, temperature, turns=MOST_TURNS)
            return reply.results

        async def at_once() -> int:  # calls wait here, without a deadline, rather than at the replicas
            running, _ = await self._replicas()
            replicas = pool.num_replicas if math.isnan(running) else int(running)
            return CALLS_AN_ENGINE * max(replicas, pool.max_replicas or 1)

        return await ask_by_video(prompts, self._config.rollout.prompts_per_call, ask, at_once, arrived)

    async def _call(self, method: str, *arguments: Any, turns: int = 1) -> Reply:
        """The reply to a call, repeated when lost. What the replica raises is final, even a LOST error.

        turns: of as many calls, each with its own deadline, this one may be the last.
        """
        started, attempts = time.monotonic(), count()
        what = f"a {method} call to teacher {self._teacher.name}"

        async def attempt() -> Reply | RayTaskError:
            if next(attempts):
                self._usage.add_retry()
            try:
                return await self._attempt(method, arguments, what, turns)
            except RayTaskError as raised:  # `retried` would repeat one that is also a LOST error
                return raised

        self._outstanding += 1
        try:
            reply = await retried(attempt, self._config.max_retries, what)
        finally:
            self._outstanding -= 1
        if isinstance(reply, RayTaskError):
            raise reply
        self._usage.add(time.monotonic() - started, reply)
        return reply

    async def _attempt(self, method: str, arguments: Sequence[Any], what: str, turns: int) -> Reply:
        deadline = time.monotonic() + turns * self._config.request_timeout_s
        while True:
            response = getattr(self._handle, method).remote(*arguments)
            try:
                return await with_deadline(deadline - time.monotonic(), response, what)
            except BackPressureError:  # the queues of all replicas are full: wait
                self._waiting += 1
                try:
                    await asyncio.sleep(BACK_PRESSURE_PAUSE_S)
                finally:
                    self._waiting -= 1

    async def _replicas(self) -> tuple[float, float]:
        """(running, wanted); NaN where Serve does not answer, which must not end a run."""
        try:
            pool = await asyncio.to_thread(read_pool, self.app)
            self._known = float(pool.running), float(pool.wanted)
        except RunError:
            self._known = math.nan, math.nan
        return self._known

    async def counts(self) -> dict[str, float]:
        """Now: unanswered calls, those of them held back because every queue is full, and replicas."""
        running, wanted = await self._replicas()
        calls = {"teacher/calls": float(self._outstanding), "teacher/calls_held_back": float(self._waiting)}
        return calls | {"teacher/replicas": running, "teacher/replicas_wanted": wanted}

    async def take_metrics(self) -> dict[str, float]:
        """teacher/queue_s, /utilisation, /replicas, /replicas_wanted, /retries, /computed_tokens,
        /separate_tokens, and /version of a teacher that follows the student; see Usage.

        Serve is not asked, for a step would wait for it: the replicas are those of the last `counts`.
        """
        metrics = self._usage.take_metrics(time.monotonic(), *self._known)
        return {f"teacher/{name}": value for name, value in metrics.items()}

    def stop(self) -> None:
        """Deletes the deployment; the cluster's other Serve applications stay.

        The handle reports to Serve no more: a report after ray.shutdown would end this process, exit code 1.
        """
        if self._handle is not None:
            self._handle.shutdown()
        serve.delete(self.app, _blocking=False)
