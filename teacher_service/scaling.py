"""How many replicas a teacher has, as Serve sees it, and how that number is changed while calls go on.

Serve 2.60 has no call for it: `serve.run` restarts every replica of an application that it deploys again, since it gives the
code a new version. `set_replicas` deploys what Serve itself holds of the deployment, code and version as they are, with another
number alone: Serve starts or drains the difference, whichever process asks.
"""

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

from video_opd.config import Config, TeacherConfig, TeacherModel
from video_opd.errors import RunError

protobuf: Any = serve_pb2  # its classes are made while it is imported

DEPLOYMENT = "teacher"
PREFIX, MIDDLE = "video_opd/", "/teacher/"
ANSWER_TIMEOUT_S = 10.0  # of Serve's controller, which computes nothing
GONE_WRONG = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


@dataclass(frozen=True)
class Bounds:
    """Between which numbers Serve chooses by the calls that queue."""

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
    message: str  # why, where the status is a bad one
    wanted: int  # replicas
    starting: int
    draining: int  # end the calls that they have and take no more
    bounds: Bounds | None  # None: the number is fixed
    pids: tuple[int, ...]  # of the running replicas
    actors: tuple[str, ...]  # their names

    @property
    def running(self) -> int:
        return len(self.actors)

    @property
    def reached(self) -> bool:
        """Whether what runs is what is wanted."""
        return self.running == self.wanted and not self.draining

    def __str__(self) -> str:
        number = f"autoscaling {self.bounds}" if self.bounds else "fixed number"
        states = f"{self.wanted} wanted, {self.running} running, {self.starting} starting, {self.draining} draining"
        wrong = (
            f"; {self.status.value}: {' '.join(self.message.split())[-500:]}"
            if self.status in GONE_WRONG
            else ""
        )
        return f"run {self.run}, teacher {self.teacher}: replicas {states}; {number}{wrong}"


def app_name(run: str, teacher: str) -> str:
    """Of the Serve application that is one teacher of one run. `run` as in the names of its other actors: video_opd/NAME."""
    return f"{run}{MIDDLE}{teacher}"


def read_pools() -> list[PoolStatus]:
    """All teachers of all runs on this Ray; none where no Serve runs. Raises RunError when Serve does not answer."""
    controller = _controller()
    if controller is None:
        return []
    applications = _answer(controller.get_serve_instance_details.remote())["applications"]
    names = [
        n for n in applications if n.startswith(PREFIX) and MIDDLE in n and applications[n]["deployments"]
    ]
    return [
        _read(name, applications[name])
        for name in names
        if applications[name]["status"] != ApplicationStatus.DELETING
    ]


def read_pool(app: str) -> PoolStatus:
    """One teacher. Raises RunError where there is none, or Serve does not answer."""
    for pool in read_pools():
        if app_name(PREFIX + pool.run, pool.teacher) == app:
            return pool
    raise RunError(f"Serve has no application {app}")


def delete_orphans(running: Collection[str]) -> list[str]:
    """Deletes the teachers of runs that are not among `running`: Serve outlives a driver that was killed. Returns their names."""
    orphans = [app_name(PREFIX + pool.run, pool.teacher) for pool in read_pools() if pool.run not in running]
    for app in orphans:
        serve.delete(app, _blocking=False)
    return orphans


def _read(name: str, application: dict[str, Any]) -> PoolStatus:
    run, _, teacher = name.removeprefix(PREFIX).rpartition(MIDDLE)
    deployment = application["deployments"][DEPLOYMENT]
    replicas = {
        state: [r for r in deployment["replicas"] if r["state"] in states]
        for state, states in _STATES.items()
    }
    scaling = deployment["deployment_config"].get("autoscaling_config")
    return PoolStatus(
        run=run,
        teacher=teacher,
        status=ApplicationStatus(application["status"]),
        message=deployment["message"] or application["message"],
        wanted=deployment["target_num_replicas"],
        starting=len(replicas["starting"]),
        draining=len(replicas["draining"]),
        bounds=Bounds(scaling["min_replicas"], scaling["max_replicas"]) if scaling else None,
        pids=tuple(r["pid"] for r in replicas["running"]),
        actors=tuple(r["actor_name"] for r in replicas["running"]),
    )


_STATES = {
    "running": ("RUNNING", "UPDATING", "PENDING_MIGRATION"),
    "starting": ("STARTING", "RECOVERING"),
    "draining": ("STOPPING",),
}


def _controller() -> Any:
    """Serve's controller actor; None where Serve does not run."""
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    return client and client._controller


def _answer(reference: Any) -> Any:
    """The controller's. Raises RunError without one."""
    try:
        return ray.get(reference, timeout=ANSWER_TIMEOUT_S)
    except (GetTimeoutError, RayError, RayServeException) as error:
        raise RunError(f"Serve's controller does not answer: {error}") from error


def ongoing_calls(pool: PoolStatus) -> int | None:
    """Calls that the running replicas have, worked on or waiting there; None where one does not answer."""
    try:
        replicas = [ray.get_actor(name, namespace="serve") for name in pool.actors]
        return sum(ray.get([r.get_num_ongoing_requests.remote() for r in replicas], timeout=ANSWER_TIMEOUT_S))
    except (ValueError, GetTimeoutError, RayError):
        return None


def autoscaling(config: TeacherConfig, bounds: Bounds, initial: int) -> AutoscalingConfig:
    """Serve's own policy: as many replicas as leave each with target_ongoing_requests calls."""
    return AutoscalingConfig(
        min_replicas=bounds.fewest,
        max_replicas=bounds.most,
        initial_replicas=min(max(initial, bounds.fewest), bounds.most),
        target_ongoing_requests=config.target_ongoing_requests,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
    )


def deployed_with(app: str) -> tuple[Config, TeacherModel]:
    """What the replicas of a teacher were made from, in whichever process that was."""
    return ReplicaConfig.from_proto(_deployed(app).replica_config, needs_pickle=True).init_args  # pyright: ignore[reportReturnType]


def set_replicas(app: str, wanted: int | Bounds) -> None:
    """A fixed number, or autoscaling between bounds, from now on. Replicas that stay are not restarted; those that go drain."""
    deployed, (config, _) = _deployed(app), deployed_with(app)
    options = DeploymentConfig.from_proto(deployed.deployment_config)
    if isinstance(wanted, Bounds):
        running = read_pool(app).wanted
        options.autoscaling_config = autoscaling(config.teacher_pool, wanted, running)
        options.num_replicas = None
    else:
        options.autoscaling_config = None
        options.num_replicas = wanted
    arguments = protobuf.DeploymentArgs(
        deployment_name=DEPLOYMENT,
        deployment_config=options.to_proto_bytes(),  # holds the version of the code, which stays
        replica_config=deployed.replica_config.SerializeToString(),
        deployer_job_id=ray.get_runtime_context().get_job_id(),
        ingress=True,
    )
    by_app: dict[str, Sequence[bytes]] = {app: [arguments.SerializeToString()]}
    of_app = {app: protobuf.ApplicationArgs(external_scaler_enabled=False).SerializeToString()}
    _answer(_controller().deploy_applications.remote(by_app, of_app))


def _deployed(app: str) -> Any:
    """Serve's record of the deployment."""
    return protobuf.DeploymentRoute.FromString(
        _answer(_controller().get_deployment_info.remote(DEPLOYMENT, app))
    ).deployment_info
