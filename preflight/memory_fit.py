"""Whether a run's memory fits, the smallest change that would make it fit, and the estimate in words."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

import psutil

from preflight.inputs import Draft, Plan, asked_teachers, largest_teacher
from preflight.memory import (
    GIB,
    RoleMemory,
    Workload,
    actors_memory,
    learner_memory,
    support_memory,
    teacher_memory,
    workload_of,
    workload_of_budget,
)
from preflight.model_shapes import ModelShapes, count, parameters, read_shapes
from video_opd.config import Config
from video_opd.errors import ConfigError
from video_opd.types import Prompt

DEFAULT_GPU_GIB = 80.0
MAX_WORLD_SIZE = 64
LORA_RANK = 16
NUM_GPUS = {"learner": "learner.num_gpus", "actors": "rollout.num_gpus", "teacher": "teacher_pool.num_gpus"}

Change = Mapping[str, object]
"""Dotted key -> value."""


@dataclass(frozen=True)
class MemoryPlan:
    """The roles of a configuration, and what they have to fit in."""

    config: Config
    student: ModelShapes
    teacher: ModelShapes | None
    train: Workload
    evaluation: Workload
    gpu_bytes: int  # of one GPU
    host_bytes: int  # of this machine

    @property
    def roles(self) -> list[RoleMemory]:
        return self.of(self.config)

    @property
    def on_gpu(self) -> bool:
        """Whether any role computes on GPUs."""
        return any(r.device for r in self.roles)

    def of(self, config: Config) -> list[RoleMemory]:
        """Every role of a variant of the configuration."""
        both = Workload(*map(max, astuple(self.train), astuple(self.evaluation)))
        roles = [learner_memory(config, self.student, self.teacher, self.train)]
        if config.rollout.num_actors:
            roles.append(actors_memory(config, self.student, both, self.gpu_bytes))
        if config.needs_teacher and self.teacher:
            roles.append(teacher_memory(config, self.teacher, both, self.gpu_bytes))
        return [*roles, *support_memory(config, self.student)]


def memory_plan(config: Config, draft: Plan | Draft, gpu_memory_gib: float | None) -> MemoryPlan:
    """What the run needs, and the memory of this machine and of one GPU.

    A GPU has `gpu_memory_gib`; if None what this machine's has, else DEFAULT_GPU_GIB. Raises InputError."""
    if isinstance(draft, Draft):
        student, teacher = draft.student, draft.teacher
    else:
        student = read_shapes(config.student)
        teacher = largest_teacher([read_shapes(t.model) for t in asked_teachers(config)])

    def workload(prompts: list[Prompt] | None) -> Workload:
        return workload_of_budget(config.video, student) if prompts is None else workload_of(prompts, student)

    if gpu_memory_gib is not None and not (math.isfinite(gpu_memory_gib) and gpu_memory_gib > 0):
        raise ConfigError(f"--gpu-memory-gib {gpu_memory_gib}: give the memory of one GPU, more than 0")
    gpu_bytes = _gpu_bytes() if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    machine_bytes = psutil.virtual_memory().total
    return MemoryPlan(
        config, student, teacher, workload(draft.train), workload(draft.eval), gpu_bytes, machine_bytes
    )


def _gpu_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return int(DEFAULT_GPU_GIB * GIB)


def check_fits(plan: MemoryPlan, one_machine: bool) -> None:
    """Raises ConfigError, naming a change that helps, if a process does not fit in its share of a GPU.

    A run without GPUs must fit in this machine; unless `one_machine`, only its largest process must."""
    roles = plan.roles
    for role in roles:
        share = role.gpu_share * plan.gpu_bytes
        if role.device and role.device.peak_bytes > share:
            of = f"{share / GIB:.0f} GiB a GPU"
            if role.gpu_share < 1:
                num_gpus = f"{NUM_GPUS[role.role]}={role.gpu_share:g}"
                of = f"{share / GIB:.0f} GiB, {num_gpus} of {plan.gpu_bytes / GIB:.0f}"
            needed = f"{role.role}: {role.device.peak_bytes / GIB:.0f} GiB"
            raise ConfigError(f"{needed} of {of}: {_advice(plan, role)}")
    if plan.on_gpu:
        return
    largest = max(roles, key=lambda r: r.host.peak_bytes)
    asked = host_total(roles) if one_machine else largest.host.peak_bytes
    if asked > plan.host_bytes:
        what = "all processes together" if one_machine else largest.role
        available = plan.host_bytes / GIB
        raise ConfigError(
            f"{what}: {asked / GIB:.1f} GiB of the {available:.1f} GiB of this machine; the largest is "
            f"{largest.role}, {largest.host.peak_bytes / GIB:.1f} GiB a process: {_advice(plan, largest)}"
        )


def host_total(roles: Sequence[RoleMemory]) -> int:
    """Bytes of all processes in the machine's memory, as if all ran on one."""
    return sum(r.processes * r.host.peak_bytes for r in roles)


def _advice(plan: MemoryPlan, role: RoleMemory) -> str:
    """The first of _changes after which the role fits, else as many of them together as it takes."""
    changes = list(_changes(plan.config, role.role))
    for change in [*changes, *accumulate(changes, lambda before, further: {**before, **further})]:
        if (after := _needed(plan, change, role.role)) is not None:
            words = " ".join(f"{key}={_yaml(value)}" for key, value in change.items())
            return f"{words} would need {after / GIB:.0f}"
    remedy = "use a smaller model, shorter videos (video.max_video_tokens) or larger GPUs"
    return f"none of its options makes it fit: {remedy}"


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _needed(plan: MemoryPlan, change: Change, role: str) -> int | None:
    """Bytes that a process of the role needs after the change; None if it does not fit."""
    config = plan.config
    for key, value in change.items():
        section, _, name = key.partition(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    roles = plan.of(config)
    (memory,) = [r for r in roles if r.role == role]
    if memory.device:
        needed = memory.device.peak_bytes
        return needed if needed <= memory.gpu_share * plan.gpu_bytes else None
    return memory.host.peak_bytes if host_total(roles) <= plan.host_bytes else None


def _changes(config: Config, role: str) -> Iterator[Change]:
    """Single changes that could make a role fit, the least costly first."""
    learner, rollout, pool, curriculum = (
        config.learner,
        config.rollout,
        config.teacher_pool,
        config.curriculum,
    )
    many_ranks = learner.num_gpus > 0  # on a CPU all ranks share one memory
    kv_cache_fills_gpu = rollout.num_gpus and rollout.kv_cache_bytes is None
    twentieths = range(int(rollout.gpu_memory_utilization * 20), 1, -1) if kv_cache_fills_gpu else []
    in_parts = pool.engine == "vllm" and pool.num_gpus
    options: dict[str, dict[str, Iterable[object]]] = {
        "learner": {
            "learner.gradient_checkpointing": [] if learner.gradient_checkpointing else [True],
            "learner.zero_stage": range(learner.zero_stage + 1, 4),
            "learner.micro_batch": _halves(learner.micro_batch),
            "learner.world_size": _doubles(learner.world_size) if many_ranks else [],
            "learner.lora_rank": [] if learner.lora_rank else [LORA_RANK],
            "learner.num_gpus": _larger_shares(learner.num_gpus),
        },
        "actors": {
            "rollout.gpu_memory_utilization": (n / 20 for n in twentieths),
            "rollout.kv_cache_bytes": _halves(rollout.kv_cache_bytes or 0, lowest=1 << 20),
            "rollout.max_num_seqs": _halves(rollout.max_num_seqs),
            "rollout.num_gpus": _larger_shares(rollout.num_gpus),
        },
        "teacher": {
            "teacher_pool.micro_batch": _halves(pool.micro_batch),
            "curriculum.num_teacher_predictions": (
                _halves(curriculum.num_teacher_predictions) if curriculum.asks_teacher else []
            ),
            "teacher_pool.num_gpus": _larger_shares(pool.num_gpus),
            "teacher_pool.tensor_parallel": [n for n in (2, 4, 8) if in_parts and n > pool.tensor_parallel],
        },
    }
    for key, values in options.get(role, {}).items():
        yield from ({key: value} for value in values)


def _halves(value: int, lowest: int = 1) -> Iterator[int]:
    while value // 2 >= lowest:
        value //= 2
        yield value


def _doubles(value: int) -> Iterator[int]:
    while (value := 2 * value) <= MAX_WORLD_SIZE:
        yield value


def _larger_shares(share: float) -> list[float]:
    """Tenths of a GPU above the share."""
    return [n / 10 for n in range(int(share * 10) + 1, 11)] if 0 < share < 1 else []


def describe_memory(plan: MemoryPlan) -> str:
    """The estimate for people: every role, its terms largest first, and what there is."""
    models = [("student", plan.student)] + ([("teacher", plan.teacher)] if plan.teacher else [])
    lines = [f"{role:9} {count(parameters(shapes)) / 1e9:.3f} billion parameters" for role, shapes in models]
    work, roles = plan.train, plan.roles
    video = f"{work.mean_video_tokens:.0f} tokens a prompt expected, at most {work.max_video_tokens}"
    if not work.mean_video_tokens:
        video = f"at most {work.max_video_tokens} tokens a clip, from the config's own budget"
    lines += [
        f"video     {video}; longest prompt about {work.max_prompt_tokens} tokens",
        "memory, estimated, GiB a process:",
        *(_describe_role(role, plan.gpu_bytes) for role in roles),
    ]
    total = host_total(roles) / GIB
    if not plan.on_gpu:
        lines.append(f"  in all       {total:.2f} of the {plan.host_bytes / GIB:.1f} GiB of this machine")
        return "\n".join(lines)
    shares = ", ".join(f"{r.processes} x {r.gpu_share:g} {r.role}" for r in roles if r.device)
    gpus = sum(r.processes * r.gpu_share for r in roles)
    lines.append(f"  GPUs         {gpus:g} of {plan.gpu_bytes / GIB:.0f} GiB ({shares})")
    lines.append(f"  host         {total:.0f} GiB over all machines while models load")
    return "\n".join(lines)


def _describe_role(role: RoleMemory, gpu_bytes: int) -> str:
    memory = role.device or role.host
    smallest = 0.005 * max(memory.peak_bytes, 1)
    terms = sorted(((size, name) for name, size in memory.terms.items() if size >= smallest), reverse=True)
    parts = ", ".join(f"{name} {size / GIB:.{2 if size < GIB else 1}f}" for size, name in terms)
    phase = f"; peak while {memory.largest_phase}" if memory.largest_phase else ""
    place = f"of {role.gpu_share * gpu_bytes / GIB:5.1f} a GPU" if role.device else "on the host"
    return f"  {role.role:12} {role.processes} x {memory.peak_bytes / GIB:6.2f} {place}: {parts}{phase}"
