"""What a run asks of its cluster, and the wait until the cluster has it."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from teacher_service.scaling import delete_orphans
from video_opd import ROOT
from video_opd.cluster.join import cluster_to_join, join, start_local
from video_opd.cluster.run_control import NAMESPACE, running_runs
from video_opd.config import Config
from video_opd.errors import ClusterError, StoppedError

T = TypeVar("T")

POLL_S = 2.0

Resources = Mapping[str, float]  # what Ray calls them: CPU, GPU, and one named for each role


@dataclass(frozen=True)
class Need:
    """So many processes of a role, and what each takes of one node."""

    role: str
    count: int
    each: Resources
    key: str  # of the config

    def __str__(self) -> str:
        return f"{self.role} (each {', '.join(f'{name} {amount:g}' for name, amount in self.each.items())}; {self.key})"


def needs_of(config: Config) -> list[Need]:
    """Learner ranks, rollout actors and teacher replicas, as many as the run starts with."""
    learner, rollout, pool = config.learner, config.rollout, config.teacher_pool
    parts = pool.tensor_parallel
    asked = [
        ("learner", learner.world_size, learner.num_cpus, learner.num_gpus, "learner.world_size"),
        ("rollout", rollout.num_actors, rollout.num_cpus, rollout.num_gpus, "rollout.num_actors"),
        (
            *("teacher", pool.num_replicas * len(config.teacher_models) * config.needs_teacher),
            *(pool.num_cpus * parts, pool.num_gpus * parts, "teacher_pool.num_replicas"),
        ),
    ]
    return [
        Need(
            role,
            count,
            {role: 1} | {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount},
            key,
        )
        for role, count, cpus, gpus, key in asked
        if count
    ]


def place(needs: Sequence[Need], nodes: Sequence[Resources]) -> dict[str, int]:
    """How many processes of each role find a place, each on the first node that has what it takes.

    nodes: what each has free. An estimate for people: Ray itself decides.
    """
    free = [dict(node) for node in nodes]
    return {need.role: sum(_take(need.each, free) for _ in range(need.count)) for need in needs}


def _take(each: Resources, free: list[dict[str, float]]) -> bool:
    for node in free:
        if all(node.get(name, 0.0) >= amount for name, amount in each.items()):
            for name, amount in each.items():
                node[name] -= amount
            return True
    return False


def describe_missing(needs: Sequence[Need], nodes: Sequence[Resources]) -> str:
    """Which roles have not all their places, such as "teacher: 2 of 4"; empty: none."""
    placed = place(needs, nodes)
    return ", ".join(f"{n.role}: {placed[n.role]} of {n.count}" for n in needs if placed[n.role] < n.count)


def wait_for_places(config: Config, timeout_s: float) -> None:
    """Returns once the cluster has a place for every process at once, and says meanwhile what is missing.

    What is asked for is a placement group that is given back: an autoscaler sees the demand, and it is gone when this
    process is. Raises ClusterError after `timeout_s` seconds.
    """
    needs = needs_of(config)
    deadline, said = time.monotonic() + timeout_s, ""
    group = placement_group([dict(need.each) for need in needs for _ in range(need.count)])
    try:
        while not group.wait(min(POLL_S, max(0.1, deadline - time.monotonic()))):
            missing = describe_missing(needs, list(_free())) or "the nodes have it, Ray has not given it yet"
            if time.monotonic() >= deadline:
                short = "; ".join(map(str, needs))
                raise ClusterError(
                    f"the cluster has not what the run asks for after {timeout_s:.0f} s, {missing}; asked for are {short}: "
                    "add nodes (`ray status` says which), ask for less, or raise start_timeout_s"
                )
            if missing != said:
                print(f"waiting for the cluster: {missing}", flush=True)
                said = missing
    finally:
        remove_placement_group(group)


def _free() -> Iterator[Resources]:
    """What each node has free."""
    from ray._private.state import available_resources_per_node

    yield from available_resources_per_node().values()


SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopped_by_signals(when: str) -> Iterator[None]:
    """SIGTERM and SIGINT raise StoppedError in the block: before the run has begun."""

    def stop(number: int, _: object) -> None:
        raise StoppedError(f"stopped by {signal.Signals(number).name} {when}", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {which: signal.getsignal(which) for which in SIGNALS}
    for which in SIGNALS:
        if before[which] != signal.SIG_IGN:
            signal.signal(which, stop)
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


LOCAL_ROLES = 64  # rollout actors and teacher replicas that a Ray of this machine alone lets in; memory bounds them, not Ray


LOCAL_TIMEOUT_S = 60.0  # until such a Ray says what it has; no more will come


SERVE_ENV = {
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"
}  # one that hangs cannot drain: it gives its device to the next


def start_ray(config: Config, address: str | None) -> None:
    """Joins the Ray that `address` means (see cluster_to_join), or starts one of this machine alone; waits until it has room.

    Raises ConfigError, and ClusterError where the room does not come.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are not to yield to the driver
    shared: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "namespace": NAMESPACE,
        "runtime_env": {"env_vars": python_path() | SERVE_ENV},
    }
    joined = cluster_to_join(address)
    if joined:
        context = join(joined, **shared)
    else:
        roles = {"rollout": LOCAL_ROLES, "teacher": LOCAL_ROLES, "learner": config.learner.world_size}
        cpus = max(os.cpu_count() or 1, 8 + config.rollout.num_actors + config.learner.world_size)
        context = start_local(num_cpus=cpus, resources={k: float(v) for k, v in roles.items()}, **shared)
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else "not installed"
    of = "joined" if joined else "address"
    print(f"Ray dashboard: {dashboard}, {of} {ray.get_runtime_context().gcs_address}", flush=True)
    for app in delete_orphans(running_runs()) if joined else ():
        print(f"the teacher {app} of a run that is gone is deleted", flush=True)
    with stopped_by_signals("while it waited for the cluster"):
        wait_for_places(
            config, config.start_timeout_s if joined else min(config.start_timeout_s, LOCAL_TIMEOUT_S)
        )


def python_path() -> dict[str, str]:
    """This checkout comes first, also in what Serve starts: its controller may be of a run from another one."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
