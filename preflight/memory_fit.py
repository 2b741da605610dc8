"""Whether a run's memory fits, the smallest change that would make it fit, and the estimate in words."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

import psutil

from preflight import memory
from preflight.gpus import read_machine
from preflight.inputs import Draft, Plan, asked_teachers, largest_teacher
from preflight.memory import GIB, RoleMemory, Workload, workload_of, workload_of_budget
from preflight.model_shapes import ModelShapes, can_shard, count, parameters, read_shapes
from video_opd.config import Config, RolloutConfig
from video_opd.config_teachers import TeacherConfig
from video_opd.errors import ConfigError

DEFAULT_GPU_BYTES = 80 * GIB
MAX_WORLD_SIZE = 64
LORA_RANK = 16
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
ALTERNATIVES = 3  # changes that a refusal names
SECTIONS = {"learner": ("learner",), "actors": ("rollout",), "teacher": ("teacher_pool", "curriculum")}

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
    views: tuple[Workload, ...] = ()  # of teachers that see more than the student

    @property
    def roles(self) -> list[RoleMemory]:
        return self.of(self.config)

    @property
    def on_gpu(self) -> bool:
        return any(r.device for r in self.roles)

    def of(self, config: Config) -> list[RoleMemory]:
        """Every role of a variant of the configuration."""
        both = Workload(*map(max, astuple(self.train), astuple(self.evaluation)))
        roles = [memory.learner_memory(config, self.student, self.teacher, self.train)]
        if config.rollout.num_actors:
            roles.append(memory.actors_memory(config, self.student, both, self.gpu_bytes))
        if config.needs_teacher and self.teacher:
            seen = Workload(*map(max, astuple(both), *map(astuple, self.views))) if self.views else both
            roles.append(memory.teacher_memory(config, self.teacher, seen, self.gpu_bytes))
        return [*roles, *memory.support_memory(config, self.student)]


def memory_plan(config: Config, draft: Plan | Draft, gpu_memory_gib: float | None) -> MemoryPlan:
    """The plan for GPUs of `gpu_memory_gib`; None: as here, else DEFAULT_GPU_BYTES. Raises InputError."""
    if isinstance(draft, Draft):
        student, teacher = draft.student, draft.teacher
    else:
        student = read_shapes(config.student)
        teacher = largest_teacher([read_shapes(t.model) for t in asked_teachers(config)])
    if gpu_memory_gib is not None and not (math.isfinite(gpu_memory_gib) and gpu_memory_gib > 0):
        raise ConfigError(f"--gpu-memory-gib {gpu_memory_gib}: give the memory of one GPU, more than 0")
    gpu_bytes = _gpu_bytes() if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    train, evaluation = (
        workload_of(split.prompts, student, draft.longest.get(name))
        if split
        else workload_of_budget(config.video, student)
        for name, split in (("train", draft.train), ("eval", draft.eval))
    )
    host_bytes = psutil.virtual_memory().total
    return MemoryPlan(config, student, teacher, train, evaluation, gpu_bytes, host_bytes, draft.views)


def _gpu_bytes() -> int:
    machine = read_machine()
    return machine.best.memory_bytes if machine.gpus else DEFAULT_GPU_BYTES


def misfit(plan: MemoryPlan, role: RoleMemory) -> str | None:
    """Why a process does not fit in its share of a GPU, and what would help; None: it fits."""
    share = role.gpu_share * plan.gpu_bytes
    if role.device is None or role.device.peak_bytes <= share:
        return None
    num_gpus = f"{SECTIONS[role.role][0]}.num_gpus={role.gpu_share:g}"
    of = " a GPU" if role.gpu_share == 1 else f", {num_gpus} of {plan.gpu_bytes / GIB:.0f}"
    needed, lacks = role.device.peak_bytes / GIB, (role.device.peak_bytes - share) / GIB
    what = f"{role.role}: {needed:.0f} GiB of {share / GIB:.0f} GiB{of}, {lacks:.1f} too many"
    return f"{what}: {_advice(plan, role)}"


def check_fits(plan: MemoryPlan, one_machine: bool) -> None:
    """Raises ConfigError, naming a change that helps, if a process does not fit in its share of a GPU.

    A run without GPUs must fit in this machine; unless `one_machine`, only its largest process must."""
    roles = plan.roles
    for role in roles:
        if problem := misfit(plan, role):
            raise ConfigError(problem)
    if plan.on_gpu:
        return
    largest = max(roles, key=lambda r: r.host.peak_bytes)
    asked = host_total(roles) if one_machine else largest.host.peak_bytes
    if asked > plan.host_bytes:
        what = "all processes together" if one_machine else largest.role
        needed = f"{asked / GIB:.1f} GiB of the {plan.host_bytes / GIB:.1f} GiB of this machine"
        process = f"the largest is {largest.role}, {largest.host.peak_bytes / GIB:.1f} GiB a process"
        raise ConfigError(f"{what}: {needed}; {process}: {_advice(plan, largest)}")


def with_kv_caches(plan: MemoryPlan) -> Config:
    """The config with the planned KV cache of each engine that shares a GPU, which must not measure it.

    vLLM takes the fall of the GPU's free memory for its own need, whoever allocated meanwhile."""
    config = plan.config
    for role in plan.roles:
        kv_cache = role.device.held.get("KV cache") if role.device and role.gpu_share < 1 else None
        if kv_cache:
            section = SECTIONS[role.role][0]
            engine = getattr(config, section).model_copy(update={"kv_cache_bytes": kv_cache})
            config = config.model_copy(update={section: engine})
    return config


def host_total(roles: Sequence[RoleMemory]) -> int:
    """Bytes of all processes in the machine's memory, as if all ran on one."""
    return sum(r.processes * r.host.peak_bytes for r in roles)


def _advice(plan: MemoryPlan, role: RoleMemory) -> str:
    """The first values after which the role fits, of up to ALTERNATIVES keys; else of as many as it takes."""
    changes = _changes(plan.config, role.role)
    found: dict[tuple[str, ...], str] = {}
    for change in [*changes, *accumulate(changes, lambda before, further: {**before, **further})]:
        if found and len(change) > 1:
            break
        if tuple(change) not in found and (after := _needed(plan, change, role.role)) is not None:
            words = " ".join(f"{key}={json.dumps(value)}" for key, value in change.items())
            found[tuple(change)] = f"{words} would need {after / GIB:.0f}"
            if len(change) > 1:
                break
    if found:
        return ", or ".join(list(found.values())[:ALTERNATIVES])
    remedy = "use a smaller model, shorter videos (video.max_video_tokens) or larger GPUs"
    return f"none of its options makes it fit: {remedy}"


def _needed(plan: MemoryPlan, change: Change, role: str) -> int | None:
    """Bytes that a process of the role needs after the change; None if it does not fit."""
    config = plan.config
    for key, value in change.items():
        section, _, name = key.partition(".")
        update = {section: getattr(config, section).model_copy(update={name: value})}
        config = config.model_copy(update=update)
    if not can_shard(plan.student, config.rollout.tensor_parallel):
        return None
    if plan.teacher and not can_shard(plan.teacher, config.teacher_pool.tensor_parallel):
        return None
    roles = plan.of(config)
    (changed,) = [r for r in roles if r.role == role]
    if changed.device:
        needed = changed.device.peak_bytes
        return needed if needed <= changed.gpu_share * plan.gpu_bytes else None
    return changed.host.peak_bytes if host_total(roles) <= plan.host_bytes else None


def _changes(config: Config, role: str) -> list[Change]:
    """Single changes that could make a role fit, the least costly first."""
    learner, rollout, pool = config.learner, config.rollout, config.teacher_pool
    vllm_teacher = config.teacher_engine == "vllm"
    many_ranks = learner.num_gpus > 0  # on a CPU all ranks share one memory
    predictions = config.curriculum.num_teacher_predictions if config.curriculum.asks_teacher else 0
    doubled = [learner.world_size << n for n in range(1, 7)] if many_ranks else []
    options: dict[str, Iterable[object]] = {
        "learner.gradient_checkpointing": [] if learner.gradient_checkpointing else [True],
        "learner.zero_stage": range(learner.zero_stage + 1, 4),
        "learner.weight_transfer": ["object_store"] if config.weight_transfer != "object_store" else [],
        "learner.tree_tokens": _smaller_passes(config),
        "learner.micro_batch": _halves(learner.micro_batch),
        "learner.world_size": [n for n in doubled if n <= MAX_WORLD_SIZE],
        "learner.deepspeed": [OFFLOAD] if many_ranks and learner.zero_stage and not learner.deepspeed else [],
        "learner.lora_rank": [] if learner.lora_rank else [LORA_RANK],
        "learner.num_gpus": _larger_shares(learner.num_gpus),
        "rollout.gpu_memory_utilization": _smaller_kv_caches(rollout),
        "rollout.kv_cache_bytes": [n for n in _halves(rollout.kv_cache_bytes or 0) if n >= 1 << 20],
        "rollout.max_num_seqs": _halves(rollout.max_num_seqs),
        "rollout.num_gpus": _larger_shares(rollout.num_gpus),
        "rollout.tensor_parallel": _more_shards(rollout),
        "teacher_pool.micro_batch": _halves(pool.micro_batch),
        "curriculum.num_teacher_predictions": _halves(predictions),
        "teacher_pool.gpu_memory_utilization": _smaller_kv_caches(pool) if vllm_teacher else [],
        "teacher_pool.num_gpus": _larger_shares(pool.num_gpus),
        "teacher_pool.tensor_parallel": _more_shards(pool) if vllm_teacher else [],
    }
    sections = SECTIONS.get(role, ())
    return [{key: v} for key, values in options.items() if key.startswith(sections) for v in values]


def _halves(value: int) -> list[int]:
    return [value >> n for n in range(1, value.bit_length())]


def _smaller_passes(config: Config) -> list[int]:
    """As many tokens as a sequence may have, where a pass may have more."""
    learner, longest = config.learner, config.rollout.max_model_len
    most = learner.tree_tokens or learner.micro_batch * longest
    return [longest] if most > longest and learner.micro_batch > 1 else []


def _smaller_kv_caches(engine: RolloutConfig | TeacherConfig) -> list[float]:
    """Twentieths of a GPU up to the present share, where the KV cache takes what is left of it."""
    fills_gpu = engine.num_gpus and engine.kv_cache_bytes is None
    return [n / 20 for n in range(int(engine.gpu_memory_utilization * 20), 1, -1)] if fills_gpu else []


def _more_shards(engine: RolloutConfig | TeacherConfig) -> list[int]:
    return [n for n in (2, 4, 8) if engine.num_gpus == 1 and n > engine.tensor_parallel]


def _larger_shares(share: float) -> list[float]:
    """Tenths of a GPU above the share."""
    return [n / 10 for n in range(int(share * 10) + 1, 11)] if 0 < share < 1 else []


def describe_memory(plan: MemoryPlan) -> str:
    """The estimate for people: every role, its terms largest first, and what there is."""
    models = [("student", plan.student)] + ([("teacher", plan.teacher)] if plan.teacher else [])
    lines = [f"{role:9} {_describe_model(shapes)}" for role, shapes in models]
    work, roles = plan.train, plan.roles
    video = f"{work.mean_video_tokens:.0f} tokens a prompt expected, at most {work.max_video_tokens}"
    if not work.mean_video_tokens:
        video = f"at most {work.max_video_tokens} tokens a clip, from the config's own budget"
    about = "" if work.longest_is_counted else "about "
    lines += [
        f"video     {video}; longest prompt {about}{work.max_prompt_tokens} tokens",
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
    hosts = ", ".join(f"{r.processes} x {r.host.peak_bytes / GIB:.1f} {r.role}" for r in roles if r.device)
    lines.append(f"  host         {total:.0f} GiB over all machines, at start or later ({hosts})")
    return "\n".join(lines)


def _describe_model(shapes: ModelShapes) -> str:
    size = f"{count(parameters(shapes)) / 1e9:.3f} billion parameters"
    return f"{size}, linear layers in FP8" if shapes.fp8 else size


def _describe_role(role: RoleMemory, gpu_bytes: int) -> str:
    process = role.device or role.host
    smallest = 0.005 * max(process.peak_bytes, 1)
    terms = sorted(((size, name) for name, size in process.terms.items() if size >= smallest), reverse=True)
    parts = ", ".join(f"{name} {size / GIB:.{2 if size < GIB else 1}f}" for size, name in terms)
    phase = f"; peak while {process.largest_phase}" if process.largest_phase else ""
    place = f"of {role.gpu_share * gpu_bytes / GIB:5.1f} a GPU" if role.device else "on the host"
    return f"  {role.role:12} {role.processes} x {process.peak_bytes / GIB:6.2f} {place}: {parts}{phase}"
