"""All that can be known of a run before anything starts."""

from dataclasses import dataclass

from video_opd.clips import num_video_tokens
from video_opd.config import Config
from video_opd.datasets import read_prompts
from video_opd.decode_pool import shared_pool
from video_opd.errors import ConfigError
from video_opd.model_files import ModelInfo, check_same_tokenizer, read_model_info
from video_opd.rewards import load_rewards
from video_opd.types import Prompt


@dataclass(frozen=True)
class Plan:
    """The student, and the prompts of both splits."""

    student: ModelInfo
    train: list[Prompt]
    eval: list[Prompt]


def make_plan(config: Config) -> Plan:
    """Checks models, tokenizers, annotations, videos and the curriculum's size. Raises InputError; starts nothing."""
    student = read_model_info(config.student)
    if config.needs_teacher and config.teacher:
        check_teacher(config, student, read_model_info(config.teacher))
    if config.loss.needs.rewards:
        load_rewards(config.loss.rewards)
    train, evaluation = (read_prompts(d, config.video, student.size_multiple) for d in (config.data.train, config.data.eval))
    shared_pool(config.video).close()  # who plans decodes no more
    check_pool(config, train)
    return Plan(student, train, evaluation)


def check_teacher(config: Config, student: ModelInfo, teacher: ModelInfo) -> None:
    """Who may teach whom (ALGORITHM.md section 5). Raises InputError."""
    check_same_tokenizer(config.student, teacher.path)
    if student.size_multiple != teacher.size_multiple:
        raise ConfigError(
            f"student frames come in multiples of {student.size_multiple} pixels, the teacher's of {teacher.size_multiple}: "
            "use a teacher of the same family"
        )
    vocabulary = teacher.shapes["text.vocab_size"]
    if config.loss.needs.teacher == "top_k" and config.loss.top_k > vocabulary:
        raise ConfigError(f"loss.top_k={config.loss.top_k}, but the teacher has {vocabulary} tokens: lower it")


def check_pool(config: Config, train: list[Prompt]) -> None:
    """The training prompts must be enough, and labelled where the curriculum needs the truth. Raises ConfigError."""
    curriculum = config.curriculum
    unlabelled = [p.prompt_id for p in train if not p.answer_spans_s]
    needs = config.loss.needs
    users = [f"curriculum.kind={curriculum.kind}"] if curriculum.kind != "uniform" else []
    users += [f"loss.kind={config.loss.kind}"] if needs.rewards or not needs.rollouts else []
    if users and unlabelled:
        named = ", ".join(unlabelled[:3]) + (", ..." if len(unlabelled) > 3 else "")
        raise ConfigError(
            f"{' and '.join(users)} need ground truth, but {len(unlabelled)} of {len(train)} prompts have none ({named}): "
            "label or remove them"
        )
    selected = curriculum.num_selected if curriculum.kind != "uniform" else None
    if selected and selected > len(train):
        raise ConfigError(f"curriculum.num_selected={selected}, but the pool has {len(train)} prompts: lower it")
    pool, in_flight = selected or len(train), (config.max_policy_lag + 1) * config.groups_per_step
    if pool < in_flight:
        raise ConfigError(
            f"{pool} training prompts cannot fill (max_policy_lag + 1) * groups_per_step = {in_flight} "
            f"slots: {'raise curriculum.num_selected' if selected else 'add data'} or lower groups_per_step"
        )


def describe(config: Config, plan: Plan) -> str:
    """The plan for people: what --dry-run prints."""
    rollouts = config.num_steps * config.groups_per_step * config.rollout.rollouts_per_prompt
    return "\n".join(
        [
            f"student   {config.student} ({plan.student.model_type}), {config.learner.dtype}, ZeRO-{config.learner.zero_stage}, "
            f"{config.learner.world_size} rank(s)",
            f"teacher   {config.teacher}, {config.teacher_pool.num_replicas} replica(s) on {config.teacher_pool.engine}"
            if config.needs_teacher
            else "teacher   none",
            f"actors    {config.rollout.num_actors} on vLLM, {config.rollout.prompts_per_call} prompts a call",
            f"data      {len(plan.train)} train and {len(plan.eval)} eval prompts",
            f"video     {_describe_clips(config, plan)}",
            f"loss      {config.loss.kind}, lr {config.learner.lr:g}",
            f"prompts   {_describe_curriculum(config)}",
            f"run       {config.num_steps} steps of {config.groups_per_step} prompts, {rollouts} rollouts, "
            f"policy lag at most {config.max_policy_lag}",
        ]
    )


def _describe_clips(config: Config, plan: Plan) -> str:
    """Frames, rate and tokens that models see of a clip, next to what was asked for."""
    clips = list({p.clip.clip_id: p.clip for p in plan.train}.values())
    rates = [c.sampled_fps for c in clips]
    tokens = [num_video_tokens(c, plan.student.size_multiple) for c in clips]
    frames = [len(c.frame_indices) for c in clips]
    return (
        f"{len(clips)} train clips by {config.video.decoder}, frames {min(frames)} to {max(frames)}, "
        f"a second {min(rates):.2f} to {max(rates):.2f} (asked {config.video.fps:g}), "
        f"tokens {min(tokens)} to {max(tokens)} (at most {config.video.max_video_tokens}), mean {sum(tokens) / len(tokens):.0f}"
    )


def _describe_curriculum(config: Config) -> str:
    curriculum = config.curriculum
    if curriculum.kind == "uniform":
        return "curriculum uniform: shuffled passes over all"
    selected = curriculum.num_selected or "all that may be"
    if curriculum.kind == "scc":
        return f"curriculum scc: {selected} selected, a share of {curriculum.anchor_frac} Anchors"
    validated = f"teacher IoU at least {curriculum.teacher_threshold}" if curriculum.trpv else "not validated"
    chosen = f"by disagreement ({curriculum.sampler})" if curriculum.dbtp else "at random"
    return f"curriculum tvdf: {validated}, {selected} selected a round {chosen}, {curriculum.passes_per_round} pass(es) each"
