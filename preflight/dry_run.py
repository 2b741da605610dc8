"""`--dry-run`: checks the inputs and prints the plan; starts nothing."""

from collections import Counter
from collections.abc import Iterator

import video_opd  # noqa: F401  # first: makes transformers importable
from preflight.devices import DEVICES
from preflight.disk import describe_disk, disk_plan
from preflight.gpus import read_machine
from preflight.inputs import Draft, asked_teachers, make_draft
from preflight.memory_fit import check_fits, describe_memory, memory_plan
from preflight.nodes import problems
from preflight.object_store import describe_store, store_plan
from preflight.rounds import most_presented
from preflight.sharing import describe_sharing
from preflight.time_fit import describe_time, time_plan, train_pool, utilisation
from video_opd.config import Config
from video_opd.config_teachers import TeacherModel
from video_opd.datasets import Split
from video_opd.hub import without_weights
from video_opd.video.clips import num_video_tokens


def dry_run(
    config: Config,
    gpu_memory_gib: float | None,
    device: str | None = None,
    shares: list[float] | None = None,
) -> None:
    """Checks what is here, and prints the plan, its memory and its seconds. Raises InputError.

    device, shares: the GPU and what is reached of it (preflight/devices.py).
    Writes nothing but what videos hold (video_opd/video/descriptions.py)."""
    use, (local, missing) = utilisation(shares), without_weights(config)
    for note in missing:
        print(f"NOT CHECKED  {note}")
    draft = make_draft(local)
    if device and gpu_memory_gib is None:
        gpu_memory_gib = DEVICES[device].memory_gib
    memory = memory_plan(local, draft, gpu_memory_gib)
    print(describe(config, draft))
    print(describe_memory(memory))
    print(describe_sharing(config, train_pool(memory, draft)))
    print(describe_time(time_plan(memory, draft, device, use)))
    print(describe_store(store_plan(memory)))
    print(describe_disk(disk_plan(config, memory.student, draft, None)))
    machine = read_machine()
    for problem in problems(machine, memory) if machine.gpus and memory.on_gpu else ():
        print(f"WARNING   this machine cannot run it: {problem}")
    check_fits(memory, one_machine=True)


def describe(config: Config, draft: Draft) -> str:
    """The plan for people."""
    learner, rollout = config.learner, config.rollout
    prompts = most_presented(config)
    at_most = "at most " if prompts < config.num_steps * config.groups_per_step else ""
    rollouts = f"{prompts * rollout.rollouts_per_prompt} rollouts"
    student = f"{config.student} ({draft.student.model_type}), {learner.dtype}, ZeRO-{learner.zero_stage}"
    steps = f"{config.num_steps} steps of {at_most}{config.groups_per_step} prompts, {rollouts}"
    splits = {"train": draft.train, "eval": draft.eval}
    data = [_describe_split(name, split, draft.longest.get(name)) for name, split in splits.items()]
    teachers = [_describe_teacher(config, teacher) for teacher in asked_teachers(config)]
    lines = [
        *(f"NOT CHECKED  {note}" for note in draft.unchecked),
        *(f"WARNING   {warning}" for warning in config.warnings()),
        f"student   {student}, {learner.world_size} rank(s)",
        *(teachers or ["teacher   none"]),
        f"actors    {rollout.num_actors} on vLLM, {rollout.prompts_per_call} prompts a call",
        f"data      {'; '.join(data)}",
        *_describe_sources(config, draft.train),
        f"video     {_describe_clips(config, draft)}",
        f"loss      {config.loss.kind}, lr {learner.lr:g}",
        f"prompts   curriculum {_describe_curriculum(config)}",
        f"run       {steps}, policy lag at most {config.max_policy_lag}",
    ]
    return "\n".join(lines)


def _describe_split(name: str, split: Split | None, longest: int | None) -> str:
    if split is None:
        return f"{name} NOT checked"
    failed = f", {len(split.failed)} of them cannot be used" if split.failed else ""
    return f"{len(split)} {name} prompts{failed}" + (f", the longest of {longest} tokens" if longest else "")


def _describe_sources(config: Config, train: Split | None) -> Iterator[str]:
    """One line if data.train has several sources: their prompts and shares."""
    sources, weights = config.data.sources, config.data.weights
    if train is None or "" in sources:
        return
    sizes = Counter(p.source for p in train.prompts)
    parts = weights or sizes
    told = [
        f"{name}: {sizes[name]} prompts, {parts[name] / sum(parts.values()):.1%} of those drawn"
        + (f", asked as {style}" if (style := config.data.styles[name]) else "")
        for name in sources
    ]
    yield f"sources   {'; '.join(told)}"


def _describe_teacher(config: Config, teacher: TeacherModel) -> str:
    pool = config.teacher_pool
    line = f"teacher   {teacher.model}, {pool.num_replicas} replica(s) on {config.teacher_engine}"
    if pool.max_replicas:
        line += f", {pool.min_replicas or 1} to {pool.max_replicas} as calls queue"
    if config.teachers:
        line += f"; {teacher.name}, weight {teacher.weight:g}, prompts {teacher.prompts or 'all'}"
    if teacher.has_view:
        own = [f"{k}={v}" for k, v in (teacher.prompt | teacher.video).items()]
        own += [] if teacher.crop_margin_frac is None else [f"crop_margin_frac={teacher.crop_margin_frac:g}"]
        line += f"; sees {', '.join(own)}"
    return line


def _describe_clips(config: Config, draft: Draft) -> str:
    """Frames, rate and tokens of the clips that models see, and what the config asked for."""
    video = config.video
    limit = f"at most {video.max_video_tokens} tokens"
    asked = f"asked {video.fps:g} frames a second, {limit}, by {video.decoder}"
    if draft.train is None:
        return asked
    clips = list({p.clip.clip_id: p.clip for p in draft.train.prompts}.values())
    rates = [c.sampled_fps for c in clips]
    tokens = [num_video_tokens(c, draft.student.size_multiple) for c in clips]
    frames = [len(c.frame_indices) for c in clips]
    return (
        f"{len(clips)} train clips: frames {min(frames)} to {max(frames)}, "
        f"a second {min(rates):.2f} to {max(rates):.2f}, "
        f"tokens {min(tokens)} to {max(tokens)}, mean {sum(tokens) / len(tokens):.0f}; {asked}"
    )


def _describe_curriculum(config: Config) -> str:
    selection, scc = _describe_selection(config), config.curriculum.scc
    if not config.curriculum.suspends:
        return selection
    return f"{selection}; rollouts of IoU {scc.suspend_iou} or more are suspended"


def _describe_selection(config: Config) -> str:
    curriculum = config.curriculum
    if curriculum.kind == "uniform":
        return "uniform: shuffled passes over all"
    selected = f"{curriculum.num_selected or 'all that may be'} selected"
    if curriculum.pool_sample:
        selected += f" of {curriculum.pool_sample} asked"
    if curriculum.kind == "scc":
        steps = ", presented once, fewer and fewer a step" if curriculum.schedules else ""
        return f"scc: {selected}, a share of {curriculum.scc.anchor_frac} Anchors{steps}"
    if curriculum.kind == "difficulty":
        mean, std = curriculum.difficulty_mean, curriculum.difficulty_std
        return f"difficulty: {selected}, drawn around a student IoU of {mean} +- {std}"
    validated = f"teacher IoU at least {curriculum.teacher_threshold}" if curriculum.trpv else "not validated"
    how = f"by disagreement ({curriculum.disagreement}, {curriculum.sampler})"
    chosen = how if curriculum.dbtp else "at random"
    return f"tvdf: {validated}, {selected} a round {chosen}, {curriculum.passes_per_round} pass(es) each"
