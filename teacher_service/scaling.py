"""Reads the number of a teacher's replicas from Serve, and changes it while calls run.

Serve 2.60 has no call for the latter: `serve.run` gives the code a new version, which restarts every replica.
`set_replicas` deploys Serve's own record of the deployment with another number, so that the version stays and
Serve only starts or drains the difference. Any process of the cluster can call it.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayError
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.generated import serve_pb2
from ray.serve.schema import ApplicationStatus

from video_opd.config import Config
from video_opd.config_teachers import TeacherConfig, TeacherModel
from video_opd.errors import RunError

protobuf: Any = serve_pb2  # its classes are made on import
DEPLOYMENT = "teacher"
PREFIX, MIDDLE = "video_opd/", "/teacher/"
ANSWER_TIMEOUT_S = 10.0  # of Serve's controller, which computes nothing
GONE_WRONG = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


@dataclass(frozen=True)
class Bounds:
    """Serve chooses the number of replicas within these by the calls that queue."""

    fewest: int
    most: int

    def __str__(self) -> str:
        return f"{self.fewest} to {self.most}"


@dataclass(frozen=True, kw_only=True)
class PoolStatus:
    """One teacher of one run."""

    run: str
    teacher: str
    status: ApplicationStatus
    message: str  # explains a bad status
    wanted: int  # replicas
    starting: int
    draining: int  # finish their calls and take no more
    bounds: Bounds | None  # None: a fixed number
    pids: tuple[int, ...]  # of the running replicas
    actors: tuple[str, ...]  # the names of their Ray actors

    @property
    def app(self) -> str:
        return app_name(PREFIX + self.run, self.teacher)

    @property
    def running(self) -> int:
        return len(self.actors)

    @property
    def reached(self) -> bool:
        """Whether exactly the wanted replicas run."""
        return self.running == self.wanted and not self.draining

    def has(self, wanted: int | Bounds) -> bool:
        """Whether the pool is as wanted."""
        if isinstance(wanted, Bounds):
            return self.bounds == wanted and wanted.fewest <= self.running <= wanted.most
        return self.bounds is None and self.wanted == wanted and self.reached

    def __str__(self) -> str:
        counts = f"{self.wanted} wanted, {self.running} running"
        changing = f"{self.starting} starting, {self.draining} draining"
        number = f"autoscaling {self.bounds}" if self.bounds else "fixed number"
        wrong = f"; {self.status.value}: {' '.join(self.message.split())[-500:]}"
        text = f"run {self.run}, teacher {self.teacher}: replicas {counts}, {changing}; {number}"
        return text + wrong if self.status in GONE_WRONG else text


def app_name(run: str, teacher: str) -> str:
    """The Serve application of one teacher of `run`, the prefix of the run's names: video_opd/NAME."""
    return f"{run}{MIDDLE}{teacher}"


def read_pools() -> list[PoolStatus]:
    """All teachers of all runs on this Ray. Raises RunError if Serve runs and does not answer."""
    if (controller := _controller()) is None:
        return []
    applications = _answer(controller.get_serve_instance_details.remote())["applications"]
    return [
        _read(name, application)
        for name, application in applications.items()
        if name.startswith(PREFIX) and MIDDLE in name and application["deployments"]
        if application["status"] != ApplicationStatus.DELETING
    ]


def read_pool(app: str) -> PoolStatus:
    """One teacher. Raises RunError if there is none or Serve does not answer."""
    if found := [pool for pool in read_pools() if pool.app == app]:
        return found[0]
    raise RunError(f"Serve has no application {app}")


def delete_orphans(running: Collection[str]) -> list[str]:
    """Deletes the teachers of runs not in `running`, whose driver was killed; returns their names."""
    orphans = [pool.app for pool in read_pools() if pool.run not in running]
    for app in orphans:
        serve.delete(app, _blocking=False)
    return orphans


def _read(name: str, application: dict[str, Any]) -> PoolStatus:
    run, _, teacher = name.removeprefix(PREFIX).rpartition(MIDDLE)
    deployment = application["deployments"][DEPLOYMENT]
    replicas, scaling = deployment["replicas"], deployment["deployment_config"].get("autoscaling_config")
    states = Counter(r["state"] for r in replicas)
    running = [r for r in replicas if r["state"] in ("RUNNING", "UPDATING", "PENDING_MIGRATION")]
    return PoolStatus(
        run=run,
        teacher=teacher,
        status=ApplicationStatus(application["status"]),
        message=deployment["message"] or application["message"],
        wanted=deployment["target_num_replicas"],
        starting=states["STARTING"] + states["RECOVERING"],
        draining=states["STOPPING"],
        bounds=Bounds(scaling["min_replicas"], scaling["max_replicas"]) if scaling else None,
        pids=tuple(r["pid"] for r in running),
        actors=tuple(r["actor_name"] for r in running),
    )


def _controller() -> Any:
    """Serve's controller actor; None where Serve does not run."""
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    return client and client._controller


def _answer(reference: Any) -> Any:
    """The answer of Serve's controller. Raises RunError without one."""
    try:
        return ray.get(reference, timeout=ANSWER_TIMEOUT_S)
    except (GetTimeoutError, RayError, RayServeException) as error:
        raise RunError(f"Serve's controller does not answer: {error}") from error


def ongoing_calls(pool: PoolStatus) -> int | None:
    """Calls that run or wait in the running replicas; None where one does not answer."""
    try:
        replicas = [ray.get_actor(name, namespace="serve") for name in pool.actors]
        return sum(ray.get([r.get_num_ongoing_requests.remote() for r in replicas], timeout=ANSWER_TIMEOUT_S))
    except (ValueError, GetTimeoutError, RayError):
        return None


def autoscaling(config: TeacherConfig, bounds: Bounds, initial: int) -> AutoscalingConfig:
    """Serve's own policy: enough replicas for each to have target_ongoing_requests calls."""
    return AutoscalingConfig(
        min_replicas=bounds.fewest,
        max_replicas=bounds.most,
        initial_replicas=min(max(initial, bounds.fewest), bounds.most),
        target_ongoing_requests=config.target_ongoing_requests,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
    )


def _deployed(app: str) -> Any:
    route = _answer(_controller().get_deployment_info.remote(DEPLOYMENT, app))
    return protobuf.DeploymentRoute.FromString(route).deployment_info


def deployed_with(app: str) -> tuple[Config, TeacherModel]:
    """The arguments of a teacher's replicas, from any process."""
    config: Any = ReplicaConfig.from_proto(_deployed(app).replica_config, needs_pickle=True)
    return config.init_args


def set_replicas(app: str, wanted: int | Bounds) -> None:
    """Sets a fixed number or autoscaling. Replicas that stay do not restart; those that go drain."""
    deployed, (config, _) = _deployed(app), deployed_with(app)
    options = DeploymentConfig.from_proto(deployed.deployment_config)
    bounds = wanted if isinstance(wanted, Bounds) else None
    options.autoscaling_config = bounds and autoscaling(config.teacher_pool, bounds, read_pool(app).wanted)
    options.num_replicas = None if isinstance(wanted, Bounds) else wanted
    arguments = protobuf.DeploymentArgs(
        deployment_name=DEPLOYMENT,
        deployment_config=options.to_proto_bytes(),  # holds the version of the code, which stays
        replica_config=deployed.replica_config.SerializeToString(),
        deployer_job_id=ray.get_runtime_context().get_job_id(),
        ingress=True,
    )
    of_app = {app: protobuf.ApplicationArgs(external_scaler_enabled=False).SerializeToString()}
    deployments: dict[str, Sequence[bytes]] = {app: [arguments.SerializeToString()]}
    _answer(_controller().deploy_applications.remote(deployments, of_app))
