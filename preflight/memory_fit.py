"""Whether a run's memory fits, the smallest change that would make it fit, and the plan in words."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import psutil

from preflight.inputs import Draft, Plan, asked_teachers, largest_teacher
from preflight.memory import GIB, RoleMemory, Workload, estimate, workload_of, workload_of_budget
from preflight.model_shapes import ModelShapes, count, parameters, read_shapes
from video_opd.config import Config
from video_opd.errors import ConfigError
from video_opd.types import Prompt

DEFAULT_GPU_GIB = 80.0
MAX_WORLD_SIZE = 64
LORA_RANK = 16

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
        """The roles of a variant of the configuration."""
        return estimate(config, self.student, self.teacher, self.train, self.evaluation, self.gpu_bytes)


def machine_bytes() -> int:
    """Memory of this machine."""
    return psutil.virtual_memory().total


def device_gpu_bytes() -> int:
    """Memory of this machine's first GPU; DEFAULT_GPU_GIB where it has none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return int(DEFAULT_GPU_GIB * GIB)


def check_fits(plan: MemoryPlan, one_machine: bool) -> None:
    """Raises ConfigError, naming the smallest change that helps, where a process does not fit in its share of a GPU, or a run
    without GPUs not in this machine. `one_machine` false: only a single process larger than the machine is refused there."""
    roles = plan.roles
    for role in roles:
        share = role.gpu_share * plan.gpu_bytes
        if role.device and role.device.peak_bytes > share:
            of = f"{share / GIB:.0f} GiB a GPU"
            if role.gpu_share < 1:
                of = f"{share / GIB:.0f} GiB, {_NUM_GPUS[role.role]}={role.gpu_share:g} of {plan.gpu_bytes / GIB:.0f}"
            raise ConfigError(
                f"{role.role}: {role.device.peak_bytes / GIB:.0f} GiB of {of}: {_advice(plan, role)}"
            )
    if plan.on_gpu:
        return
    total = host_total(roles)
    largest = max(roles, key=lambda r: r.host.peak_bytes)
    asked = total if one_machine else largest.host.peak_bytes
    if asked > plan.host_bytes:
        what = "all processes together" if one_machine else largest.role
        raise ConfigError(
            f"{what}: {asked / GIB:.1f} GiB of the {plan.host_bytes / GIB:.1f} GiB of this machine; the most is {largest.role}, "
            f"{largest.host.peak_bytes / GIB:.1f} GiB a process: {_advice(plan, largest)}"
        )


def host_total(roles: Sequence[RoleMemory]) -> int:
    """Bytes of all processes in the machine's memory, as if all ran on one."""
    return sum(r.processes * r.host.peak_bytes for r in roles)


_NUM_GPUS = {"learner": "learner.num_gpus", "actors": "rollout.num_gpus", "teacher": "teacher_pool.num_gpus"}


def _advice(plan: MemoryPlan, role: RoleMemory) -> str:
    """The first change, in the order of _changes, after which the role fits; where none alone is enough, as many as it takes."""
    changes = list(_changes(plan.config, role.role))
    for change in [*changes, *accumulate(changes, lambda before, further: {**before, **further})]:
        if (after := _needed(plan, change, role.role)) is not None:
            words = " ".join(f"{key}={_yaml(value)}" for key, value in change.items())
            return f"{words} would need {after / GIB:.0f}"
    return "none of its options makes it fit: take a smaller model, shorter videos (video.max_video_tokens) or larger GPUs"


def _yaml(value: object) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _needed(plan: MemoryPlan, change: Change, role: str) -> int | None:
    """Bytes that a process of the role needs after the change; None where it does not fit."""
    config = plan.config
    for key, value in change.items():
        config = _with(config, key, value)
    roles = plan.of(config)
    (changed,) = [r for r in roles if r.role == role]
    if changed.device:
        needed = changed.device.peak_bytes
        return needed if needed <= changed.gpu_share * plan.gpu_bytes else None
    return changed.host.peak_bytes if host_total(roles) <= plan.host_bytes else None


def _with(config: Config, key: str, value: object) -> Config:
    section, _, name = key.partition(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


def _halves(value: int, lowest: int = 1) -> Iterator[int]:
    while value // 2 >= lowest:
        value //= 2
        yield value


def _changes(config: Config, role: str) -> Iterator[Change]:
    """What could make a role fit, the least costly first. Only a teacher on vLLM can be cut into parts."""
    of: dict[str, Callable[[Config], Iterator[Change]]] = {
        "learner": _learner_changes,
        "actors": _actors_changes,
        "teacher": _teacher_changes,
    }
    if role in of:
        yield from of[role](config)


def _learner_changes(config: Config) -> Iterator[Change]:
    learner = config.learner
    if not learner.gradient_checkpointing:
        yield {"learner.gradient_checkpointing": True}
    yield from ({"learner.zero_stage": stage} for stage in range(learner.zero_stage + 1, 4))
    yield from ({"learner.micro_batch": size} for size in _halves(learner.micro_batch))
    ranks = learner.world_size
    while learner.num_gpus and (ranks := 2 * ranks) <= MAX_WORLD_SIZE:  # on a CPU all ranks share one memory
        yield {"learner.world_size": ranks}
    if not learner.lora_rank:
        yield {"learner.lora_rank": LORA_RANK}
    yield from _larger_share("learner.num_gpus", learner.num_gpus)


def _actors_changes(config: Config) -> Iterator[Change]:
    rollout = config.rollout
    if rollout.kv_cache_bytes is None and rollout.num_gpus:
        yield from (
            {"rollout.gpu_memory_utilization": n / 20}
            for n in range(int(rollout.gpu_memory_utilization * 20), 1, -1)
        )
    if rollout.kv_cache_bytes:
        yield from (
            {"rollout.kv_cache_bytes": size} for size in _halves(rollout.kv_cache_bytes, lowest=1 << 20)
        )
    yield from ({"rollout.max_num_seqs": size} for size in _halves(rollout.max_num_seqs))
    yield from _larger_share("rollout.num_gpus", rollout.num_gpus)


def _teacher_changes(config: Config) -> Iterator[Change]:
    pool = config.teacher_pool
    yield from ({"teacher_pool.micro_batch": size} for size in _halves(pool.micro_batch))
    if config.curriculum.asks_teacher:
        yield from (
            {"curriculum.num_teacher_predictions": n}
            for n in _halves(config.curriculum.num_teacher_predictions)
        )
    yield from _larger_share("teacher_pool.num_gpus", pool.num_gpus)
    if pool.engine == "vllm" and pool.num_gpus:
        yield from (
            {"teacher_pool.tensor_parallel": parts} for parts in (2, 4, 8) if parts > pool.tensor_parallel
        )


def _larger_share(key: str, share: float) -> Iterator[Change]:
    """Tenths of a GPU above the share."""
    if 0 < share < 1:
        yield from ({key: n / 10} for n in range(int(share * 10) + 1, 11))


def describe_memory(plan: MemoryPlan) -> str:
    """The estimate for people: every role, its terms largest first, and what there is."""
    models = [("student", plan.student)] + ([("teacher", plan.teacher)] if plan.teacher else [])
    lines = [f"{role:9} {count(parameters(shapes)) / 1e9:.3f} billion parameters" for role, shapes in models]
    work = plan.train
    if work.mean_video_tokens is None:
        video = f"at most {work.max_video_tokens} tokens a clip, from the config's own budget"
    else:
        video = f"{work.mean_video_tokens:.0f} tokens a prompt expected, at most {work.max_video_tokens}"
    lines += [
        f"video     {video}; longest prompt about {work.max_prompt_tokens} tokens",
        "memory, estimated, GiB a process:",
    ]
    roles = plan.roles
    for role in roles:
        memory = role.device or role.host
        terms = sorted(
            ((b, n) for n, b in memory.terms.items() if b >= 0.005 * max(memory.peak_bytes, 1)), reverse=True
        )
        parts = ", ".join(f"{name} {size / GIB:.{2 if size < GIB else 1}f}" for size, name in terms)
        phase = f"; peak while {memory.largest_phase}" if memory.largest_phase else ""
        place = f"of {role.gpu_share * plan.gpu_bytes / GIB:5.1f} a GPU" if role.device else "on the host"
        lines.append(
            f"  {role.role:12} {role.processes} x {memory.peak_bytes / GIB:6.2f} {place}: {parts}{phase}"
        )
    if plan.on_gpu:
        shares = ", ".join(f"{r.processes} x {r.gpu_share:g} {r.role}" for r in roles if r.device)
        gpus = sum(r.processes * r.gpu_share for r in roles)
        lines.append(f"  GPUs         {gpus:g} of {plan.gpu_bytes / GIB:.0f} GiB ({shares})")
        lines.append(f"  host         {host_total(roles) / GIB:.0f} GiB over all machines while models load")
    else:
        lines.append(
            f"  in all       {host_total(roles) / GIB:.2f} of the {plan.host_bytes / GIB:.1f} GiB of this machine"
        )
    return "\n".join(lines)


def memory_plan(config: Config, draft: Plan | Draft, gpu_memory_gib: float | None) -> MemoryPlan:
    """What the run needs, and what there is: `gpu_memory_gib` a GPU, or that of this machine's GPU, or 80 where it has none.

    Raises InputError."""
    if isinstance(draft, Draft):
        student, teacher = draft.student, draft.teacher
    else:
        student = read_shapes(config.student)
        teacher = largest_teacher([read_shapes(t.model) for t in asked_teachers(config)])

    def workload(prompts: list[Prompt] | None) -> Workload:
        return workload_of_budget(config.video, student) if prompts is None else workload_of(prompts, student)

    if gpu_memory_gib is not None and not (math.isfinite(gpu_memory_gib) and gpu_memory_gib > 0):
        raise ConfigError(f"--gpu-memory-gib {gpu_memory_gib}: give the memory of one GPU, more than 0")
    gpu_bytes = device_gpu_bytes() if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    return MemoryPlan(
        config, student, teacher, workload(draft.train), workload(draft.eval), gpu_bytes, machine_bytes()
    )
