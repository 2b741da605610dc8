"""The learner's part of the configuration: the objective, and how it is computed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from video_opd import config_deepspeed
from video_opd.config_data import (
    ATTENTION,
    Attention,
    ConfigSection,
    Dtype,
    Fraction,
    NegativeFloat,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    RegularExpression,
    attention_problem,
    key,
)

LossKind = Literal["opd", "opd_topk", "opd_full", "grpo", "off_policy_rkd", "off_policy_fkd", "sft"]
Reduction = Literal["token_mean", "sequence", "sum"]
ImportPaths = Annotated[tuple[str, ...], Field(min_length=1)]
TEXT_LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's max_lora_rank: vllm/config/lora.py
WeightTransfer = Literal["object_store", "collective", "ipc"]
TRANSFERS = "Ray's object store, NCCL between GPUs, or one GPU's memory; auto: as docs/architecture.md says"


@dataclass(frozen=True)
class Objective:
    """The inputs that an objective of learner/loss.py needs."""

    rollouts: bool  # the student's responses; False: the ground truth, written as an answer
    teacher: Literal["none", "logprobs", "top_k", "hidden"]  # of response tokens; each includes the former
    rewards: bool = False  # one per response


OBJECTIVES: dict[LossKind, Objective] = {
    "opd": Objective(rollouts=True, teacher="logprobs"),
    "opd_topk": Objective(rollouts=True, teacher="top_k"),
    "opd_full": Objective(rollouts=True, teacher="hidden"),
    "grpo": Objective(rollouts=True, teacher="none", rewards=True),
    "off_policy_rkd": Objective(rollouts=False, teacher="logprobs"),
    "off_policy_fkd": Objective(rollouts=False, teacher="hidden"),
    "sft": Objective(rollouts=False, teacher="none"),
}


ON_POLICY = "opd, opd_topk, opd_full"


class LossConfig(ConfigSection):
    """The objective: docs/algorithm.md and learner/loss.py."""

    kind: LossKind = key("opd", "on-policy distillation, or one of its baselines; see docs/algorithm.md")
    top_k: PositiveInt = key(64, "opd_topk: tokens compared at each position")
    top_k_of: Literal["teacher", "student"] = key("teacher", "opd_topk: whose likeliest tokens these are")
    center: Literal["none", "batch"] = key("none", "opd: subtract the batch mean from the signal r")
    clamp: PositiveFloat | None = key(None, "opd, opd_topk, off_policy_rkd: bound of |log-ratio|")
    max_ratio: PositiveFloat | None = key(
        None, "opd, task_weight: truncate importance ratios; None: no bound"
    )
    divergence: Literal["reverse", "forward", "jsd"] = key(
        "reverse", "opd_topk, opd_full: KL(student || teacher), KL(teacher || student), Jensen-Shannon"
    )
    beta: OpenFraction = key(0.5, "divergence=jsd: weight of the teacher")
    forward_kl_entropy: PositiveFloat | None = key(
        None, "opd_topk, opd_full: forward KL where the teacher's entropy is at least this, in nats"
    )
    clip: OpenFraction = key(0.2, "grpo: importance ratios count within 1 +- clip")
    kl_coef: NonNegativeFloat = key(0.0, "grpo: weight of the KL to a reference, the model `teacher`")
    advantage_std: bool = key(True, "grpo, task_weight: divide a group's advantages by their std")
    rewards: ImportPaths = key(
        ("video_opd.rewards:iou",), "grpo, task_weight: import paths of reward functions; summed"
    )
    distill_weight: NonNegativeFloat = key(1.0, f"{ON_POLICY}: weight of the teacher's signal or divergence")
    task_weight: NonNegativeFloat = key(0.0, f"{ON_POLICY}: weight of the rewards' advantage beside it")
    baseline_decay: Fraction = key(
        0.9, "task_weight, one rollout a prompt: decay of the mean reward, a baseline"
    )
    task_gate: Fraction | None = key(
        None, "task_weight: from this IoU on, a rollout has no signal of the teacher"
    )
    fixed_advantage: NegativeFloat | None = key(
        None, "opd: the same for all tokens, without a teacher; a control"
    )
    on_policy_frac: PositiveFraction = key(
        1.0, f"{ON_POLICY}: share of prompts with rollouts; the others train on the ground truth"
    )
    visual_weight: OpenFraction | None = key(
        None, "opd, opd_topk, opd_full: share of the loss of the tokens for which the teacher needs the video"
    )
    visual_frac: OpenFraction = key(0.2, "visual_weight: these tokens' share of a response")
    reduction: Reduction = key("token_mean", "the summed loss is divided by tokens, sequences (eq. 6), or 1")

    @property
    def needs(self) -> Objective:
        needs = OBJECTIVES[self.kind]
        if self.kl_coef:
            needs = replace(needs, teacher="logprobs")
        if self.fixed_advantage is not None or not self.distill_weight:
            needs = replace(needs, teacher="none")
        return replace(needs, rewards=True) if self.task_weight else needs

    def _changed(self, *names: str) -> list[str]:
        """Those of the keys that are not at their defaults."""
        return [n for n in names if getattr(self, n) != type(self).model_fields[n].default]

    @property
    def student_top_k(self) -> int:
        """Of how many of its likeliest tokens the student tells the ids when it samples."""
        return self.top_k if self.top_k_of == "student" else 0

    def problems(self) -> Iterator[str]:
        yield from self._signal_problems()
        yield from self._problems_of_divergence()
        if self.kind != "grpo" and self.kl_coef:
            yield f"kl_coef does nothing for kind={self.kind}: it is an option of grpo"
        if self.kind != "opd" and (self.center != "none" or (self.max_ratio and not self.task_weight)):
            yield f"center and max_ratio do nothing for kind={self.kind}: they are options of opd"
        if self.kind not in ("opd", "opd_topk", "off_policy_rkd") and self.clamp is not None:
            yield f"clamp does nothing for kind={self.kind}: it is an option of opd, opd_topk, off_policy_rkd"
        if self.visual_weight and self.kind not in ("opd", "opd_topk", "opd_full"):
            which = "it weighs what a teacher says of rollouts, an option of opd, opd_topk and opd_full"
            yield f"visual_weight does nothing for kind={self.kind}: {which}"
        if not self.visual_weight and self.visual_frac != type(self).model_fields["visual_frac"].default:
            yield f"visual_frac={self.visual_frac} does nothing without visual_weight: set that, too"

    def _problems_of_divergence(self) -> Iterator[str]:
        how, over_tokens = f"divergence={self.divergence}", self.kind in ("opd_topk", "opd_full")
        if self.top_k_of != "teacher" and self.kind != "opd_topk":
            yield f"top_k_of does nothing for kind={self.kind}: it is an option of opd_topk"
        if not over_tokens and (self.divergence != "reverse" or self.forward_kl_entropy is not None):
            options = "divergence and forward_kl_entropy do nothing"
            yield f"{options} for kind={self.kind}: they are options of opd_topk and opd_full"
        elif self.divergence != "reverse" and self.forward_kl_entropy is not None:
            yield f"{how} with forward_kl_entropy, which replaces the reverse KL of tokens: leave one out"
        elif self.divergence != "reverse" and self.clamp is not None and self.kind == "opd_topk":
            yield f"{how} with clamp, which only the reverse KL needs: set clamp=null"
        if self.beta != 0.5 and self.divergence != "jsd":
            yield f"beta does nothing for {how}: it is an option of divergence=jsd"

    def _signal_problems(self) -> Iterator[str]:
        """Of the signals beside the teacher (docs/algorithm.md)."""
        beside = self._changed("distill_weight", "task_weight", "on_policy_frac")
        if beside and self.kind not in ON_POLICY.split(", "):
            yield f"{beside[0]} does nothing for kind={self.kind}: it is an option of {ON_POLICY}"
        of_task = self._changed("task_gate", "baseline_decay")
        if of_task and not self.task_weight:
            yield f"{of_task[0]} does nothing without a task reward: set task_weight"
        if (of_rewards := self._changed("rewards", "advantage_std")) and not self.needs.rewards:
            yield f"{of_rewards[0]} does nothing for kind={self.kind}: use kind=grpo, or set task_weight"
        if self.fixed_advantage is not None and self.kind != "opd":
            yield f"fixed_advantage does nothing for kind={self.kind}: it is an option of opd"
        if self.on_policy_frac < 1 and self.top_k_of == "student":
            yield "top_k_of=student are tokens that it names as it samples: set on_policy_frac=1"
        of_teacher = self._changed("clamp", "center", "on_policy_frac", "visual_weight")
        if self.fixed_advantage is not None and (given := [*of_teacher, *self._changed("distill_weight")]):
            yield f"fixed_advantage takes the place of the teacher's signal, of which {given[0]} is an option"
        if self.distill_weight:
            return
        if not self.task_weight:
            yield "distill_weight=0 leaves nothing to train on: set task_weight too"
        if self.kind != "opd":
            yield f"distill_weight=0 leaves nothing of kind={self.kind}: use kind=opd, which is the same then"
        if given := [*of_teacher, *self._changed("task_gate")]:
            yield f"distill_weight=0 leaves no teacher's signal, of which {given[0]} is an option"


class LearnerConfig(ConfigSection):
    """The DeepSpeed learner."""

    world_size: PositiveInt = key(1, "data-parallel ranks")
    zero_stage: Literal[0, 1, 2, 3] = 3
    deepspeed: dict[str, Any] = key({}, "further keys of DeepSpeed's configuration; docs/operations.md")
    dtype: Dtype = "bfloat16"
    grad_accum_dtype: Dtype | None = key(None, "sums gradients of micro-batches; None: float32 if it can")
    attn_implementation: Attention = key("sdpa", ATTENTION)
    micro_batch: PositiveInt = key(1, "sequences in one forward and backward pass")
    tree_tokens: PositiveInt | None = key(
        None, "most tokens of one pass, shared ones counted once; None: micro_batch bounds it alone"
    )
    logit_rows: PositiveInt = key(512, "response tokens whose logits are held at once")
    lr: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    warmup_frac: Fraction = key(0.03, "share of num_steps over which lr rises linearly")
    final_lr_frac: Fraction = key(1.0, "lr then falls to this share of itself; 1: constant")
    lr_decay: Literal["linear", "cosine"] = key("linear", "how lr falls to final_lr_frac")
    max_grad_norm: PositiveFloat = 1.0
    freeze_vision: bool = key(True, "vision tower and merger keep their weights")
    vision_cache_bytes: NonNegativeInt = key(0, "cache of vision features in each rank's memory; 0: none")
    lora_rank: NonNegativeInt = key(0, "train only low-rank adapters of this rank; 0: train the weights")
    lora_alpha: PositiveFloat = key(32.0, "adapters are scaled by lora_alpha / lora_rank")
    lora_targets: RegularExpression = key(TEXT_LAYERS, "regular expression: linear layers with adapters")
    lora_publish: Literal["adapters", "merged"] = key("adapters", "to actors: these alone, or merged weights")
    gradient_checkpointing: bool = True
    bucket_bytes: PositiveInt = key(256 << 20, "weights travel in buckets of about this size")
    weight_transfer: WeightTransfer | Literal["auto"] = key("auto", TRANSFERS)
    num_gpus: NonNegativeFloat = key(1, "of one rank; 0 on a CPU machine")
    num_cpus: NonNegativeFloat = 1

    @property
    def accumulation_dtype(self) -> Dtype:
        """In which gradients of micro-batches are added. ZeRO-2 and 3 add in another than that of weights.

        DeepSpeed 0.19 has none at stage 0, and at stage 1 another optimizer with other checkpoint files."""
        return self.grad_accum_dtype or ("float32" if self.zero_stage >= 2 else self.dtype)

    def zero_option(self, name: str, default: Any) -> Any:
        """A key of deepspeed.zero_optimization; `default` is DeepSpeed's, which "auto" means too."""
        value = self.deepspeed.get(config_deepspeed.ZERO, {}).get(name, default)
        return default if value == "auto" else value

    def offload(self, what: Literal["optimizer", "param"]) -> str:
        """Where DeepSpeed keeps optimizer states, or weights: none (on the device) or cpu."""
        return (self.zero_option(f"offload_{what}", None) or {}).get("device", "none")

    def problems(self) -> Iterator[str]:
        yield from config_deepspeed.problems(self.deepspeed, self.zero_stage)
        if problem := attention_problem(self.attn_implementation, self.dtype, self.num_gpus):
            yield problem
        if self.grad_accum_dtype == "bfloat16" and self.dtype == "float32":
            yield "grad_accum_dtype=bfloat16 would round gradients of dtype=float32: leave it out"
        if self.accumulation_dtype != self.dtype and self.zero_stage < 2:
            yield f"grad_accum_dtype=float32 needs zero_stage=2 or 3, not {self.zero_stage}"
        if self.vision_cache_bytes and not self.freeze_vision:
            yield "vision_cache_bytes keeps outputs of the vision tower: set freeze_vision, or leave it 0"
        if self.vision_cache_bytes and self.zero_stage == 3 and self.world_size > 1:
            yield "vision_cache_bytes would block ranks that wait for each other's tower: use zero_stage=2"
        if self.publishes_adapters and self.lora_rank > LORA_RANKS[-1]:
            most = f"vLLM takes {LORA_RANKS[-1]} at most"
            yield f"lora_rank={self.lora_rank}: {most}; lower it, or use lora_publish=merged"
        if self.num_gpus > 1:
            yield f"num_gpus={self.num_gpus:g}, but a rank uses one GPU: set num_gpus=1, and world_size"

    @property
    def keeps_features(self) -> bool:
        """Whether features of clips are kept: the vision tower is neither trained nor sharded (ZeRO-3).

        Ranks gather a sharded tower together. One that ran it while others did not would wait for them."""
        return bool(self.vision_cache_bytes) or (self.freeze_vision and self.zero_stage < 3)

    @property
    def publishes_adapters(self) -> bool:
        """Whether actors get adapters, through the object store, instead of weights by weight_transfer."""
        return bool(self.lora_rank) and self.lora_publish == "adapters"

    @property
    def lora_slot_rank(self) -> int:
        """The rank that vLLM reserves memory for."""
        return next(rank for rank in LORA_RANKS if rank >= self.lora_rank)
