"""What a run needs of a cluster, the wait until the cluster has it, and the start of Ray."""

import gc
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve._private.long_poll import LongPollClient
from ray.util.placement_group import placement_group, remove_placement_group

from preflight.memory_fit import MemoryPlan
from preflight.object_store import small_stores, store_plan
from preflight.options import asked_attention, lacks
from teacher_service.scaling import delete_orphans
from video_opd import ROOT
from video_opd.cluster.join import cluster_to_join, join, start_local
from video_opd.cluster.placement import resources_of
from video_opd.cluster.run_control import NAMESPACE, running_runs
from video_opd.config import Config
from video_opd.errors import ClusterError, ConfigError
from video_opd.models.attention import PACKAGES, missing_for

POLL_S = 2.0
LAST_POLL_S, CALLBACK_S = 2.0, 0.1  # for the last answer, and what a thread makes of it
LOCAL_ROLES = 64  # rollout actors and teacher replicas that a local Ray admits: memory limits them, not Ray
LOCAL_TIMEOUT_S = 60.0  # until a local Ray reports its resources; they do not grow
# A replica that hangs cannot drain: it must free its device for the next one.
SERVE_ENV = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}

Resources = Mapping[str, float]  # by Ray's names: CPU, GPU, and one for each role


@dataclass(frozen=True)
class Need:
    """A number of processes of one role, each on one node."""

    role: str
    count: int
    each: Resources  # of one process
    key: str  # of the config

    def __str__(self) -> str:
        each = ", ".join(f"{name} {amount:g}" for name, amount in self.each.items())
        return f"{self.role} (each {each}; {self.key})"


def needs_of(config: Config) -> list[Need]:
    """Learner ranks, rollout actors and teacher replicas that the run starts with."""
    learner, rollout, pool = config.learner, config.rollout, config.teacher_pool
    num_teachers = pool.num_replicas * len(config.teacher_models) * config.needs_teacher
    of_rank = {name: n for name, n in (("CPU", learner.num_cpus), ("GPU", learner.num_gpus)) if n}
    needs = [
        Need("learner", learner.world_size, {"learner": 1} | of_rank, "learner.world_size"),
        Need("rollout", rollout.num_actors, resources_of(rollout, "rollout"), "rollout.num_actors"),
        Need("teacher", num_teachers, resources_of(pool, "teacher"), "teacher_pool.num_replicas"),
    ]
    return [need for need in needs if need.count]


def placed(needs: Sequence[Need], nodes: Sequence[Resources]) -> Counter[str]:
    """How many processes of each role have a place. nodes: what each has.

    Each process goes to the first node with room: an estimate, Ray itself decides.
    """
    free, found = [dict(node) for node in nodes], Counter[str]()
    for need in [n for n in needs for _ in range(n.count)]:
        room = (node for node in free if all(node.get(k, 0.0) >= v for k, v in need.each.items()))
        if node := next(room, None):
            found[need.role] += 1
            node.update({name: node[name] - amount for name, amount in need.each.items()})
    return found


def describe_missing(needs: Sequence[Need], nodes: Sequence[Resources]) -> str:
    """The roles that lack places, such as "teacher: 2 of 4"; empty: none. See `placed`."""
    found = placed(needs, nodes)
    return ", ".join(f"{n.role}: {found[n.role]} of {n.count}" for n in needs if found[n.role] < n.count)


def too_large(needs: Sequence[Need], nodes: Sequence[Resources]) -> str:
    """The processes that no node could hold even if it were empty; empty: none. nodes: all each has."""
    return "; ".join(str(need) for need in needs if describe_missing([replace(need, count=1)], nodes))


def idle_replicas(config: Config) -> int:
    """How many more replicas fit on the GPUs that wait for the learner; 0: the learner starts at once.

    Only on one machine with whole GPUs: Serve chooses which replicas end, so on several they could leave the
    learner's ranks without a node. Only one teacher, of a fixed number of replicas.
    """
    pool, learner = config.teacher_pool, config.learner
    on_gpus = pool.num_gpus == learner.num_gpus == 1 and not config.shares_gpus
    fixed = len(config.teacher_models) == 1 and pool.max_replicas is None
    if not (config.curriculum.asks_teacher and on_gpus and fixed):
        return 0
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if sum(node.get("GPU", 0) > 0 for node in nodes) != 1:
        return 0
    most = pool.num_replicas + learner.world_size // pool.tensor_parallel
    needs = [need for need in needs_of(config) if need.role != "learner"]
    needs = [replace(need, count=most) if need.role == "teacher" else need for need in needs]
    return max(0, placed(needs, nodes)["teacher"] - pool.num_replicas)


def wait_for_places(config: Config, timeout_s: float) -> None:
    """Waits until the cluster has room for all processes at once; prints what is missing.

    It asks with a placement group, so that an autoscaler sees the demand, and gives it back.
    Raises ClusterError after `timeout_s` seconds.
    """
    from ray._private.state import available_resources_per_node

    needs, deadline, printed = needs_of(config), time.monotonic() + timeout_s, ""
    group = placement_group([dict(need.each) for need in needs for _ in range(need.count)])
    try:
        while not group.wait(min(POLL_S, max(0.1, deadline - time.monotonic()))):
            free = list(available_resources_per_node().values())
            missing = describe_missing(needs, free) or "the nodes have it, Ray has not given it yet"
            if large := too_large(needs, [node["Resources"] for node in ray.nodes() if node["Alive"]]):
                missing += f"; no node that is there could hold {large}"
            if time.monotonic() >= deadline:
                late = f"could not provide what the run needs within {timeout_s:.0f} s, {missing}"
                needed = f"needed are {'; '.join(map(str, needs))}"
                what_to_do = "add nodes (see `ray status`), ask for less, or raise start_timeout_s"
                raise ClusterError(f"the cluster {late}; {needed}: {what_to_do}")
            if missing != printed:
                print(f"waiting for the cluster: {missing}", flush=True)
                printed = missing
    finally:
        remove_placement_group(group)


def start_ray(config: Config, address: str | None) -> None:
    """Joins the Ray of `address`, or starts a local one; waits for room. Raises ConfigError, ClusterError."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers must not yield to the driver
    os.environ.setdefault(
        "RAY_prestart_worker_first_driver", "0"
    )  # a worker per CPU, which nothing would use
    shared: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": NAMESPACE}
    shared["runtime_env"] = {"env_vars": python_path() | SERVE_ENV}
    joined = cluster_to_join(address)
    if joined:
        context = join(joined, **shared)
    else:
        roles = {"rollout": LOCAL_ROLES, "teacher": LOCAL_ROLES, "learner": config.learner.world_size}
        cpus = max(os.cpu_count() or 1, 8 + config.rollout.num_actors + config.learner.world_size)
        context = start_local(num_cpus=cpus, resources={k: float(v) for k, v in roles.items()}, **shared)
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else "not installed"
    at = f"{'joined' if joined else 'address'} {ray.get_runtime_context().gcs_address}"
    print(f"Ray dashboard: {dashboard}, {at}", flush=True)
    for app in delete_orphans(running_runs()) if joined else ():
        print(f"deleted the teacher {app}: its run is gone", flush=True)
    if not joined and (large := too_large(needs_of(config), [node["Resources"] for node in ray.nodes()])):
        raise ClusterError(f"this machine cannot hold {large}: ask for less, or join a cluster (--address)")
    timeout_s = config.start_timeout_s if joined else min(config.start_timeout_s, LOCAL_TIMEOUT_S)
    wait_for_places(config, timeout_s)
    if joined:
        check_nodes(config)


def check_nodes(config: Config) -> None:
    """Asks one node of each role whether it has what the role's attention needs. Raises ConfigError."""
    asked = ray.remote(num_cpus=0, runtime_env={"env_vars": config.worker_env})(missing_for)
    for section, attention in asked_attention(config):
        if attention in PACKAGES:
            role = section.removesuffix("_pool")
            reference = asked.options(resources={role: 0.001}).remote(attention)
            if missing := ray.get(reference, timeout=config.start_timeout_s):
                key = f"{section}.attn_implementation={attention}"
                raise ConfigError(lacks(key, missing, f"a node of the {role}"))


def warn_of_small_stores(plan: MemoryPlan) -> None:
    """Prints one line where nodes have a smaller object store than the run fills."""
    if small := small_stores(store_plan(plan), ray.nodes()):
        print(f"warning: {small}", flush=True)


def leave_ray() -> None:
    """ray.shutdown. Serve's clients poll no more: a call after it would end this process with exit code 1.

    So would the answer to a poll that arrives while Ray shuts down. A deletion is answered at once.
    """
    clients = [each for each in gc.get_objects() if type(each) is LongPollClient and each.is_running]
    for client in clients:
        client.stop()
    polls = [client._current_ref for client in clients if hasattr(client, "_current_ref")]
    if polls and ray.is_initialized():
        with suppress(RayError, ValueError):  # Ray was lost, or these are of another one
            ray.wait(polls, num_returns=len(polls), timeout=LAST_POLL_S, fetch_local=False)
        time.sleep(CALLBACK_S)
    ray.shutdown()


def python_path() -> dict[str, str]:
    """Puts this checkout first, also for Serve, whose controller may come from another checkout."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
