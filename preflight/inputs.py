"""Checks models, data and configuration before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preflight.adapters import check_targets
from preflight.memory import Workload
from preflight.model_shapes import ModelShapes, can_shard, find_shapes, model_bytes, read_shapes
from preflight.options import check_options
from preflight.views import check_crop, view_of
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_teachers import TeacherModel, weights_problem
from video_opd.datasets import Split, read_sources, read_split
from video_opd.errors import ConfigError, DataError
from video_opd.logs import log
from video_opd.models.lengths import Limit, PromptLengths, limits, teacher_limits, too_long
from video_opd.models.model_files import ModelInfo, check_same_tokenizer, read_model_info
from video_opd.rewards import load_rewards
from video_opd.types import Prompt
from video_opd.video.decode_pool import deadline_of_file_s
from video_opd.video.descriptions import end_workers

SHAPES = ROOT / "configs" / "shapes"  # the fields that matter of published models' config.json


@dataclass(frozen=True)
class Plan:
    """The student, and both splits."""

    student: ModelInfo
    train: Split
    eval: Split
    longest: Mapping[str, int]  # tokens of the longest prompt, by "train" and "eval"
    views: tuple[Workload, ...] = ()  # of teachers that see more than the student


@dataclass(frozen=True)
class Draft:
    """The plan of --dry-run, which needs neither models nor data."""

    student: ModelShapes
    teacher: ModelShapes | None  # the largest of several
    train: Split | None  # None: the split is not here
    eval: Split | None
    longest: Mapping[str, int]  # as Plan's; empty: there is no split or no tokenizer
    unchecked: tuple[str, ...]  # what a launch checks and this could not
    views: tuple[Workload, ...] = ()  # as Plan's


def make_plan(config: Config, resumes: bool = False) -> Plan:
    """Checks models, tokenizers, annotations, videos, lengths and the curriculum's size. Raises InputError.

    resumes: a video that cannot be read is no error. In training its prompts are dropped from now on, in
    evaluations they count as IoU 0.
    """
    student = read_model_info(config.student, config.trust_remote_code)
    shapes = read_shapes(config.student)
    for teacher in asked_teachers(config):
        read_model_info(teacher.model, config.trust_remote_code)
        check_same_tokenizer(config.student, teacher.model)
        check_teacher(config, shapes, read_shapes(teacher.model))
    check_student(config, shapes)
    check_options(config)
    if config.loss.needs.rewards:
        load_rewards(config.loss.rewards)
    splits = {name: _read(config, name, student.size_multiple, resumes) for name in ("train", "eval")}
    end_workers(config.video)
    lengths = PromptLengths(config.student, student.model_type, student.size_multiple, config.prompt)
    longest = {}
    for name, split in splits.items():
        splits[name], longest[name] = fit_lengths(config, name, split, lengths)
    views = check_views(config, splits, {t.model: read_shapes(t.model) for t in asked_teachers(config)})
    train, evaluation = splits["train"], splits["eval"]
    check_pool(config, train, resumes)
    check_source_weights(config, train.prompts)
    check_routes(config, train.prompts, evaluation.prompts)
    return Plan(student, train, evaluation, longest, views)


def _read(config: Config, name: str, multiple: int, resumes: bool = False) -> Split:
    """data.train, or data.eval, whose true intervals are as published. Raises InputError."""
    video, runs_dir, held_out = config.video, config.runs_dir, config.data.eval
    if name == "train":
        split = read_sources(config.data, video, multiple, runs_dir, drops=resumes)
    else:
        dataset = held_out.model_copy(update={"unreadable": "drop"}) if resumes else held_out
        split = read_split(dataset, video, multiple, as_published=True, runs_dir=runs_dir)
    check_decoding(config, split.prompts)
    if split.failed:
        first, reason = next(iter(split.failed.items()))
        counts = "dropped" if name == "train" else "IoU 0"
        found = f"data.{name}: {len(split.failed)} of {len(split)} prompts are {counts}"
        log.warning("%s, first %s: %s", found, first, reason)
    return split


def check_decoding(config: Config, prompts: Sequence[Prompt]) -> None:
    """A clip must fail before the call that wants it, or a process counts as lost. Raises ConfigError."""
    for prompt in prompts:
        clip, timeout_s = prompt.clip, config.video.decode_timeout_s
        clip_s = deadline_of_file_s(timeout_s, clip.video_path, clip.decode_megapixels)
        if clip_s >= config.request_timeout_s:
            bound = f"its clip may take {clip_s:.0f} s to decode (video.decode_timeout_s)"
            remedy = f"raise request_timeout_s={config.request_timeout_s:g} well above it, or cut the video"
            raise ConfigError(f"prompt {prompt.prompt_id}: {bound}: {remedy}")


def fit_lengths(config: Config, name: str, split: Split, lengths: PromptLengths) -> tuple[Split, int]:
    """The split without prompts that are too long, and the tokens of the longest that is left.

    Raises DataError for such a prompt, unless too_long=drop and others are left."""
    of_prompts = lengths.of(split.prompts)
    bounds = limits(config, trained=name == "train")
    short = without_long(config, name, split, split.prompts, of_prompts, bounds)
    left = {p.prompt_id for p in short.prompts}
    pairs = zip(split.prompts, of_prompts, strict=True)
    return short, max(n for p, n in pairs if p.prompt_id in left)


def check_views(
    config: Config, splits: dict[str, Split], shapes: Mapping[str, ModelShapes]
) -> tuple[Workload, ...]:
    """Checks what teachers with a view of their own see; the work of each view.

    Removes prompts that are too long for it from the splits. shapes: of each teacher's folder. They score
    the training split, cropped, and answer the held-out one, and with TRPV the other, uncropped.
    Raises DataError and ConfigError."""
    works = []
    for teacher in (t for t in asked_teachers(config) if t.has_view):
        own = shapes[teacher.model]
        check_crop(teacher, own, splits["train"].prompts if "train" in splits else [])
        asked = [("train", True)] + [("train", False)] * config.curriculum.asks_teacher + [("eval", False)]
        for name, is_cropped in asked:
            if name not in splits or not (view := view_of(config, teacher, own, splits[name], is_cropped)):
                continue
            check_decoding(config, view.prompts)
            bounds = teacher_limits(config)
            splits[name] = without_long(config, name, splits[name], view.prompts, view.lengths, bounds)
            works.append(view.work)
    return tuple(works)


def without_long(
    config: Config,
    name: str,
    split: Split,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    bounds: Sequence[Limit],
) -> Split:
    """The split without those of its `prompts`, of so many tokens, that exceed a bound. As fit_lengths."""
    failed = too_long(prompts, lengths, bounds)
    sources = config.data.sources if name == "train" else {"": config.data.eval}
    of_source = {p.prompt_id: sources[p.source].too_long for p in split.prompts if p.prompt_id in failed}
    refused = [prompt_id for prompt_id, choice in of_source.items() if choice == "error"]
    if refused or (failed and len(failed) == len(split.prompts)):
        first = (refused or list(failed))[0]
        may_drop = name == "train" and refused
        drop = f"; data.{name}.too_long=drop leaves them out" if may_drop else ""
        raise DataError(f"prompt {first}: {failed[first]} ({len(failed)} such prompts in data.{name}{drop})")
    if failed:
        log.warning("data.%s: %d of %d prompts are too long and dropped", name, len(failed), len(split))
    return split.without(failed)


def make_draft(config: Config) -> Draft:
    """Makes the checks of make_plan for models and data that are here; other models get the committed shapes.

    Raises InputError for what is here and wrong, and for an absent model without committed shapes."""
    student = find_shapes(config.student, SHAPES)
    teachers = {t.model: find_shapes(t.model, SHAPES) for t in asked_teachers(config)}
    check_student(config, student)
    unchecked = _unchecked_model("student", Path(config.student), student)
    for folder, shapes in teachers.items():
        check_teacher(config, student, shapes)
        unchecked += _unchecked_model("teacher", Path(folder), shapes)
    if all((Path(folder) / "tokenizer.json").is_file() for folder in (config.student, *teachers)):
        for folder in teachers:
            check_same_tokenizer(config.student, folder)
    elif teachers:
        unchecked.append("tokenizers: a tokenizer.json is missing, so they were not compared")
    unchecked += check_options(config)
    if config.loss.needs.rewards:
        load_rewards(config.loss.rewards)
    lengths = None
    if Path(config.student, "tokenizer.json").is_file():
        lengths = PromptLengths(config.student, student.model_type, student.size_multiple, config.prompt)
    else:
        unchecked.append("lengths of prompts: the student's tokenizer.json is missing, so they are estimated")
    splits: dict[str, Split] = {}
    longest = {}
    for name, sources in (("train", [*config.data.sources.values()]), ("eval", [config.data.eval])):
        # If only some of its files exist, reading reports the missing one.
        if not any(Path(p).exists() for d in sources for p in (d.annotations, d.lengths, d.videos) if p):
            absent = ", ".join(d.annotations for d in sources)
            unchecked.append(f"annotations and videos of data.{name}: {absent} does not exist")
            continue
        splits[name] = _read(config, name, student.size_multiple)
        if lengths:
            splits[name], longest[name] = fit_lengths(config, name, splits[name], lengths)
    views: tuple[Workload, ...] = ()
    if all((Path(folder) / "tokenizer.json").is_file() for folder in teachers):
        views = check_views(config, splits, teachers)
    train, evaluation = splits.get("train"), splits.get("eval")
    if train:
        check_pool(config, train)
        check_source_weights(config, train.prompts)
    check_routes(config, *(split.prompts if split else [] for split in (train, evaluation)))
    largest = largest_teacher(list(teachers.values()))
    return Draft(student, largest, train, evaluation, longest, tuple(unchecked), views)


def asked_teachers(config: Config) -> tuple[TeacherModel, ...]:
    """The teachers that the run asks; none if neither objective nor curriculum needs one."""
    return config.teacher_models if config.needs_teacher else ()


def largest_teacher(teachers: list[ModelShapes]) -> ModelShapes | None:
    """The one that memory is planned for; None without teachers."""
    return max(teachers, key=lambda shapes: model_bytes(shapes, 2), default=None)


def _unchecked_model(role: str, folder: Path, shapes: ModelShapes) -> list[str]:
    if shapes.committed:
        copy = f"its shapes are the committed copy, configs/shapes/{shapes.name}.json"
        return [f"{role}: {folder} does not exist; {copy}"]
    return [] if list(folder.glob("*.safetensors")) else [f"{role}'s weights: {folder} has no safetensors"]


def check_student(config: Config, student: ModelShapes) -> None:
    """The learner trains it, its adapters have targets, actors hold it in shards. Raises ConfigError."""
    if student.fp8:
        raise ConfigError(f"student {student.name} is in FP8, which cannot be trained: use it in bfloat16")
    check_targets(config, student)
    check_shards("rollout", config.rollout.tensor_parallel, student)


def check_teacher(config: Config, student: ModelShapes, teacher: ModelShapes) -> None:
    """Frames must be of one size, top_k within the vocabulary, shards whole, FP8 in vLLM.

    Raises ConfigError."""
    pool = config.teacher_pool
    check_shards("teacher_pool", pool.tensor_parallel, teacher)
    if teacher.fp8 and not pool.num_gpus:
        raise ConfigError(f"teacher {teacher.name} is in FP8, which needs GPUs: use it in bfloat16")
    if teacher.fp8 and (config.teacher_engine, pool.dtype) != ("vllm", "bfloat16"):
        how = "set teacher_pool.engine=vllm and teacher_pool.dtype=bfloat16"
        raise ConfigError(f"teacher {teacher.name} is in FP8: {how}")
    if (own := student.size_multiple) != (others := teacher.size_multiple):
        sizes = f"student frames come in multiples of {own} pixels, the teacher's of {others}"
        raise ConfigError(f"{sizes}: use a teacher of the same family")
    top_k, vocabulary = config.loss.top_k, teacher.text.vocab_size
    if config.loss.needs.teacher == "top_k" and top_k > vocabulary:
        raise ConfigError(f"loss.top_k={top_k}, but the teacher has {vocabulary} tokens: lower it")
    if config.loss.student_top_k and (own := student.text.vocab_size) > vocabulary:
        embeddings = f"{own} embeddings of the student, and {vocabulary} of the teacher"
        raise ConfigError(f"loss.top_k_of=student with {embeddings}, which cannot score all: use teacher")


def check_shards(section: str, shards: int, shapes: ModelShapes) -> None:
    """Raises ConfigError if vLLM cannot divide the model into so many shards."""
    if can_shard(shapes, shards):
        return
    text, vision = shapes.text, shapes.vision
    possible = ", ".join(str(n) for n in range(1, text.heads + 1) if can_shard(shapes, n))
    heads = f"{text.heads} heads, {text.key_heads} key heads, {vision.heads} vision heads"
    has = f"{heads} and MLPs of {text.intermediate} and {vision.intermediate}"
    has += f", in FP8 blocks of {shapes.fp8.block}" if shapes.fp8 and shapes.fp8.block else ""
    cannot = f"{section}.tensor_parallel={shards} does not divide {shapes.name} ({has})"
    raise ConfigError(f"{cannot}: use one of {possible}")


def check_pool(config: Config, split: Split, resumes: bool = False) -> None:
    """The training prompts must be enough, and labelled if ground truth is needed. Raises ConfigError."""
    curriculum, needs, train = config.curriculum, config.loss.needs, split.prompts
    unlabelled = [p.prompt_id for p in train if not p.answer_spans_s]
    users = [f"curriculum.kind={curriculum.kind}"] if curriculum.kind != "uniform" else []
    users += ["curriculum.scc.gate"] if curriculum.suspends and not users else []
    loss = config.loss
    users += ["loss.task_weight"] if loss.task_weight else []
    users += ["loss.on_policy_frac"] if loss.on_policy_frac < 1 else []
    users += [f"loss.kind={loss.kind}"] if loss.kind == "grpo" or not needs.rollouts else []
    if users and unlabelled:
        named = ", ".join(unlabelled[:3]) + (", ..." if len(unlabelled) > 3 else "")
        missing = f"{len(unlabelled)} of {len(train)} prompts have none ({named})"
        raise ConfigError(f"{' and '.join(users)} need ground truth, but {missing}: label or remove them")
    selected = curriculum.num_selected if curriculum.kind != "uniform" else None
    if selected and selected > len(train) and not resumes:  # later rounds select among those that are left
        raise ConfigError(f"curriculum.num_selected={selected} of {len(train)} training prompts: lower it")
    sample = curriculum.pool_sample if curriculum.kind != "uniform" else None
    pool = min(selected or len(train), sample or len(train), len(train))
    if room := config.schedule_room:
        if pool < room.num_steps and not resumes:
            steps, how = f"{room.num_steps} steps of SCC's schedule", "lower num_steps, add data"
            raise ConfigError(f"{pool} training prompts for the {steps}: {how}, or set scc.schedule=false")
    elif pool < config.num_slots:
        remedy = "raise curriculum.num_selected" if selected else "add data"
        remedy = "raise curriculum.pool_sample" if pool == sample else remedy
        slots = f"(max_policy_lag + 1) * groups_per_step = {config.num_slots} slots"
        raise ConfigError(f"{pool} training prompts cannot fill {slots}: {remedy} or lower groups_per_step")


def check_source_weights(config: Config, prompts: Sequence[Prompt]) -> None:
    """A source must have the prompts that are in flight of it at one time. Raises ConfigError."""
    weights, slots = config.data.weights, config.num_slots
    for name, weight in weights.items():
        share, number = weight / sum(weights.values()), sum(p.source == name for p in prompts)
        if number < share * slots:
            has = f"source {name} of data.train has {number} prompts for a share of {share:.0%}"
            raise ConfigError(f"{has} of {slots} in flight: lower its weight or groups_per_step, or add data")


def check_routes(config: Config, train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> None:
    """Every prompt must have a teacher, and only one if more than log-probs is needed. Raises ConfigError."""
    teachers = asked_teachers(config)
    if not teachers:
        return
    for prompt in (*train, *evaluation):
        if not any(t.scores(prompt.prompt_id) for t in teachers):
            patterns = ", ".join(f"{t.name}: {t.prompts}" for t in teachers)
            raise ConfigError(f"prompt {prompt.prompt_id} has no teacher ({patterns}): widen a pattern")
    check_teacher_weights(config.teachers, train)
    for prompt in train if config.loss.needs.teacher in ("top_k", "hidden") else ():
        if len(own := [t for t in teachers if t.scores(prompt.prompt_id)]) > 1:
            has = f"prompt {prompt.prompt_id} has the teachers {', '.join(t.name for t in own)}"
            why = f"loss.kind={config.loss.kind} needs more than log-probs, which alone can be combined"
            raise ConfigError(f"{has}, but {why}: give each prompt one, by teachers' prompts")


def check_teacher_weights(teachers: Sequence[TeacherModel], train: Sequence[Prompt]) -> None:
    """The weights of each prompt's teachers must fit together, and each must count. Raises ConfigError."""
    together: set[str] = set()
    for prompt in train if teachers else ():
        own = [t for t in teachers if t.scores(prompt.prompt_id)]
        if problem := weights_problem(own):
            raise ConfigError(f"prompt {prompt.prompt_id}: {problem}")
        together |= {t.name for t in own} if len(own) > 1 else set()
    alone = [t for t in teachers if t.weight != 1 and t.name not in together]
    if train and alone:
        does = f"weight={alone[0].weight:g} of teacher {alone[0].name} does nothing"
        raise ConfigError(f"{does}: it shares no training prompt with another; leave the weight out")
