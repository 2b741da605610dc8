"""Checks models, data and configuration before anything starts."""

from dataclasses import dataclass
from pathlib import Path

from preflight.model_shapes import ModelShapes, count, find_shapes, parameters, read_shapes
from video_opd import ROOT
from video_opd.config import Config, TeacherModel
from video_opd.datasets import read_prompts, read_split
from video_opd.errors import ConfigError
from video_opd.models.model_files import ModelInfo, check_same_tokenizer, read_model_info
from video_opd.rewards import load_rewards
from video_opd.types import Prompt
from video_opd.video.decode_pool import shared_pool

SHAPES = ROOT / "configs" / "shapes"  # the fields that matter of published models' config.json


@dataclass(frozen=True)
class Plan:
    """The student, and the prompts of both splits."""

    student: ModelInfo
    train: list[Prompt]
    eval: list[Prompt]
    unreadable: dict[str, str]  # training prompt id: why its clip cannot be read


@dataclass(frozen=True)
class Draft:
    """The plan of --dry-run, which needs neither models nor data."""

    student: ModelShapes
    teacher: ModelShapes | None  # the largest of several
    train: list[Prompt] | None  # None: the split is not here
    eval: list[Prompt] | None
    unchecked: tuple[str, ...]  # what a launch checks and this could not


def make_plan(config: Config) -> Plan:
    """Checks models, tokenizers, annotations, videos and the curriculum's size. Raises InputError."""
    student = read_model_info(config.student, config.trust_remote_code)
    for teacher in asked_teachers(config):
        read_model_info(teacher.model, config.trust_remote_code)
        check_same_tokenizer(config.student, teacher.model)
        check_teacher(config, read_shapes(config.student), read_shapes(teacher.model))
    if config.loss.needs.rewards:
        load_rewards(config.loss.rewards)
    train = read_split(config.data.train, config.video, student.size_multiple)
    evaluation = read_split(config.data.eval, config.video, student.size_multiple, as_published=True)
    shared_pool(config.video).close()  # the driver decodes no more
    check_pool(config, train.prompts)
    check_routes(config, train.prompts, evaluation.prompts)
    return Plan(student, train.prompts, evaluation.prompts, train.unreadable)


def make_draft(config: Config) -> Draft:
    """Makes the checks of make_plan for models and data that are here; other models get the committed shapes.

    Raises InputError for what is here and wrong, and for an absent model without committed shapes."""
    student = find_shapes(config.student, SHAPES)
    teachers = {t.model: find_shapes(t.model, SHAPES) for t in asked_teachers(config)}
    unchecked = _unchecked_model("student", Path(config.student), student)
    for folder, shapes in teachers.items():
        check_teacher(config, student, shapes)
        unchecked += _unchecked_model("teacher", Path(folder), shapes)
    if all((Path(folder) / "tokenizer.json").is_file() for folder in (config.student, *teachers)):
        for folder in teachers:
            check_same_tokenizer(config.student, folder)
    elif teachers:
        unchecked.append("tokenizers: a tokenizer.json is missing, so they were not compared")
    if config.loss.needs.rewards:
        load_rewards(config.loss.rewards)
    splits: list[list[Prompt] | None] = []
    for name, d in (("train", config.data.train), ("eval", config.data.eval)):
        # If only some of its files exist, reading reports the missing one.
        here = any(Path(path).exists() for path in (d.annotations, d.lengths, d.videos) if path)
        as_published = d is config.data.eval
        splits.append(read_prompts(d, config.video, student.size_multiple, as_published) if here else None)
        if not here:
            unchecked.append(f"annotations and videos of data.{name}: {d.annotations} does not exist")
    if splits[0] is not None:
        check_pool(config, splits[0])
    check_routes(config, *(split or [] for split in splits))
    return Draft(student, largest_teacher(list(teachers.values())), *splits, unchecked=tuple(unchecked))


def asked_teachers(config: Config) -> tuple[TeacherModel, ...]:
    """The teachers that the run asks; none if neither objective nor curriculum needs one."""
    return config.teacher_models if config.needs_teacher else ()


def largest_teacher(teachers: list[ModelShapes]) -> ModelShapes | None:
    """The one that memory is planned for; None without teachers."""
    return max(teachers, key=lambda shapes: count(parameters(shapes)), default=None)


def _unchecked_model(role: str, folder: Path, shapes: ModelShapes) -> list[str]:
    if shapes.committed:
        copy = f"its shapes are the committed copy, configs/shapes/{shapes.name}.json"
        return [f"{role}: {folder} does not exist; {copy}"]
    return [] if list(folder.glob("*.safetensors")) else [f"{role}'s weights: {folder} has no safetensors"]


def check_teacher(config: Config, student: ModelShapes, teacher: ModelShapes) -> None:
    """Frames must be of one size and top_k within the vocabulary (docs/algorithm.md). Raises ConfigError."""
    if (own := student.size_multiple) != (others := teacher.size_multiple):
        sizes = f"student frames come in multiples of {own} pixels, the teacher's of {others}"
        raise ConfigError(f"{sizes}: use a teacher of the same family")
    top_k, vocabulary = config.loss.top_k, teacher.text.vocab_size
    if config.loss.needs.teacher == "top_k" and top_k > vocabulary:
        raise ConfigError(f"loss.top_k={top_k}, but the teacher has {vocabulary} tokens: lower it")


def check_pool(config: Config, train: list[Prompt]) -> None:
    """The training prompts must be enough, and labelled if ground truth is needed. Raises ConfigError."""
    curriculum, needs = config.curriculum, config.loss.needs
    unlabelled = [p.prompt_id for p in train if not p.answer_spans_s]
    users = [f"curriculum.kind={curriculum.kind}"] if curriculum.kind != "uniform" else []
    users += [f"loss.kind={config.loss.kind}"] if needs.rewards or not needs.rollouts else []
    if users and unlabelled:
        named = ", ".join(unlabelled[:3]) + (", ..." if len(unlabelled) > 3 else "")
        missing = f"{len(unlabelled)} of {len(train)} prompts have none ({named})"
        raise ConfigError(f"{' and '.join(users)} need ground truth, but {missing}: label or remove them")
    selected = curriculum.num_selected if curriculum.kind != "uniform" else None
    if selected and selected > len(train):
        raise ConfigError(f"curriculum.num_selected={selected} of {len(train)} training prompts: lower it")
    pool, in_flight = selected or len(train), (config.max_policy_lag + 1) * config.groups_per_step
    if pool < in_flight:
        remedy = "raise curriculum.num_selected" if selected else "add data"
        slots = f"(max_policy_lag + 1) * groups_per_step = {in_flight} slots"
        raise ConfigError(f"{pool} training prompts cannot fill {slots}: {remedy} or lower groups_per_step")


def check_routes(config: Config, train: list[Prompt], evaluation: list[Prompt]) -> None:
    """Every prompt must have a teacher, and only one if more than log-probs is needed. Raises ConfigError."""
    if not asked_teachers(config):
        return
    for prompt in (*train, *evaluation):
        if not config.teachers_of(prompt.prompt_id):
            patterns = ", ".join(f"{t.name}: {t.prompts}" for t in config.teacher_models)
            raise ConfigError(f"prompt {prompt.prompt_id} has no teacher ({patterns}): widen a pattern")
    for prompt in train if config.loss.needs.teacher in ("top_k", "hidden") else ():
        if len(own := config.teachers_of(prompt.prompt_id)) > 1:
            has = f"prompt {prompt.prompt_id} has the teachers {', '.join(t.name for t in own)}"
            why = f"loss.kind={config.loss.kind} needs more than log-probs, which alone can be combined"
            raise ConfigError(f"{has}, but {why}: give each prompt one, by teachers' prompts")
