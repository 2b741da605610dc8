"""What a run asks of its cluster, and the wait until the cluster has it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ray.util.placement_group import placement_group, remove_placement_group

from video_opd.config import Config
from video_opd.errors import ClusterError

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
        Need(role, count, {role: 1} | {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}, key)
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
