"""The plan of seconds in words, and the split of the GPUs among the roles that takes least time."""

import math
from collections.abc import Iterator
from operator import itemgetter

from preflight.devices import DEFAULT, DEVICES, Utilisation, device_name
from preflight.gpus import read_machine
from preflight.inputs import Draft
from preflight.memory_fit import SECTIONS, MemoryPlan
from preflight.pools import Pool, pool_of
from preflight.time_plan import SAMPLE, Phase, TimePlan
from video_opd.config import Config
from video_opd.errors import ConfigError

OPTION = f"--device {', '.join(DEVICES)}"
GAIN = 0.02  # a split that saves less is not named
HOUR_S = 3600


def time_plan(memory: MemoryPlan, draft: Draft, device: str | None, use: Utilisation) -> TimePlan | str:
    """The plan, or why there is none. device: a key of DEVICES; None: this machine's GPU, else DEFAULT."""
    config, roles = memory.config, [r for r in memory.roles if r.role in SECTIONS]
    if on_cpu := [r.role for r in roles if not r.device]:
        return f"not planned: {', '.join(on_cpu)} on CPUs"
    if device is None:
        machine = read_machine()
        device = device_name(machine.best.name) if machine.gpus else DEFAULT
        if device is None:
            return f"not planned: {machine.best.name} is not in the table of GPUs; plan for one: {OPTION}"
    train = train_pool(memory, draft)
    held_out = pool_of(draft.eval, memory.evaluation, config, memory.student, memory.teacher)
    kv_caches = {r.role: r.device.held.get("KV cache", math.inf) for r in roles if r.device}
    return TimePlan(config, memory, device, DEVICES[device], use, train, held_out, kv_caches)


def train_pool(memory: MemoryPlan, draft: Draft) -> Pool:
    return pool_of(draft.train, memory.train, memory.config, memory.student, memory.teacher)


def utilisation(shares: list[float] | None) -> Utilisation:
    """Raises ConfigError."""
    if shares is None:
        return Utilisation()
    if not all(0 < share <= 1 for share in shares):
        given = " ".join(f"{share:g}" for share in shares)
        raise ConfigError(f"--utilisation {given}: give three shares, each above 0 and at most 1")
    return Utilisation(*shares)


def faster_split(plan: TimePlan) -> TimePlan | None:
    """The fastest variant of as many GPUs that fits in them, if it saves more than GAIN. Whole GPUs only."""
    limit, known = (1 - GAIN) * plan.run_s, dict[int, bool]()
    for seconds, config in sorted(((plan.of(c).run_s, c) for c in splits(plan)), key=itemgetter(0)):
        if seconds >= limit:
            return None
        ranks = config.learner.world_size  # what actors and replicas need does not depend on their number
        if ranks not in known:
            known[ranks] = _fits(plan.memory, config)
        if known[ranks]:
            return plan.of(config)
    return None


def splits(plan: TimePlan) -> Iterator[Config]:
    """Every way to share the GPUs among the roles that have some."""
    config = plan.config
    learner, rollout, pool = config.learner, config.rollout, config.teacher_pool
    replicas = len(config.teacher_models) * pool.tensor_parallel if plan.memory.teacher else 0
    gpus = learner.world_size + rollout.num_actors * rollout.tensor_parallel + pool.num_replicas * replicas
    for actors in range(1, gpus) if rollout.num_actors else (0,):
        for number in range(1, gpus) if replicas else (pool.num_replicas,):
            ranks = gpus - actors * rollout.tensor_parallel - number * replicas
            if ranks > 0:
                yield with_split(config, actors, number, ranks)


def with_split(config: Config, actors: int, replicas: int, ranks: int) -> Config:
    pool = config.teacher_pool.model_copy(update={"num_replicas": replicas})
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"num_actors": actors}),
            "teacher_pool": pool,
            "learner": config.learner.model_copy(update={"world_size": ranks}),
        }
    )


def _fits(memory: MemoryPlan, config: Config) -> bool:
    roles = [(r.device.peak_bytes, r.gpu_share) for r in memory.of(config) if r.device]
    return all(peak <= share * memory.gpu_bytes for peak, share in roles)


def describe_time(plan: TimePlan | str) -> str:
    """For people: a line a phase, what they come to, and a faster split."""
    if isinstance(plan, str):
        return f"time      {plan}"
    config, use, phases = plan.config, plan.use, plan.phases
    shares = f"{use.prefill:.0%} of its FLOP/s in prefills, {use.training:.0%} in training"
    name = plan.device_name.upper()
    response = f"at most {config.rollout.max_response_tokens} of a response"
    lines = [
        f"time, estimated, of an {name} at {shares}, {use.bandwidth:.0%} of its bandwidth, by --utilisation:",
        f"  prompts      {plan.train.student.tokens:.0f} tokens a prompt{_source(plan)}, {response}",
        *(_describe_phase(phase) for phase in phases.values()),
        f"  step         {_describe_step(plan)}",
        *([f"  passes       {_describe_passes(plan)}"] if plan.passes else []),
        f"  run          {_describe_run(plan)}",
        f"  split        {_describe_split(plan)}",
    ]
    return "\n".join(lines)


def _source(plan: TimePlan) -> str:
    return "" if plan.train.num_prompts else ", as many as the video budget allows"


def _describe_phase(phase: Phase) -> str:
    parts = [f"{name} {s:.2f}" for name, s in phase.terms.items() if s >= 0.005]
    parts += [f"CPUs {phase.feed:.2f} meanwhile"] if phase.feed > 0.1 * phase.unit_s else []
    once = "".join(f", {name} {s:.1f} s" for name, s in phase.once.items() if s >= 0.05)
    many = "s" if phase.num_units > 1 else ""
    who = f"in each of {phase.processes} processes" if phase.processes > 1 else "in one process"
    units = f"{phase.num_units} {phase.unit}{many} of {phase.unit_s:.2f} s {who}"
    units += f" ({', '.join(parts)})" if parts else ""
    return f"  {phase.name:12} {phase.seconds:.1f} s: {units}{once}"


def _describe_step(plan: TimePlan) -> str:
    lag, phases = plan.config.max_policy_lag, plan.phases
    other = 0 if lag else 1
    slowest = max(phases.values(), key=lambda phase: phase.seconds)
    feed = ": its CPUs read and encode too slowly, raise num_cpus" if slowest.waits_for_feed else ""
    turns = ", in which roles take turns on shared GPUs" if plan.config.shares_gpus else ""
    both = f"{plan.step_s:.1f} s at max_policy_lag={lag}{turns}, {plan.at_lag(other).step_s:.1f} at {other}"
    return f"{both}; the slowest phase is {slowest.name}{feed}"


def _describe_passes(plan: TimePlan) -> str:
    told = []
    for of in plan.passes:
        times = f"{of.times} x " if of.times > 1 else ""
        told.append(f"{of.name} {times}{of.seconds / HOUR_S:.2f}")
    of_sample = "" if plan.knows_pools else f" for each {SAMPLE} prompts of a split that is not here"
    return f"hours{of_sample}: {', '.join(told)}"


def _describe_run(plan: TimePlan) -> str:
    told = f"{plan.config.num_steps} steps {plan.steps_s / HOUR_S:.1f} h"
    if not plan.passes:
        return told
    if not plan.knows_pools:
        return f"{told}, and the passes, by the number of prompts"
    return f"{told}, passes {(plan.run_s - plan.steps_s) / HOUR_S:.1f} h: {plan.run_s / HOUR_S:.1f} h"


def _describe_split(plan: TimePlan) -> str:
    if plan.config.shares_gpus:
        return "none is compared, as GPUs are shared"
    best = faster_split(plan)
    if best is None:
        return f"no other one of these GPUs that fits is more than {GAIN:.0%} faster"
    config, both = best.config, f"{best.step_s:.1f} s a step instead of {plan.step_s:.1f}"
    keys = [f"learner.world_size={config.learner.world_size}"]
    keys += [f"rollout.num_actors={config.rollout.num_actors}"] if config.rollout.num_actors else []
    keys += [f"teacher_pool.num_replicas={config.teacher_pool.num_replicas}"] if plan.memory.teacher else []
    if plan.knows_pools:
        both += f", {best.run_s / HOUR_S:.1f} h in all instead of {plan.run_s / HOUR_S:.1f}"
    return f"{' '.join(keys)} would take {both}"
