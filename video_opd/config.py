"""The run's configuration: frozen pydantic models. video_opd/config_file.py reads and writes them."""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from video_opd.config_curriculum import CurriculumConfig
from video_opd.config_data import (
    ConfigSection,
    DataConfig,
    Dtype,
    FileName,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    Temperature,
    VideoConfig,
    key,
)
from video_opd.config_learner import LearnerConfig, LossConfig, WeightTransfer
from video_opd.config_schedule import ScheduleRoom
from video_opd.config_teachers import TeacherConfig, TeacherModel, engine_problems
from video_opd.hub import model_name


class RolloutConfig(ConfigSection):
    """The vLLM actors."""

    num_actors: NonNegativeInt = key(1, "0: none, for objectives without rollouts; disables evaluation too")
    prompts_per_call: PositiveInt = key(32, "prompts in flight in one call of an actor")
    prompts_per_result: PositiveInt = key(4, "finished prompts that an actor returns together")
    rollouts_per_prompt: PositiveInt = 1
    temperature: Temperature = key(1.0, "of the policy: actors, teacher and learner divide logits by it")
    max_response_tokens: PositiveInt = 64
    max_model_len: PositiveInt = 16000
    max_num_seqs: PositiveInt = key(64, "sequences that vLLM decodes at once")
    dtype: Dtype = "bfloat16"
    kv_cache_bytes: PositiveInt | None = key(None, "KV cache of one engine; None: by gpu_memory_utilization")
    gpu_memory_utilization: Fraction = 0.85
    enforce_eager: bool = False
    tensor_parallel: PositiveInt = key(1, "shards of an actor's engine, each on a GPU of one node")
    num_gpus: NonNegativeFloat = key(1, "of one actor, or of each of its shards; 0 on a CPU machine")
    num_cpus: NonNegativeFloat = key(1, "of one actor, or of each of its shards")

    def problems(self) -> Iterator[str]:
        yield from engine_problems(self.tensor_parallel, self.num_gpus, self.num_cpus)


class ChecksConfig(ConfigSection):
    """Self-checks of a running run."""

    max_logprob_gap: PositiveFloat | None = key(0.5, "bound on p99 of |actor - learner log-prob| at first")


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Config(ConfigSection):
    """The whole configuration of a run."""

    run_name: FileName | None = key(None, "name of the run folder; None: made from the time")
    runs_dir: str = "runs"
    seed: int = 0
    student: str = Field(description="transformers folder, or ORG/NAME[@REVISION] of the Hugging Face hub")
    teacher: str | None = key(None, "as student, where a teacher is needed")
    teachers: tuple[TeacherModel, ...] = key((), "instead of `teacher`: {name, model, weight, prompts} each")
    trust_remote_code: bool = key(False, "run the Python code that a model folder brings (its auto_map)")
    num_steps: PositiveInt
    max_scored_tokens: PositiveInt | None = key(None, "stop after so many tokens scored by the teacher")
    groups_per_step: PositiveInt = key(32, "prompts of one update, at most")
    max_policy_lag: NonNegativeInt = key(0, "0: strictly on-policy")
    checkpoint_every: NonNegativeInt = key(0, "steps between checkpoints; 0: after selections, at the end")
    checkpoint_keep_last: PositiveInt = key(3, "newest checkpoints that are kept")
    checkpoint_keep_best: NonNegativeInt = key(1, "checkpoints of best eval mIoU also kept; needs eval_every")
    snapshot_every: NonNegativeInt = key(0, "steps between snapshots, the student's weights alone; 0: none")
    snapshot_keep_last: PositiveInt = key(3, "newest snapshots that are kept")
    checkpoint_url: str | None = key(None, "copy checkpoints to URL/run_name; any fsspec URL: s3://...")
    checkpoint_timeout_s: PositiveFloat = key(3600.0, "bound on writing or loading a checkpoint")
    upload_timeout_s: PositiveFloat = key(3600.0, "bound on the copy of one checkpoint to checkpoint_url")
    stop_grace_s: PositiveFloat = key(60.0, "time that SIGTERM or SIGINT leaves for the current update")
    eval_every: NonNegativeInt = key(0, "steps between evaluations on data.eval; 0: before and after only")
    request_timeout_s: PositiveFloat = key(600.0, "bound on every wait for a rollout, a score or an update")
    start_timeout_s: PositiveFloat = key(900.0, "bound on the start of all parts")
    max_retries: NonNegativeInt = key(3, "consecutive retries of a call or restarts of a part that was lost")
    watchdog_s: PositiveFloat = key(120.0, "after this long without a step, print what is waited for")
    data: DataConfig
    video: VideoConfig = VideoConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher_pool: TeacherConfig = TeacherConfig()
    learner: LearnerConfig = LearnerConfig()
    loss: LossConfig = LossConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    checks: ChecksConfig = ChecksConfig()
    trackers: tuple[TrackerName, ...] = key(("tensorboard",), "where the metrics also go; docs/operations.md")
    worker_env: dict[str, str] = key({}, "environment variables of every process of the run")

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective or the curriculum needs a teacher."""
        asked = self.curriculum.asks_teacher or self.curriculum.scores_student
        return self.loss.needs.teacher != "none" or asked

    @property
    def teacher_engine(self) -> Literal["transformers", "vllm"]:
        """teacher_pool.engine, or the one that `auto` stands for."""
        pool = self.teacher_pool
        if pool.engine != "auto":
            return pool.engine
        if self.loss.needs.teacher == "hidden" or pool.attn_implementation != "sdpa" or self.followers:
            return "transformers"
        return "vllm" if pool.num_gpus or pool.tensor_parallel > 1 else "transformers"

    @property
    def teacher_clips(self) -> int:
        """Processed clips that a teacher holds of a prompt: vLLM's with loss.visual_weight a grey one too."""
        return 2 if self.loss.visual_weight is not None and self.teacher_engine == "vllm" else 1

    @property
    def shares_gpus(self) -> bool:
        """Whether processes of several roles, or several of one, may be on one GPU."""
        return any(0 < part.num_gpus < 1 for part in (self.learner, self.rollout, self.teacher_pool))

    @property
    def weight_transfer(self) -> WeightTransfer:
        """How actors get weights: learner.weight_transfer; for `auto` between GPUs where these allow it.

        `ipc` only of weights that a rank has whole: of others it would hold a copy beside its share.
        """
        learner, num_gpus = self.learner, (self.learner.num_gpus, self.rollout.num_gpus)
        if learner.publishes_adapters or self.followers:
            return "object_store"
        if learner.weight_transfer != "auto":
            return learner.weight_transfer
        if min(num_gpus) >= 1:
            return "collective"
        is_whole = learner.zero_stage < 3 and not learner.lora_rank
        return "ipc" if is_whole and all(0 < n < 1 for n in num_gpus) else "object_store"

    @property
    def teacher_models(self) -> tuple[TeacherModel, ...]:
        """All teachers of the run; empty without one."""
        if self.teacher is None:
            return self.teachers
        name = re.sub(r"[^\w.-]", "_", model_name(self.teacher))
        return (TeacherModel(name=name, model=self.teacher),)

    @property
    def followers(self) -> tuple[TeacherModel, ...]:
        """The teachers whose weights follow the student's."""
        return tuple(t for t in self.teachers if t.follows == "student")

    def teachers_of(self, prompt_id: str) -> tuple[TeacherModel, ...]:
        """The teachers that score the prompt. The first one gives the teacher's answer to it."""
        return tuple(t for t in self.teacher_models if t.scores(prompt_id))

    @property
    def video_first(self) -> bool:
        """Whether every prompt shows its video before its text, so that prompts of a clip begin alike."""
        return all(words.video_first for words in self.prompts)

    @property
    def prompts(self) -> list[PromptConfig]:
        """The section prompt, and those of the sources that have a style of their own."""
        return [self.prompt.of_style(style) for style in (None, *self.data.styles.values())]

    @property
    def learner_temperature(self) -> float:
        """The actors' and the teacher's, but 1 for sft, which compares with neither."""
        return 1.0 if self.loss.kind == "sft" else self.rollout.temperature

    @property
    def responses_per_prompt(self) -> int:
        """In a step: rollouts, or the one of the data or the teacher."""
        return self.rollout.rollouts_per_prompt if self.loss.needs.rollouts else 1

    @property
    def rewards_in_groups(self) -> bool:
        """Whether a reward is compared with its group's; else with the mean of past steps."""
        return self.rollout.rollouts_per_prompt > 1

    @property
    def num_slots(self) -> int:
        """Prompts under way at one time: the slots of the buffer."""
        return (self.max_policy_lag + 1) * self.groups_per_step

    @property
    def schedule_room(self) -> ScheduleRoom | None:
        """None: without SCC's schedule."""
        sizes = {"num_steps": self.num_steps, "full": self.groups_per_step}
        room = ScheduleRoom(responses=self.responses_per_prompt, **sizes)
        return room if self.curriculum.schedules else None

    @property
    def most_actors(self) -> int:
        """Actors that can have work: calls under way at one time, if each is as large as it may be."""
        most = self.rollout.prompts_per_call
        if self.curriculum.group_by_video:  # a call has prompts of one step
            return (self.max_policy_lag + 1) * -(-self.groups_per_step // most)
        return -(-self.num_slots // most)

    @property
    def most_calls(self) -> int:
        """Calls of actors under way at one time. With group_by_video they may be as small as a video."""
        return self.num_slots if self.curriculum.group_by_video else self.most_actors

    def warnings(self) -> Iterator[str]:
        """Yields what is allowed, but probably not meant: processes without work, imprecise gradients."""
        rollout, needs, replicas = self.rollout, self.loss.needs, self.teacher_pool.num_replicas
        slots, ranks = f"{self.num_slots} prompts in flight", self.learner.world_size
        if needs.rollouts and rollout.num_actors > self.most_actors:
            calls = f"rollout.prompts_per_call={rollout.prompts_per_call} give work to {self.most_actors}"
            fits = self.num_slots // rollout.num_actors
            remedy = f"set it to {fits}, or lower num_actors" if fits else "lower num_actors"
            yield f"rollout.num_actors={rollout.num_actors}, but {slots} and {calls}: {remedy}"
        size = min(rollout.prompts_per_call, rollout.prompts_per_result if needs.rollouts else self.num_slots)
        if needs.teacher != "none" and replicas > (most := -(-self.num_slots // size)):
            calls = f"are scored in {most} calls of {size}"
            yield f"teacher_pool.num_replicas={replicas}, but {slots} {calls}: lower one of the two"
        rows = self.groups_per_step * self.responses_per_prompt
        if ranks > rows:
            yield f"learner.world_size={ranks}, but an update has {rows} responses: raise groups_per_step"
        learner, num_batches = self.learner, -(-rows // (ranks * self.learner.micro_batch))
        if num_batches > 1 and learner.accumulation_dtype == "bfloat16" and not learner.grad_accum_dtype:
            adds = f"adds gradients of {num_batches} micro-batches in bfloat16"
            yield f"learner.zero_stage={learner.zero_stage} {adds}: use zero_stage=2, which adds in float32"

    def _scores_of_one_span(self) -> Iterator[str]:
        """What would look at the first interval of a set alone."""
        if not any(words.asks_for_sets for words in self.prompts):
            return
        if self.curriculum.scores_one_span:
            yield "curriculum.multi_span_iou=best scores one interval, a prompt asks for sets: use merged"
        of_one = {"video_opd.rewards:iou", "video_opd.rewards:time_r1"} & set(self.loss.rewards)
        if self.loss.needs.rewards and of_one:
            yield f"loss.rewards: {min(of_one)} scores one interval, a prompt asks for sets: use merged_iou"
        if self.loss.task_gate is not None:
            yield "loss.task_gate looks at one interval, a prompt asks for sets: leave it out"

    def _teacher_problems(self) -> Iterator[str]:
        if self.teacher is not None and self.teachers:
            yield "teacher and teachers are both set: list all under teachers, and set teacher=null"
        names = [t.name for t in self.teachers]
        if len(set(names)) < len(names):
            yield f"teachers {', '.join(names)}: give each a name of its own"
        if self.loss.kl_coef and any(t.weight < 0 for t in self.teachers):
            yield "loss.kl_coef is a KL to one reference: give the teachers positive weights"
        yield from (p for t in self.teachers for p in t.view_problems(self.prompt, self.video))
        answers = self.curriculum.asks_teacher or self.curriculum.scores_student
        of_run = self.student, self.loss, self.learner, self.teacher_pool, answers
        yield from (p for t in self.followers for p in t.follow_problems(*of_run))

    def problems(self) -> Iterator[str]:
        if self.data.weights and not self.curriculum.selects_at_random:
            drawn = "need prompts that are drawn at random"
            random = "kind=uniform, or kind=tvdf with dbtp=false and without pool_sample and select_by=video"
            yield f"the weights of data.train {drawn} ({random}): leave them out, or change curriculum"
        yield from self._teacher_problems()
        if len({*self.trackers}) < len(self.trackers):
            yield f"trackers names {', '.join(self.trackers)}: name each once"
        if self.video.decode_timeout_s >= self.request_timeout_s:
            clip_s, call_s = self.video.decode_timeout_s, self.request_timeout_s
            yield f"video.decode_timeout_s={clip_s:g} must be below request_timeout_s={call_s:g}"
        way, num_gpus = self.learner.weight_transfer, (self.learner.num_gpus, self.rollout.num_gpus)
        transfer = f"learner.weight_transfer={way}"
        if way == "collective" and min(num_gpus) < 1:
            yield f"{transfer} needs whole GPUs: set both num_gpus to 1, or use object_store"
        if way == "ipc" and not all(0 < n < 1 for n in num_gpus):
            yield f"{transfer} needs a shared GPU: set both num_gpus between 0 and 1, or use object_store"
        if self.learner.publishes_adapters and self.rollout.num_gpus and self.rollout.dtype == "float32":
            bf16 = "vLLM's adapters on GPUs are bfloat16"
            yield f"rollout.dtype=float32, but {bf16}: set that, or learner.lora_publish=merged"
        if self.loss.kind == "grpo" and self.rollout.rollouts_per_prompt < 2:
            yield "loss.kind=grpo compares responses to one prompt: set rollout.rollouts_per_prompt >= 2"
        needs, loss, pool = self.loss.needs, f"loss.kind={self.loss.kind}", self.teacher_pool
        kinds = f"{loss} with curriculum.kind={self.curriculum.kind}"
        if (needs.rollouts or self.curriculum.asks_student) and not self.rollout.num_actors:
            yield f"rollout.num_actors=0, but {kinds} asks the student: set 1 or more"
        if needs.teacher == "hidden" and (pool.engine == "vllm" or pool.tensor_parallel > 1):
            how = "use teacher_pool.engine=transformers and tensor_parallel=1"
            yield f"{loss} needs the teacher's hidden states: {how}"
        if self.loss.student_top_k and self.teacher_engine == "vllm" and not pool.num_gpus:
            how = "use teacher_pool.engine=transformers and tensor_parallel=1"
            yield f"loss.top_k_of=student, but vLLM scores tokens that it is given on GPUs alone: {how}"
        if not needs.rollouts and self.curriculum.suspends:
            yield f"curriculum.scc: the gate suspends rollouts, {loss} has none: set scc.gate=false"
        if needs.rewards and self.curriculum.suspends:
            yield f"curriculum.scc: the gate suspends the rollouts that {loss} rewards: set scc.gate=false"
        yield from self._scores_of_one_span()
        if self.loss.task_weight and not (self.loss.advantage_std or self.rewards_in_groups):
            yield "loss.advantage_std=false is for groups of rollouts: leave it out at rollouts_per_prompt=1"
        if self.rewards_in_groups and self.loss.baseline_decay != LossConfig().baseline_decay:
            yield "loss.baseline_decay does nothing for groups, which have means: leave it out"
        if room := self.schedule_room:
            yield from room.problems(self.curriculum.num_selected)
        if self.needs_teacher and not self.teacher_models:
            yield f"{kinds} needs a teacher: set teacher"
