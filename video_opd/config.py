"""The run's configuration: frozen pydantic models, strict YAML, dotted overrides, one-line errors."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from video_opd.config_data import (
    ConfigSection,
    DataConfig,
    Dtype,
    FileName,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    VideoConfig,
    regular_expression,
)
from video_opd.objectives import OBJECTIVES, LossKind, Objective


class RolloutConfig(ConfigSection):
    """The vLLM actors."""

    num_actors: NonNegativeInt = Field(
        default=1, description="0: none, where nobody samples; then nothing is evaluated either"
    )
    prompts_per_call: PositiveInt = Field(default=32, description="prompts in flight in one call of an actor")
    prompts_per_result: PositiveInt = Field(
        default=4,
        description="finished prompts that an actor hands on together: the teacher scores them while others are sampled",
    )
    rollouts_per_prompt: PositiveInt = 1
    temperature: PositiveFloat = Field(
        default=1.0, description="1: actor log-probs are those of the policy itself"
    )
    max_response_tokens: PositiveInt = 64
    max_model_len: PositiveInt = 16000
    max_num_seqs: PositiveInt = Field(default=64, description="sequences vLLM decodes at once")
    dtype: Dtype = "bfloat16"
    kv_cache_bytes: PositiveInt | None = Field(
        default=None, description="KV cache of one engine; None: by gpu_memory_utilization"
    )
    gpu_memory_utilization: Fraction = 0.85
    enforce_eager: bool = False
    num_gpus: Annotated[float, Field(ge=0)] = Field(default=1, description="of one actor; 0 on a CPU machine")
    num_cpus: Annotated[float, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _on_policy_logprobs(self):
        if self.temperature != 1.0:
            raise ValueError(
                f"temperature={self.temperature}: vLLM reports log-probs before the temperature, so they would not be "
                "those of the distribution sampled from; the method is defined at 1.0"
            )
        return self


class TeacherConfig(ConfigSection):
    """The teacher service, a Ray Serve deployment."""

    engine: Literal["transformers", "vllm"] = "transformers"
    num_replicas: PositiveInt = Field(
        default=1, description="at the start; `python -m teacher_service scale N` changes it meanwhile"
    )
    max_replicas: PositiveInt | None = Field(
        default=None,
        description="most that autoscaling starts while calls queue; None: num_replicas, until `scale` says otherwise",
    )
    min_replicas: PositiveInt | None = Field(
        default=None, description="fewest that autoscaling leaves; None: 1"
    )
    target_ongoing_requests: PositiveFloat = Field(
        default=2.0, description="autoscaling: calls a replica, worked on and waiting, that it aims at"
    )
    upscale_delay_s: Annotated[float, Field(ge=0)] = Field(
        default=10.0, description="autoscaling: calls queue for so long before"
    )
    downscale_delay_s: Annotated[float, Field(ge=0)] = Field(
        default=120.0, description="autoscaling: replicas idle for so long first"
    )
    health_check_s: PositiveFloat = Field(
        default=10.0,
        description="seconds between two checks of a replica, and of one; after three missed it is replaced",
    )
    max_queued_requests: PositiveInt = Field(default=256, description="beyond this callers are told to wait")
    max_batch_requests: PositiveInt = Field(
        default=4, description="concurrent calls merged into one forward pass"
    )
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.01
    micro_batch: PositiveInt = Field(default=8, description="sequences in one forward pass")
    max_model_len: PositiveInt = 16000
    dtype: Dtype = "bfloat16"
    kv_cache_bytes: PositiveInt | None = None
    gpu_memory_utilization: Fraction = 0.85
    tensor_parallel: PositiveInt = Field(
        default=1, description="parts that a replica is cut into, each on a GPU of one node; vllm only"
    )
    num_gpus: Annotated[float, Field(ge=0)] = Field(
        default=1, description="of one replica, or of each of its parts; 0 on a CPU machine"
    )
    num_cpus: Annotated[float, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _parts_can_be_placed(self):
        if self.tensor_parallel == 1:
            return self
        if self.engine != "vllm":
            raise ValueError(f"tensor_parallel={self.tensor_parallel} is vLLM's: use engine=vllm")
        if self.num_gpus > 1 or (not self.num_gpus and not self.num_cpus):
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} gives each part at most one GPU, or on a CPU machine a share of num_cpus: "
                f"num_gpus={self.num_gpus:g}, num_cpus={self.num_cpus:g}"
            )
        return self

    @model_validator(mode="after")
    def _bounds_are_ordered(self):
        if self.max_replicas is None and self.min_replicas is not None:
            raise ValueError(
                f"min_replicas={self.min_replicas} without max_replicas: set both, or neither for a fixed number"
            )
        fewest = self.min_replicas or 1
        if self.max_replicas is not None and not fewest <= self.num_replicas <= self.max_replicas:
            raise ValueError(
                f"num_replicas={self.num_replicas} is not within min_replicas={fewest} and max_replicas={self.max_replicas}"
            )
        return self


class TeacherModel(ConfigSection):
    """One of several teachers."""

    name: FileName = Field(pattern=r"^[\w.-]+$", description="in metrics, teacher ids and commands")
    model: str = Field(description="transformers folder")
    weight: PositiveFloat = Field(
        default=1.0, description="its share in the log-probs of prompts that several teachers score"
    )
    prompts: str | None = Field(
        default=None, description="regular expression: the prompt ids that it scores; None: all"
    )

    @field_validator("prompts")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        return pattern if pattern is None else regular_expression(pattern)

    def scores(self, prompt_id: str) -> bool:
        """Whether it is a teacher of the prompt."""
        return self.prompts is None or re.search(self.prompts, prompt_id) is not None


class LossConfig(ConfigSection):
    """ALGORITHM.md sections 1 and 3; see learner/loss.py and video_opd/objectives.py."""

    kind: LossKind = Field(
        default="opd", description="objective: on-policy distillation, its baselines, or none of a teacher"
    )
    top_k: PositiveInt = Field(default=64, description="opd_topk: teacher tokens kept at each position")
    center: Literal["none", "batch"] = Field(
        default="none", description="opd: subtract the batch mean from the signal r"
    )
    clamp: PositiveFloat | None = Field(
        default=None,
        description="opd, opd_topk, off_policy_rkd: bound on the log-ratio of teacher and student, before centring",
    )
    max_ratio: PositiveFloat | None = Field(
        default=None, description="opd: truncate importance ratios; None: no bound"
    )
    divergence: Literal["reverse", "forward", "jsd"] = Field(
        default="reverse", description="opd_full: KL(student || teacher), ..."
    )
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="opd_full, divergence=jsd: weight of the teacher"
    )
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="grpo: importance ratios count within 1 +- clip"
    )
    kl_coef: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="grpo: weight of the KL to a reference, which is the model `teacher`: the student's own start, say",
    )
    advantage_std: bool = Field(
        default=True, description="grpo: divide a group's advantages by their standard deviation"
    )
    rewards: tuple[str, ...] = Field(
        default=("video_opd.rewards:iou",),
        min_length=1,
        description="grpo: functions (trajectory, prompt) -> float, by import path; summed",
    )
    reduction: Literal["token_mean", "sum"] = "token_mean"

    @property
    def needs(self) -> Objective:
        """What the loop must bring to the learner."""
        needs = OBJECTIVES[self.kind]
        return replace(needs, teacher="logprobs") if self.kl_coef else needs

    @model_validator(mode="after")
    def _options_have_an_effect(self):
        if self.kind != "grpo" and self.kl_coef:
            raise ValueError(f"kl_coef is an option of kind=grpo: it does nothing for kind={self.kind}")
        if self.kind != "opd" and (self.center != "none" or self.max_ratio is not None):
            raise ValueError(
                f"center and max_ratio are options of kind=opd: they do nothing for kind={self.kind}"
            )
        if self.kind not in ("opd", "opd_topk", "off_policy_rkd") and self.clamp is not None:
            raise ValueError(
                f"clamp bounds the log-ratio of teacher and student: it does nothing for kind={self.kind}"
            )
        return self


class LearnerConfig(ConfigSection):
    """The DeepSpeed learner."""

    world_size: PositiveInt = Field(default=1, description="data-parallel ranks")
    zero_stage: Literal[0, 1, 2, 3] = 3
    dtype: Dtype = "bfloat16"
    micro_batch: PositiveInt = Field(default=1, description="sequences in one forward and backward pass")
    logit_rows: PositiveInt = Field(default=512, description="response tokens whose logits are held at once")
    lr: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    warmup_frac: Fraction = Field(default=0.03, description="share of num_steps over which lr rises linearly")
    final_lr_frac: Fraction = Field(
        default=1.0, description="lr falls linearly to this share of itself; 1: constant"
    )
    max_grad_norm: PositiveFloat = 1.0
    freeze_vision: bool = Field(default=True, description="vision tower and merger keep their weights")
    vision_cache_bytes: NonNegativeInt = Field(
        default=0,
        description="outputs of the frozen vision tower kept for clips seen again, in each rank's memory; 0: none",
    )
    lora_rank: NonNegativeInt = Field(
        default=0, description="train low-rank adapters of this rank alone; 0: the weights"
    )
    lora_alpha: PositiveFloat = Field(default=32.0, description="adapters count lora_alpha / lora_rank")
    lora_targets: str = Field(
        default=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        description="regular expression: linear layers with adapters",
    )
    gradient_checkpointing: bool = True
    bucket_bytes: PositiveInt = Field(
        default=256 << 20, description="weights travel in buckets of about this size"
    )
    weight_transfer: Literal["object_store", "collective", "ipc"] = Field(
        default="object_store",
        description="weights reach the actors through Ray's object store; by vLLM's NCCL broadcast between GPUs "
        "(collective); or in the memory of a GPU that learner and actors share (ipc). The last two never ran so far",
    )
    num_gpus: Annotated[float, Field(ge=0)] = Field(default=1, description="of one rank; 0 on a CPU machine")
    num_cpus: Annotated[float, Field(ge=0)] = 1

    @field_validator("lora_targets")
    @classmethod
    def _is_a_pattern(cls, pattern: str) -> str:
        return regular_expression(pattern)

    @model_validator(mode="after")
    def _cached_features_stay_true(self):
        if self.vision_cache_bytes and not self.freeze_vision:
            raise ValueError(
                "vision_cache_bytes keeps what the vision tower computed: set freeze_vision, or leave it 0"
            )
        if self.vision_cache_bytes and self.zero_stage == 3 and self.world_size > 1:
            raise ValueError(
                "vision_cache_bytes lets ranks run the vision tower at unlike times, zero_stage=3 does not: use zero_stage=2"
            )
        return self


class CurriculumConfig(ConfigSection):
    """Which prompts are sampled. ALGORITHM.md section 2; curriculum/tvdf.py and curriculum/coupling.py."""

    kind: Literal["uniform", "tvdf", "scc"] = Field(
        default="uniform",
        description="all in shuffled passes; teacher-validated disagreement; student-curriculum coupling",
    )
    trpv: bool = Field(default=True, description="tvdf, scc: drop prompts that the teacher gets wrong")
    dbtp: bool = Field(
        default=True, description="tvdf: ask the student, select by disagreement; false: select at random"
    )
    sampler: Literal["top_k", "dsus", "bbds", "gwds", "uniform"] = Field(
        default="top_k", description="tvdf: how dbtp selects"
    )
    num_selected: PositiveInt | None = Field(
        default=None, description="prompts of a round; None: all that may be selected"
    )
    passes_per_round: PositiveInt = Field(
        default=1, description="tvdf: times that a selected prompt is sampled in a round"
    )
    teacher_threshold: Fraction = Field(
        default=0.7, description="drop a prompt whose teacher IoU is below (TRPV)"
    )
    num_teacher_predictions: PositiveInt = Field(
        default=4, description="teacher answers for each prompt (TRPV)"
    )
    multi_span_iou: Literal["best", "merged"] = Field(
        default="best", description="IoU with several true spans; see grounding.py"
    )
    group_by_video: bool = Field(default=False, description="issue prompts of one video next to each other")
    anchor_iou: Fraction = Field(
        default=0.7, description="scc: prompts that the student solves from the start, Anchors"
    )
    frontier_iou: Fraction = Field(default=0.3, description="scc: prompts below this at the start, Frontier")
    anchor_frac: Fraction = Field(default=0.1, description="scc: share of Anchors in the pool")
    suspend_iou: Fraction = Field(
        default=0.7, description="scc: a rollout of at least this IoU is neither scored nor learnt from"
    )

    @model_validator(mode="after")
    def _kinds_are_apart(self):
        if self.frontier_iou > self.anchor_iou:
            raise ValueError(
                f"frontier_iou={self.frontier_iou} is above anchor_iou={self.anchor_iou}: a prompt could be both"
            )
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher's own answers to the pool are needed."""
        by_disagreement = self.kind == "tvdf" and self.dbtp and self.sampler != "uniform"
        return self.kind != "uniform" and (self.trpv or by_disagreement)

    @property
    def asks_student(self) -> bool:
        """Whether the student's answers are needed at the start of a round."""
        return self.kind == "scc" or (self.kind == "tvdf" and self.dbtp)


class ChecksConfig(ConfigSection):
    """Self-checks while running."""

    max_logprob_gap: PositiveFloat | None = Field(
        default=0.5,
        description="stop if the 99th percentile of |actor - learner log-prob| on the first batch is larger",
    )


class Config(ConfigSection):
    run_name: FileName | None = Field(
        default=None, description="name of the run folder; None: made from the time"
    )
    runs_dir: str = "runs"
    seed: int = 0
    student: str = Field(description="transformers folder of the student")
    teacher: str | None = Field(
        default=None, description="transformers folder of the teacher, where one is needed"
    )
    teachers: tuple[TeacherModel, ...] = Field(
        default=(), description="several teachers, in place of `teacher`: {name, model, weight, prompts} each"
    )
    trust_remote_code: bool = Field(
        default=False, description="run the Python code that a model folder brings (its auto_map)"
    )
    num_steps: PositiveInt
    max_scored_tokens: PositiveInt | None = Field(
        default=None,
        description="end earlier, after the step at which the teacher has scored so many response tokens, unused ones included",
    )
    groups_per_step: PositiveInt = Field(default=32, description="prompts of one update")
    max_policy_lag: NonNegativeInt = Field(default=0, description="0: strictly on-policy")
    checkpoint_every: NonNegativeInt = Field(
        default=0, description="steps between checkpoints; 0: only at the end"
    )
    checkpoint_keep_last: PositiveInt = Field(default=3, description="newest checkpoints that are kept")
    checkpoint_keep_best: NonNegativeInt = Field(
        default=1,
        description="checkpoints kept besides, of the steps with the best mIoU on data.eval; needs eval_every",
    )
    checkpoint_url: str | None = Field(
        default=None,
        description="where checkpoints are copied to, below the run's name: s3://..., file://..., all that fsspec opens",
    )
    upload_timeout_s: PositiveFloat = Field(
        default=3600.0, description="bound on the copy of one checkpoint to checkpoint_url"
    )
    stop_grace_s: PositiveFloat = Field(
        default=60.0,
        description="after SIGTERM or SIGINT the update under way may take so long before it is given up",
    )
    eval_every: NonNegativeInt = Field(
        default=0, description="steps between evaluations on data.eval; 0: before and after only"
    )
    request_timeout_s: PositiveFloat = Field(
        default=600.0, description="bound on every wait for a rollout, a score or an update"
    )
    start_timeout_s: PositiveFloat = Field(default=900.0, description="bound on the start of all parts")
    max_retries: NonNegativeInt = Field(
        default=3,
        description="times in a row that a call is made again, or a part started again, after a process died or hangs",
    )
    watchdog_s: PositiveFloat = Field(
        default=120.0, description="without a step for so long, what is waited for is printed"
    )
    data: DataConfig
    video: VideoConfig = VideoConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher_pool: TeacherConfig = TeacherConfig()
    learner: LearnerConfig = LearnerConfig()
    loss: LossConfig = LossConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    checks: ChecksConfig = ChecksConfig()
    worker_env: dict[str, str] = Field(
        default={}, description="environment variables of every process of the run"
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective or the curriculum asks one."""
        return self.loss.needs.teacher != "none" or self.curriculum.asks_teacher

    @property
    def teacher_models(self) -> tuple[TeacherModel, ...]:
        """The teachers of the run, one or several; none where it has none."""
        if self.teacher is None:
            return self.teachers
        name = re.sub(r"[^\w.-]", "_", Path(self.teacher).name)
        return (TeacherModel(name=name, model=self.teacher),)

    def teachers_of(self, prompt_id: str) -> tuple[TeacherModel, ...]:
        """Those that score the prompt; the first of them answers it where answers are asked for."""
        return tuple(t for t in self.teacher_models if t.scores(prompt_id))

    @model_validator(mode="after")
    def _one_teacher_or_several(self):
        if self.teacher is not None and self.teachers:
            raise ValueError(
                "teacher and teachers are both set: list all under teachers, and leave out teacher (teacher=null)"
            )
        names = [t.name for t in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers {', '.join(names)}: give each a name of its own")
        return self

    @model_validator(mode="after")
    def _sections_fit(self):
        if self.video.decode_timeout_s >= self.request_timeout_s:
            raise ValueError(
                f"video.decode_timeout_s={self.video.decode_timeout_s:g} is above request_timeout_s={self.request_timeout_s:g}: "
                "a clip that hangs would end the run"
            )
        way, num_gpus = self.learner.weight_transfer, (self.learner.num_gpus, self.rollout.num_gpus)
        if way == "collective" and min(num_gpus) < 1:
            raise ValueError(
                "learner.weight_transfer=collective needs NCCL, a whole GPU for each learner rank and actor: "
                "set learner.num_gpus and rollout.num_gpus to 1 or more, or use object_store"
            )
        if way == "ipc" and not all(0 < n < 1 for n in num_gpus):
            raise ValueError(
                "learner.weight_transfer=ipc needs learner and actors on one GPU: "
                "set learner.num_gpus and rollout.num_gpus between 0 and 1, or use object_store"
            )
        if self.loss.kind == "grpo" and self.rollout.rollouts_per_prompt < 2:
            raise ValueError(
                "loss.kind=grpo compares the responses to one prompt: set rollout.rollouts_per_prompt to 2 or more"
            )
        sampling = self.loss.needs.rollouts or self.curriculum.asks_student
        if sampling and not self.rollout.num_actors:
            asked = f"loss.kind={self.loss.kind} with curriculum.kind={self.curriculum.kind}"
            raise ValueError(f"rollout.num_actors=0, but {asked} asks the student: set 1 or more")
        if self.loss.needs.teacher == "hidden" and self.teacher_pool.engine == "vllm":
            raise ValueError(
                f"loss.kind={self.loss.kind} needs the teacher's hidden states: use teacher_pool.engine=transformers"
            )
        if not self.loss.needs.rollouts and self.curriculum.kind == "scc":
            raise ValueError(
                f"curriculum.kind=scc suspends rollouts, loss.kind={self.loss.kind} has none: use tvdf or uniform"
            )
        if self.needs_teacher and not self.teacher_models:
            raise ValueError(
                f"loss.kind={self.loss.kind} with curriculum.kind={self.curriculum.kind} needs a teacher: set teacher"
            )
        return self
