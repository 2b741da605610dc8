"""The teachers' part of the configuration: the models, and the pool that serves them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from video_opd.config_data import (
    ATTENTION,
    Attention,
    ConfigSection,
    Dtype,
    FileName,
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    RegularExpression,
    VideoConfig,
    attention_problem,
    key,
)
from video_opd.config_learner import LearnerConfig, LossConfig

WEIGHT_TOLERANCE = 1e-6


def engine_problems(shards: int, num_gpus: float, num_cpus: float) -> Iterator[str]:
    """What an engine of so many shards cannot have. Two shards on one GPU would stop NCCL."""
    if num_gpus > 1:
        yield f"num_gpus={num_gpus:g}, but a process uses one GPU: set num_gpus=1, and tensor_parallel"
    if shards > 1 and num_gpus not in (0, 1):
        yield f"tensor_parallel={shards} takes a whole GPU for each shard: set num_gpus=1"
    if shards > 1 and not (num_gpus or num_cpus):
        yield f"tensor_parallel={shards} without GPUs needs a share of a CPU for each shard: set num_cpus"


class TeacherConfig(ConfigSection):
    """The teacher service, a Ray Serve deployment."""

    engine: Literal["auto", "transformers", "vllm"] = key(
        "auto", "vllm on GPUs; transformers on CPUs, for hidden states or another attn_implementation"
    )
    num_replicas: PositiveInt = key(1, "at the start; `python -m teacher_service scale N` changes it")
    max_replicas: PositiveInt | None = key(None, "autoscale up to this; None: fixed, unless `scale` sets it")
    min_replicas: PositiveInt | None = key(None, "autoscale down to this; None: 1")
    target_ongoing_requests: PositiveFloat = key(2.0, "autoscaling: calls per replica, queued ones too")
    upscale_delay_s: NonNegativeFloat = key(10.0, "autoscaling: add replicas after calls queue for this long")
    downscale_delay_s: NonNegativeFloat = key(120.0, "autoscaling: remove replicas idle for this long")
    health_check_s: PositiveFloat = key(10.0, "period and timeout of health checks; 3 failures: replaced")
    max_queued_requests: PositiveInt = key(256, "beyond this callers are told to wait")
    max_batch_requests: PositiveInt = key(4, "concurrent calls merged into one forward pass")
    batch_wait_s: NonNegativeFloat = key(0.0, "how long a call waits for others that it is merged with")
    micro_batch: PositiveInt = key(8, "sequences in one forward pass")
    max_model_len: PositiveInt = 16000
    dtype: Dtype = "bfloat16"
    attn_implementation: Attention = key("sdpa", f"transformers only: {ATTENTION}")
    kv_cache_bytes: PositiveInt | None = None
    gpu_memory_utilization: Fraction = 0.85
    tensor_parallel: PositiveInt = key(1, "shards of a replica, each on a GPU of one node; vllm only")
    num_gpus: NonNegativeFloat = key(1, "of one replica, or of each of its shards; 0 on a CPU machine")
    num_cpus: NonNegativeFloat = key(1, "of one replica, or of each of its shards")

    def problems(self) -> Iterator[str]:
        if self.engine == "vllm" and self.attn_implementation != "sdpa":
            yield f"attn_implementation={self.attn_implementation} does nothing for engine=vllm: leave it out"
        if problem := attention_problem(self.attn_implementation, self.dtype, self.num_gpus):
            yield problem
        if self.tensor_parallel > 1 and self.engine == "transformers":
            yield f"tensor_parallel={self.tensor_parallel} is vLLM's: use engine=vllm"
        if self.tensor_parallel > 1 and self.engine == "auto" and self.attn_implementation != "sdpa":
            ours = f"attn_implementation={self.attn_implementation} is transformers'"
            yield f"{ours}, tensor_parallel={self.tensor_parallel} is vLLM's: leave one of them out"
        yield from engine_problems(self.tensor_parallel, self.num_gpus, self.num_cpus)
        low, high = self.min_replicas or 1, self.max_replicas
        if high is None and self.min_replicas is not None:
            yield f"min_replicas={low} without max_replicas: set both, or neither for a fixed number"
        if high is not None and not low <= self.num_replicas <= high:
            yield f"num_replicas={self.num_replicas} is not within min_replicas={low}, max_replicas={high}"


VIEW_KEYS = {"fps", "min_frames", "max_frames", "max_video_tokens", "max_frame_tokens"}
"""Of VideoConfig, what a teacher may have otherwise."""


class TeacherModel(ConfigSection):
    """One of several teachers. With `prompt`, `video` or `crop_margin_frac` it sees more than the student."""

    name: FileName = Field(pattern=r"^[\w.-]+$", description="in metrics, teacher ids and commands")
    model: str = Field(description="transformers folder, or ORG/NAME[@REVISION] of the hub")
    weight: FiniteFloat = key(1.0, "where several score a prompt: relative; with negative ones, as it is")
    prompts: RegularExpression | None = key(None, "regular expression of the prompt ids it scores; None: all")
    prompt: dict[str, Any] = key({}, "keys of `prompt` that it has otherwise: style, template, video_first")
    video: dict[str, Any] = key({}, f"keys of `video` that it has otherwise: {', '.join(sorted(VIEW_KEYS))}")
    crop_margin_frac: NonNegativeFloat | None = key(
        None, "it scores on the true span and this share of its length on both sides; None: on the whole clip"
    )
    follows: Literal["none", "student"] = key("none", "student: it scores with the student's earlier weights")
    delay: NonNegativeInt = key(0, "of follows=student: by how many policy versions, 1 or more")

    @property
    def has_view(self) -> bool:
        """Whether it sees another prompt, or other frames, than the student."""
        return bool(self.prompt or self.video or self.crop_margin_frac is not None)

    def view(self, prompt: PromptConfig, video: VideoConfig) -> tuple[PromptConfig, VideoConfig]:
        """What it has in the place of the run's. Raises ValidationError."""
        of_run = {} if "style" in self.prompt else prompt.model_dump()  # a style sets all keys
        return PromptConfig(**of_run | self.prompt), VideoConfig(**video.model_dump() | self.video)

    def view_problems(self, prompt: PromptConfig, video: VideoConfig) -> Iterator[str]:
        """What is wrong with its view, given the run's."""
        what = f"teachers {self.name}"
        if unknown := sorted(self.video.keys() - VIEW_KEYS):
            yield f"{what}: video.{unknown[0]} is the same for all: leave it out"
        try:
            own_prompt, own_video = self.view(prompt, video)
        except ValidationError as error:
            first = error.errors()[0]
            yield f"{what}: prompt or video: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            return
        same = [own_prompt.template, own_prompt.video_first, own_video] == [
            prompt.template,
            prompt.video_first,
            video,
        ]
        if self.has_view and same and self.crop_margin_frac is None:
            yield f"{what}: its prompt and video are the run's, so they change nothing: leave them out"

    def follow_problems(
        self, student: str, loss: LossConfig, learner: LearnerConfig, pool: TeacherConfig, answers: bool
    ) -> Iterator[str]:
        """What does not allow it to follow the student. answers: whether the curriculum asks teachers."""
        what = f"teachers {self.name}: follows=student"
        if Path(self.model).absolute() != Path(student).absolute():
            yield f"{what} needs the student's own model, {student}, not {self.model}"
        if loss.kind not in ("opd", "opd_topk"):
            yield f"{what} is for loss.kind=opd and opd_topk, not {loss.kind}: leave follows out"
        if pool.engine == "vllm" or pool.tensor_parallel > 1:
            yield f"{what} needs teacher_pool.engine=transformers and tensor_parallel=1"
        if learner.publishes_adapters:
            yield f"{what} takes merged weights: set learner.lora_publish=merged"
        if learner.weight_transfer not in ("auto", "object_store"):
            yield f"{what} takes weights from the object store: set learner.weight_transfer=object_store"
        if answers:
            once = "which are compared over the run and reused"
            yield f"{what} changes the answers and scores of the curriculum, {once}: use kind=uniform"

    def scores(self, prompt_id: str) -> bool:
        return self.prompts is None or re.search(self.prompts, prompt_id) is not None

    def problems(self) -> Iterator[str]:
        if not self.weight:
            yield f"teacher {self.name} with weight=0 says nothing: leave it out"
        if self.follows == "student" and not self.delay:
            yield f"teacher {self.name} with follows=student needs delay: set 1 or more policy versions"
        if self.follows == "none" and self.delay:
            yield f"teacher {self.name}: delay={self.delay} does nothing without follows=student"


def shares_of(weights: Sequence[float]) -> list[float]:
    """w_i in log p = sum_i w_i log pi_i, which sum to 1: relative weights; with a negative one, as given.

    G-OPD (arXiv 2602.12125): lambda and 1 - lambda of a teacher and of its base give
    r = lambda (log pi_T - log pi_base) + (log pi_base - log pi_old).
    """
    total = 1.0 if min(weights) < 0 else sum(weights)
    return [weight / total for weight in weights]


def weights_problem(teachers: Sequence[TeacherModel]) -> str | None:
    """What is wrong with the weights of the teachers of one prompt."""
    weights = [t.weight for t in teachers]
    if min(weights) > 0:
        return None
    if len(weights) == 1:
        return f"its one teacher, {teachers[0].name}, has a negative weight: leave it out"
    if abs(sum(weights) - 1) > WEIGHT_TOLERANCE:
        return f"weights with a negative one must sum to 1, not {sum(weights):g}: lambda and 1 - lambda"
    if weights[0] < 0:
        return f"its first teacher, {teachers[0].name}, answers it, but has a negative weight: name it later"
    return None
