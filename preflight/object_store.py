"""What a run keeps in Ray's object store on a node, to compare with what the node's store holds."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from preflight.memory import GIB, longest_sequence, published_bytes
from preflight.memory_fit import MemoryPlan

ROOM = 1.25  # for weights: what is let go of leaves a moment later, and memory is lost between objects
COPIES = 2  # of a trajectory: as it came, and in the learner's batch


@dataclass(frozen=True)
class StorePlan:
    """Bytes."""

    weights: int  # on nodes of the learner and of actors: one version, and ROOM
    trajectories: int  # on any node, the head too
    followed: int  # on nodes of the learner: the versions that are kept for teachers that follow the student


def store_plan(plan: MemoryPlan) -> StorePlan:
    config, weights = plan.config, published_bytes(plan.config, plan.student)
    versions = max((t.delay + config.max_policy_lag + 1 for t in config.followers), default=0)
    return StorePlan(int(ROOM * weights), _trajectories_bytes(plan), int(versions * weights))


def _trajectories_bytes(plan: MemoryPlan) -> int:
    """The trajectories of all slots, with what the teacher says of them.

    Each 4M of prompt ids, 12N of response ids and both log-probs, 8NK of top-K, 4NK of the student's ids,
    4N of log-probs after grey frames, 4N(H + 1) of hidden states.
    """
    config, teacher, needs = plan.config, plan.teacher, plan.config.loss.needs
    of_token = 12 + (8 * config.loss.top_k if needs.teacher == "top_k" else 0) + 4 * config.loss.student_top_k
    of_token += 4 if config.loss.visual_weight else 0
    if needs.teacher == "hidden" and teacher:
        of_token += 4 * (teacher.text.hidden + 1)
    tokens = config.rollout.max_response_tokens
    one = 4 * longest_sequence(config, plan.train, config.rollout.max_model_len) + tokens * of_token
    return COPIES * config.num_slots * config.responses_per_prompt * one


def describe_store(plan: StorePlan) -> str:
    """One line for people."""
    total, weights, others, followed = (n / GIB for n in (sum(astuple(plan)), *astuple(plan)))
    parts = f"weights {weights:.2f}, where a rank or an actor is, and trajectories {others:.2f}"
    parts += f", and earlier weights {followed:.2f}, where a rank is" if followed else ""
    return f"store     {total:.2f} GiB of Ray's object store on a node: {parts}"


def small_stores(plan: StorePlan, nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Which stores hold too little, and what helps; None: each holds what it must.

    nodes: as ray.nodes() lists them.
    """
    small = []
    for node in (n for n in nodes if n["Alive"]):
        has = node["Resources"]
        loads = has.get("learner") or has.get("rollout") or (plan.followed and has.get("teacher"))
        needed = plan.trajectories + (plan.weights if loads else 0)
        needed += plan.followed if has.get("learner") else 0
        if (store := has.get("object_store_memory", 0)) < needed:
            small.append((needed, store, node["NodeManagerAddress"]))
    if not small:
        return None
    needed, store, address = max(small)
    found = (
        f"the object store of {address} has {store / GIB:.1f} GiB, the run keeps {needed / GIB:.1f} GiB there"
    )
    spills = f"{len(small)} of {len(nodes)} nodes spill to their disks at every step"
    return f"{found} ({spills}): start Ray with --object-store-memory={needed} and a /dev/shm above it"
