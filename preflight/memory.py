"""The memory that a run needs, computed before it starts: bytes of every process, by role.

Parameters, optimizer and KV cache are exact; preflight/activations.py explains the letters in the formulas.
Not counted: fragmentation of the allocator and NCCL's buffers. No GPU has run these configurations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from preflight import activations
from preflight.adapters import VISION, adapters, slot_numbers
from preflight.model_shapes import ModelShapes, Parameters, count, parameters
from video_opd.config import Config, LearnerConfig, RolloutConfig, TeacherConfig
from video_opd.config_data import VideoConfig
from video_opd.types import Prompt
from video_opd.video.clips import TEMPORAL_PATCH, frames_key, num_video_tokens

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

TEXT_TOKENS = 128  # template, query and chat format: an allowance for when prompts cannot be counted
# Tokens of a frame pair beside its video: "<123.4 seconds>", nine tokens, and two vision marks.
PAIR_TOKENS = {"qwen3_vl": 11, "qwen2_5_vl": 0}

# DeepSpeed 0.19's defaults, in numbers rather than bytes (deepspeed/runtime/zero/config.py).
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000

# vLLM 0.32: tokens of one prefill pass of LLM(...), on large GPUs and on a CPU (vllm/engine/arg_utils.py).
GPU_BATCHED_TOKENS, CPU_BATCHED_TOKENS = 16384, 4096
CPU_KV_CACHE_BYTES = 4 * GIB  # without rollout.kv_cache_bytes
VLLM_LOGIT_COPIES = 3  # float32 logits, log-probs, and what sampling sorts
TEACHER_LOGIT_COPIES = 4  # logits, and the three of token_entropy

GPU_CONTEXT_BYTES = GIB  # CUDA context and libraries of a process: assumed, not measured
CUDA_GRAPH_BYTES = GIB  # of a vLLM engine without enforce_eager: assumed, not measured

# Proportional set size of a process whose engine has started and done nothing, with the demo's models, by
# `python -m benchmarks.memory_estimate --empty`. Pages that processes share count once over all of them.
_MODELS = {"actors": 596 << 20, "teacher": 380 << 20, "learner": 424 << 20}
_OTHERS = {"driver": 285 << 20, "ray": 645 << 20, "serve": 90 << 20, "curriculum": 78 << 20}
EMPTY_PROCESS_BYTES = _MODELS | _OTHERS


@dataclass(frozen=True)
class Workload:
    """What the clips of a split need."""

    mean_video_tokens: float  # of a prompt; 0: unknown
    max_video_tokens: int  # of a prompt
    max_prompt_tokens: int  # video, timestamps and text
    clip_bytes: int  # decoded frames of the largest clip
    longest_is_counted: bool = False  # max_prompt_tokens is not an estimate


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes that a process always holds, and those that each phase adds; the largest phase sets the peak."""

    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def largest_phase(self) -> str:
        """Its name; empty without phases."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()), default="")

    @property
    def terms(self) -> dict[str, int]:
        """What the peak consists of, bytes by name."""
        return self.held | self.phases.get(self.largest_phase, {})

    @property
    def peak_bytes(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class RoleMemory:
    """The processes of one role, all alike. Without a GPU `device` is None and `host` has everything."""

    role: str
    processes: int
    gpu_share: float  # of one GPU, for one process
    device: ProcessMemory | None
    host: ProcessMemory


def workload_of(prompts: Sequence[Prompt], shapes: ModelShapes, longest: int | None = None) -> Workload:
    """The workload of real clips. longest: tokens of the longest prompt; None: estimated."""
    clips = {frames_key(p.clip): p.clip for p in prompts}.values()
    tokens = [num_video_tokens(p.clip, shapes.size_multiple) for p in prompts]
    is_counted = longest is not None
    if longest is None:
        pairs = [len(p.clip.frame_indices) // TEMPORAL_PATCH for p in prompts]
        marks = [n * PAIR_TOKENS[shapes.model_type] for n in pairs]
        longest = max(t + m for t, m in zip(tokens, marks, strict=True)) + TEXT_TOKENS
    clip_bytes = max(len(c.frame_indices) * c.frame_size[0] * c.frame_size[1] * 3 for c in clips)
    return Workload(sum(tokens) / len(tokens), max(tokens), longest, clip_bytes, is_counted)


def workload_of_budget(video: VideoConfig, shapes: ModelShapes) -> Workload:
    """The most that the config's video budget allows, for when the clips are not here."""
    tokens = video.max_video_tokens
    marks = min(video.max_frames // TEMPORAL_PATCH, tokens) * PAIR_TOKENS[shapes.model_type]
    clip_bytes = tokens * TEMPORAL_PATCH * shapes.size_multiple**2 * 3
    return Workload(0, tokens, tokens + marks + TEXT_TOKENS, clip_bytes)


def trained(shapes: ModelShapes, learner: LearnerConfig) -> Parameters:
    """All but a frozen vision tower; with lora_rank r only r (inputs + outputs) for each of lora_targets."""
    if learner.lora_rank:
        return adapters(shapes, learner)
    of = parameters(shapes)
    return {n: s for n, s in of.items() if not (learner.freeze_vision and n.startswith(VISION))}


def published_bytes(config: Config, student: ModelShapes) -> int:
    """Of one version: eP, or eT where adapters are published."""
    learner = config.learner
    of = trained(student, learner) if learner.publishes_adapters else parameters(student)
    return DTYPE_BYTES[learner.dtype] * count(of)


def kv_bytes_per_token(shapes: ModelShapes, dtype: str) -> int:
    """2 L K e: a key and a value in every layer."""
    return 2 * shapes.text.layers * shapes.text.key * DTYPE_BYTES[dtype]


def optimizer_bytes(num_trained: int, learner: LearnerConfig) -> dict[str, int]:
    """One rank's Adam moments 8T, masters 4T (in float32 with ZeRO only); ZeRO 1 to 3 divide both by n."""
    ranks = learner.world_size if learner.zero_stage else 1
    masters = 4 * num_trained // ranks if learner.dtype == "bfloat16" or learner.zero_stage else 0
    return {"optimizer moments": 8 * num_trained // ranks, "float32 masters": masters}


def gradient_bytes(num_trained: int, learner: LearnerConfig) -> dict[str, int]:
    """One rank's gradients aT, with ZeRO-2 and 3 aT / n; with ZeRO also a bucket, e reduce_bucket_size.

    a: bytes in grad_accum_dtype; if it is not e, a rank's part of the bucket is converted. At stages 1 and 2
    overlap_comm takes two buckets. offload_bytes has the gradients that are added on the host."""
    e, a = DTYPE_BYTES[learner.dtype], DTYPE_BYTES[learner.accumulation_dtype]
    ranks = learner.world_size if learner.zero_stage >= 2 else 1
    gradients = {} if adds_on_host(learner) else {"gradients": a * num_trained // ranks}
    if not learner.zero_stage:
        return gradients
    size = int(learner.zero_option("reduce_bucket_size", REDUCE_BUCKET))
    bucket = size if learner.num_gpus else min(size, num_trained)  # a CPU: as it fills
    copies = 2 if learner.zero_stage < 3 and learner.zero_option("overlap_comm", False) else 1
    converted = a * bucket // ranks if a != e else 0
    return gradients | {"gradient bucket": copies * e * bucket + converted}


def adds_on_host(learner: LearnerConfig) -> bool:
    """Whether gradients of micro-batches are added on the host; ZeRO-2 adds float32 on the device."""
    converts = learner.accumulation_dtype != learner.dtype
    on_host = learner.zero_stage == 3 or (learner.zero_stage == 2 and not converts)
    return on_host and learner.offload("optimizer") != "none"


def offload_bytes(num_trained: int, learner: LearnerConfig) -> dict[str, int]:
    """One rank's host memory with offload_optimizer, for each of T / n: moments 8, masters 4, and roots 4.

    Gradients are float32, 4, and those that are added on the host, a. ZeRO-1 and 2 keep the new weights there
    too, e. ZeRO-3 steps SUB_GROUP at a time."""
    part = num_trained // learner.world_size
    summed = DTYPE_BYTES[learner.accumulation_dtype] if adds_on_host(learner) else 0
    weights = 0 if learner.zero_stage == 3 else DTYPE_BYTES[learner.dtype]
    sub_group = int(learner.zero_option("sub_group_size", SUB_GROUP))
    roots = 4 * (min(part, sub_group) if learner.zero_stage == 3 else part)
    states = optimizer_bytes(num_trained, learner)
    return states | {"offloaded gradients": (4 + summed + weights) * part, "roots": roots}


def weight_bytes(shapes: ModelShapes, learner: LearnerConfig) -> dict[str, int]:
    """One rank's weights eP; with ZeRO-3 eP / n, and those gathered: LIVE_PARAMETERS or the largest."""
    e, of = DTYPE_BYTES[learner.dtype], parameters(shapes)
    total = count(of)
    if learner.zero_stage < 3:
        return {"weights": e * total}
    largest = max(count({n: s}) for n, s in of.items())
    live = int(learner.zero_option("stage3_max_live_parameters", LIVE_PARAMETERS))
    gathered = min(total, max(live, largest))
    return {"weights": e * total // learner.world_size, "gathered weights": e * gathered}


def step_bytes(num_trained: int, learner: LearnerConfig) -> int:
    """The optimizer step's float32 gradients 4T / n and AdamW's roots 4T / n; ZeRO-3: SUB_GROUP at a time.

    Nothing with offload_optimizer; no gradients where the sum of the micro-batches' is used as it is."""
    if learner.offload("optimizer") != "none":
        return 0
    part = num_trained // (learner.world_size if learner.zero_stage else 1)
    if learner.zero_stage == 3:
        part = min(part, int(learner.zero_option("sub_group_size", SUB_GROUP)))
    converts = learner.accumulation_dtype != learner.dtype
    as_it_is = learner.dtype == "float32" if learner.zero_stage == 0 else learner.zero_stage == 2 and converts
    return part * (4 if as_it_is else 8)


def longest_sequence(config: Config, work: Workload, max_model_len: int) -> int:
    """S: the longest prompt and a whole response, at most max_model_len."""
    return min(work.max_prompt_tokens + config.rollout.max_response_tokens, max_model_len)


def learner_memory(
    config: Config, student: ModelShapes, teacher: ModelShapes | None, train: Workload
) -> RoleMemory:
    """A rank. Phases, each beside weights, gradients, masters and moments:

    vision: the pass of the vision tower, vision_block_passing p.
    loss: what all layers keep, and 4V logit_copies for each of min(R, logit_rows) rows.
    backward: what all layers keep, a recomputed layer with gradient_checkpointing, and text_layer_gradients.
    optimizer step: step_bytes.

    All layers keep L B S text_layer_saved, with gradient_checkpointing L B S eH; so does a trained tower.
    With micro_batch over 1, or eager attention, the mask takes B S^2 (1 + e); flash attention has none.
    Eager attention keeps B S^2 eager_saved in a layer, and as much again for its gradients."""
    learner, e, batch = config.learner, DTYPE_BYTES[config.learner.dtype], config.learner.micro_batch
    text, vision, num_trained = student.text, student.vision, count(trained(student, learner))
    length = longest_sequence(config, train, config.rollout.max_model_len)
    tokens, patches = batch * length, batch * train.max_video_tokens * vision.patches_a_token
    depth = 0 if learner.freeze_vision or learner.lora_rank else vision.depth
    attention = learner.attn_implementation
    eager = activations.eager_saved(student, e) if attention == "eager" else 0
    layer = tokens * (activations.text_layer_saved(student, e) + eager * length)
    block = patches * activations.vision_block_saved(student, e)
    kept, recomputed = text.layers * layer + depth * block, 0
    if learner.gradient_checkpointing:
        recomputed = max(layer, block if depth else 0)
        kept = text.layers * tokens * text.hidden * e + depth * patches * vision.hidden * e
    video = activations.video_bytes(student, e, batch * train.max_video_tokens)
    masked = attention == "eager" or (attention == "sdpa" and batch > 1)
    mask = {"attention mask": batch * length**2 * (1 + e) if masked else 0}
    of_pass = {"activations kept": kept} | mask | video
    rows = min(learner.logit_rows, batch * config.rollout.max_response_tokens)
    logits = rows * text.vocab_size * 4 * activations.logit_copies(config.loss)
    gradients = tokens * (activations.text_layer_gradients(student, e) + eager * length)
    held = weight_bytes(student, learner) | gradient_bytes(num_trained, learner)
    host = _prompts_bytes(student, train, batch) | _bucket_bytes(config, student)
    if learner.offload("optimizer") == "none":
        held |= optimizer_bytes(num_trained, learner)
    else:
        host |= offload_bytes(num_trained, learner)
    if learner.offload("param") != "none":
        host["offloaded weights"], held["weights"] = held["weights"], 0
    if config.loss.needs.teacher == "hidden" and teacher:
        values = teacher.text.vocab_size * teacher.text.hidden * len(config.teacher_models)
        held["teacher's head"] = values * DTYPE_BYTES[config.teacher_pool.dtype]
    phases = {
        "vision": {"vision pass": patches * activations.vision_block_passing(student, e)} | video,
        "loss": of_pass | {"logits": logits},
        "backward": of_pass | {"activations again": recomputed, "their gradients": gradients},
        "optimizer step": {"float32 gradients and roots": step_bytes(num_trained, learner)},
    }
    if learner.vision_cache_bytes:
        host["vision cache"] = learner.vision_cache_bytes
    return _place("learner", learner.world_size, learner.num_gpus, ProcessMemory(held, phases), host)


def actors_memory(config: Config, student: ModelShapes, work: Workload, gpu_bytes: int) -> RoleMemory:
    """An actor's vLLM engine."""
    rollout = config.rollout
    computing = vllm_memory(config, rollout, student, work, gpu_bytes)
    host = _prompts_bytes(student, work, rollout.prompts_per_call) | _bucket_bytes(config, student)
    if config.learner.publishes_adapters:  # vLLM keeps what it loaded beside what it computes with
        host["adapter"] = DTYPE_BYTES[rollout.dtype] * count(trained(student, config.learner))
    return _place("actors", rollout.num_actors, rollout.num_gpus, computing, host)


def teacher_memory(config: Config, teacher: ModelShapes, work: Workload, gpu_bytes: int) -> RoleMemory:
    """A replica. With engine=vllm see vllm_memory; else weights eP, and phases of micro_batch prompts:

    scoring: forward_bytes.
    response rows: 4V TEACHER_LOGIT_COPIES for each of micro_batch x max_response_tokens.
    answering: A answers to each prompt are A sequences; as scoring, and 2 L K e A B S of KV cache."""
    pool, e = config.teacher_pool, DTYPE_BYTES[config.teacher_pool.dtype]
    if pool.engine == "vllm":
        computing = vllm_memory(config, pool, teacher, work, gpu_bytes)
    else:
        batch, video, curriculum = pool.micro_batch, work.max_video_tokens, config.curriculum
        length = longest_sequence(config, work, pool.max_model_len)
        logits = batch * config.rollout.max_response_tokens * teacher.text.vocab_size * 4
        answers = batch * (curriculum.num_teacher_predictions if curriculum.asks_teacher else 1)
        kv_cache = {"KV cache": answers * length * kv_bytes_per_token(teacher, pool.dtype)}
        eager = activations.eager_saved(teacher, e) * length**2 if pool.attn_implementation == "eager" else 0
        scoring, answering = (
            activations.forward_bytes(teacher, e, n * length, n * video) | {"eager attention": n * eager}
            for n in (batch, answers)
        )
        phases = {
            "scoring": scoring,
            "response rows": {"logits": logits * TEACHER_LOGIT_COPIES},
            "answering": answering | kv_cache,
        }
        computing = ProcessMemory({"weights": e * count(parameters(teacher))}, phases)
    host = _prompts_bytes(teacher, work, pool.max_batch_requests * config.rollout.prompts_per_call)
    processes = pool.num_replicas * len(config.teacher_models) * pool.tensor_parallel
    return _place("teacher", processes, pool.num_gpus, computing, host)


def vllm_memory(
    config: Config, engine: RolloutConfig | TeacherConfig, shapes: ModelShapes, work: Workload, gpu_bytes: int
) -> ProcessMemory:
    """A vLLM engine: weights eP, KV cache, an actor's adapter, and phases of N tokens a pass.

    N: the longest prompt, or as many prompts as GPU_BATCHED_TOKENS (CPU_BATCHED_TOKENS) hold.
    prefill: forward_bytes. vLLM plans for the language model alone (skip_mm_profiling): the vision tower
    comes on top of gpu_memory_utilization.
    logits: an actor's 4V VLLM_LOGIT_COPIES for each of max_num_seqs; a teacher's (4 + e) V for each of N.
    KV cache: kv_cache_bytes, or what gpu_memory_utilization leaves of a GPU, at least a max_model_len.
    With tensor_parallel, one part of the teacher: weights and KV cache are divided, layers count whole."""
    scores = isinstance(engine, TeacherConfig)
    num_sequences = engine.micro_batch if scores else engine.max_num_seqs
    parts, eager = (engine.tensor_parallel, False) if scores else (1, engine.enforce_eager)
    e, longest = DTYPE_BYTES[engine.dtype], longest_sequence(config, work, engine.max_model_len)
    per_pass = GPU_BATCHED_TOKENS if engine.num_gpus else CPU_BATCHED_TOKENS
    num_tokens = max(longest, min(per_pass, num_sequences * longest))
    video_tokens = max(work.max_video_tokens, min(num_tokens, num_sequences * work.max_video_tokens))
    values = num_tokens * (4 + e) if scores else num_sequences * 4 * VLLM_LOGIT_COPIES
    logits = shapes.text.vocab_size * values
    weights = e * count(parameters(shapes)) // parts
    graphs = CUDA_GRAPH_BYTES if engine.num_gpus and not eager else 0
    adapts = not scores and config.learner.publishes_adapters
    slot = {"adapter slot": e * slot_numbers(shapes, config.learner)} if adapts else {}
    kv_cache = engine.kv_cache_bytes or CPU_KV_CACHE_BYTES
    if engine.num_gpus and engine.kv_cache_bytes is None:
        passing = max(num_tokens * activations.text_layer_passing(shapes, e), logits)
        planned = passing + weights + sum(slot.values()) + graphs + GPU_CONTEXT_BYTES
        one_sequence = engine.max_model_len * kv_bytes_per_token(shapes, engine.dtype) // parts
        kv_cache = max(int(engine.gpu_memory_utilization * gpu_bytes) - planned, one_sequence)
    held = {"weights": weights, "KV cache": kv_cache} | slot | ({"CUDA graphs": graphs} if graphs else {})
    prefill = activations.forward_bytes(shapes, e, num_tokens, video_tokens)
    return ProcessMemory(held, {"prefill": prefill, "logits": {"logits": logits}})


def support_memory(config: Config, student: ModelShapes) -> list[RoleMemory]:
    """Processes without a model, and the object store, which holds one published version."""
    names = ["driver", "ray", "curriculum", *(["serve"] if config.needs_teacher else [])]
    held = {name: {"empty process": EMPTY_PROCESS_BYTES[name]} for name in names}
    published = published_bytes(config, student) if config.rollout.num_actors else 0
    held["object store"] = {"published weights": published}
    return [RoleMemory(name, 1, 0.0, None, ProcessMemory(terms, {})) for name, terms in held.items()]


def _prompts_bytes(shapes: ModelShapes, work: Workload, at_once: int) -> dict[str, int]:
    """On the host, for `at_once` prompts: frames (mapped files of the node's cache) and float32 pixels."""
    pixels = work.max_video_tokens * shapes.vision.values_a_token
    return {"decoded frames": at_once * work.clip_bytes, "encoded prompts": at_once * pixels * 4}


def _bucket_bytes(config: Config, student: ModelShapes) -> dict[str, int]:
    """On the host: one bucket of weights in transfer, at most learner.bucket_bytes."""
    return {"weight bucket": min(config.learner.bucket_bytes, published_bytes(config, student))}


def _place(
    role: str, processes: int, num_gpus: float, computing: ProcessMemory, host: dict[str, int]
) -> RoleMemory:
    """With a GPU the host holds the weights only while they load; without one it holds everything."""
    host = {"empty process": EMPTY_PROCESS_BYTES[role]} | host
    if not num_gpus:
        return RoleMemory(role, processes, 0.0, None, ProcessMemory(host | computing.held, computing.phases))
    device = ProcessMemory(computing.held | {"CUDA context": GPU_CONTEXT_BYTES}, computing.phases)
    loading = {"loading": {"weights": computing.held["weights"]}}
    return RoleMemory(role, processes, min(1.0, num_gpus), device, ProcessMemory(host, loading))
