"""The memory that a run needs, computed before it starts: bytes of every process, by role.

Parameters, optimizer and KV cache are exact; preflight/activations.py explains the letters in the formulas.
Not counted: fragmentation of the allocator and NCCL's buffers. No GPU has run these configurations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from preflight import activations
from preflight.adapters import slot_numbers
from preflight.model_shapes import DTYPE_BYTES, ModelShapes, count, model_bytes, parameters
from preflight.packing import Pass, largest_pass
from preflight.zero import (
    buffer_bytes,
    gradient_bytes,
    offload_bytes,
    optimizer_bytes,
    sending_bytes,
    step_bytes,
    trained,
    weight_bytes,
)
from video_opd.config import Config, RolloutConfig
from video_opd.config_data import VideoConfig
from video_opd.config_teachers import TeacherConfig
from video_opd.models.shared_gpu import CONTEXT_BYTES as GPU_CONTEXT_BYTES
from video_opd.models.vllm_engine import PROCESSED_GIB
from video_opd.passes import CALLS_AN_ENGINE
from video_opd.types import Prompt
from video_opd.video.clips import TEMPORAL_PATCH, frames_key, num_video_tokens

GIB = 2**30

TEXT_TOKENS = 128  # template, query and chat format: an allowance for when prompts cannot be counted
# Tokens of a frame pair beside its video: "<123.4 seconds>", nine tokens, and two vision marks.
PAIR_TOKENS = {"qwen3_vl": 11, "qwen2_5_vl": 0}

# vLLM 0.32: tokens of one pass of LLM(...), on GPUs from 70 GiB, on others, and on a CPU (get_batch_defaults
# in vllm/engine/arg_utils.py; an A100 has the number of small GPUs, so it needs less than planned).
GPU_BATCHED_TOKENS, SMALL_GPU_BATCHED_TOKENS, CPU_BATCHED_TOKENS = 16384, 8192, 4096
LARGE_GPU_BYTES = 70 * GIB
KV_BLOCK_TOKENS = 128  # at most; 16 on most GPUs
PROMPT_LOGPROB_ROWS = 1024  # at a time, on a GPU (CHUNK_SIZE in v1/worker/gpu/sample/prompt_logprob.py)
CPU_KV_CACHE_BYTES = 4 * GIB  # without rollout.kv_cache_bytes
VLLM_LOGIT_COPIES = 3  # float32 logits, log-probs, and what sampling sorts
TEACHER_LOGIT_COPIES = 4  # logits, and the three of token_entropy

CUDA_GRAPH_BYTES = GIB  # of a vLLM engine without enforce_eager: assumed, not measured

# Proportional set size of a process whose engine has started and done nothing, with the demo's models, by
# `python -m benchmarks.memory_estimate --empty`. Pages that processes share count once over all of them.
_MODELS = {"actors": 596 << 20, "teacher": 380 << 20, "learner": 367 << 20}
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
    num_clips: int = 0  # 0: unknown


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
    return Workload(sum(tokens) / len(tokens), max(tokens), longest, clip_bytes, is_counted, len(clips))


def workload_of_budget(video: VideoConfig, shapes: ModelShapes) -> Workload:
    """The most that the config's video budget allows, for when the clips are not here."""
    tokens = video.max_video_tokens
    marks = min(video.max_frames // TEMPORAL_PATCH, tokens) * PAIR_TOKENS[shapes.model_type]
    clip_bytes = tokens * TEMPORAL_PATCH * shapes.size_multiple**2 * 3
    return Workload(0, tokens, tokens + marks + TEXT_TOKENS, clip_bytes)


def published_bytes(config: Config, student: ModelShapes) -> int:
    """Of one version in the object store: eP, eT where adapters are published, 0 where it is not used."""
    learner = config.learner
    if not (config.rollout.num_actors and config.weight_transfer == "object_store"):
        return 0
    of = trained(student, learner) if learner.publishes_adapters else parameters(student)
    return DTYPE_BYTES[learner.dtype] * count(of)


def kv_bytes_per_token(shapes: ModelShapes, dtype: str, shards: int = 1) -> int:
    """2 L K e: a key and a value in every layer. Each of several shards has at least one key head."""
    heads = max(1, shapes.text.key_heads // shards)
    return 2 * shapes.text.layers * heads * shapes.text.head_dim * DTYPE_BYTES[dtype]


def longest_sequence(config: Config, work: Workload, max_model_len: int) -> int:
    """The longest prompt and a whole response, at most max_model_len."""
    return min(work.max_prompt_tokens + config.rollout.max_response_tokens, max_model_len)


def learner_phases(config: Config, student: ModelShapes, of: Pass) -> dict[str, dict[str, int]]:
    """What the phases of a rank take in such a pass beside weights, gradients, masters and moments:

    vision: the pass of the vision tower, vision_block_passing p.
    loss: what all layers keep, and 4V logit_copies for each of min(R, logit_rows) rows.
    backward: what all layers keep, a recomputed layer with gradient_checkpointing, and text_layer_gradients.

    All layers keep L S text_layer_saved, with gradient_checkpointing L S eH; so does a trained tower.
    score_bytes: what attention may keep in a layer, with as much again for gradients, and its masks."""
    learner, e = config.learner, DTYPE_BYTES[config.learner.dtype]
    text, vision, patches = student.text, student.vision, of.video_tokens * student.vision.patches_a_token
    depth = 0 if learner.freeze_vision or learner.lora_rank else vision.depth
    scores, masks = activations.score_bytes(student, learner, of.attended)
    layer = of.tokens * activations.text_layer_saved(student, e) + scores
    block = patches * activations.vision_block_saved(student, e)
    kept, recomputed = text.layers * layer + depth * block, 0
    if learner.gradient_checkpointing:
        recomputed = max(layer, block if depth else 0)
        kept = text.layers * of.tokens * text.hidden * e + depth * patches * vision.hidden * e
    video = activations.video_bytes(student, e, of.video_tokens)
    held = {"activations kept": kept, "attention masks": masks} | video
    rows = min(learner.logit_rows, learner.micro_batch * config.rollout.max_response_tokens)
    logits = rows * text.vocab_size * 4 * activations.logit_copies(config.loss)
    gradients = of.tokens * activations.text_layer_gradients(student, e) + scores
    return {
        "vision": {"vision pass": patches * activations.vision_block_passing(student, e)} | video,
        "loss": held | {"logits": logits},
        "backward": held | {"activations again": recomputed, "their gradients": gradients},
    }


def split_clips(config: Config, longest: int) -> int:
    """At most so many clips of a step have more responses than a pass of the learner takes.

    Their features stay for later passes (learner/vision_cache.py). longest: tokens of a sequence."""
    learner, rollout = config.learner, config.rollout
    own = rollout.max_response_tokens + TEXT_TOKENS
    prefix = max(0, longest - own) if config.video_first else 0
    by_tokens = ((learner.tree_tokens or inf) - prefix) // (longest - prefix)
    fit = max(1, min(learner.micro_batch, by_tokens))
    return int(config.groups_per_step * config.responses_per_prompt // (fit + 1))


def learner_memory(
    config: Config, student: ModelShapes, teacher: ModelShapes | None, train: Workload
) -> RoleMemory:
    """A rank. Phases: learner_phases of the largest pass that micro_batch and tree_tokens allow, which need
    not share anything; optimizer step: step_bytes; publishing: sending_bytes."""
    learner, e, batch = config.learner, DTYPE_BYTES[config.learner.dtype], config.learner.micro_batch
    of = trained(student, learner)
    num_trained = count(of)
    length = longest_sequence(config, train, config.rollout.max_model_len)
    sizes = batch, length, train.max_video_tokens, learner.attn_implementation, learner.tree_tokens
    phases = learner_phases(config, student, largest_pass(*sizes))
    held = weight_bytes(student, learner) | gradient_bytes(of, learner)
    if learner.keeps_features:
        num_tokens = split_clips(config, length) * train.max_video_tokens
        held["features kept"] = activations.video_bytes(student, e, num_tokens)["video features"]
    host = _prompts_bytes(config, train, batch, 1, config.groups_per_step) | _bucket_bytes(config, student)
    host["uploaded frames"] = batch * train.clip_bytes
    states = optimizer_bytes(num_trained, learner)
    if learner.offload("optimizer") == "none":
        held |= states
    else:
        host |= offload_bytes(num_trained, learner)
    if learner.offload("param") != "none":
        host["offloaded weights"], held["weights"] = held["weights"], 0
    if config.loss.needs.teacher == "hidden" and teacher:
        values = teacher.text.vocab_size * teacher.text.hidden * len(config.teacher_models)
        held["teacher's head"] = values * DTYPE_BYTES[config.teacher_pool.dtype]
    phases["optimizer step"] = {"float32 gradients and roots": step_bytes(num_trained, learner)}
    phases["publishing"] = {"weights sent": sending_bytes(student, config)}
    if learner.vision_cache_bytes:
        host["vision cache"] = learner.vision_cache_bytes
    loading = e * count(parameters(student))
    if learner.zero_stage == 3:  # a rank takes its shares in turn; DeepSpeed joins them on the host
        loading = max(_largest_tensor(student, learner.dtype), e * num_trained // learner.world_size)
        if learner.offload("optimizer") != "none":
            states["optimizer moments"] = 0  # on a resume those that are read replace those that are held
    loading = max(loading, sum(states.values()))  # on a resume torch.load reads all to the host
    computing = ProcessMemory(held, phases)
    return _place("learner", learner.world_size, learner.num_gpus, computing, host, loading)


def actors_memory(config: Config, student: ModelShapes, work: Workload, gpu_bytes: int) -> RoleMemory:
    """An actor's vLLM engine."""
    rollout = config.rollout
    computing = vllm_memory(config, rollout, student, work, gpu_bytes)
    calls = max(CALLS_AN_ENGINE, -(-config.most_calls // rollout.num_actors))
    most = calls * rollout.prompts_per_call
    if config.curriculum.group_by_video:  # a call is a video, or a part of one, or several
        most = max(CALLS_AN_ENGINE * rollout.prompts_per_call, config.num_slots)
    held = _prompts_bytes(config, work, rollout.max_num_seqs, calls, most)
    host = held | _processed_bytes(held, work) | _bucket_bytes(config, student)
    if config.learner.publishes_adapters:  # vLLM keeps what it loaded beside what it computes with
        host["adapter"] = DTYPE_BYTES[rollout.dtype] * count(trained(student, config.learner))
    processes, loading = rollout.num_actors * rollout.tensor_parallel, _largest_tensor(student, rollout.dtype)
    return _place("actors", processes, rollout.num_gpus, computing, host, loading)


def scoring_bytes(pool: TeacherConfig, teacher: ModelShapes, of: Pass) -> dict[str, int]:
    """What such a pass of transformers takes beside weights, up to its hidden states."""
    pairs = sum(activations.score_bytes(teacher, pool, of.attended))
    layers = activations.forward_bytes(teacher, DTYPE_BYTES[pool.dtype], of.tokens, of.video_tokens)
    return layers | {"scores and masks": pairs}


def answering_phases(
    pool: TeacherConfig, teacher: ModelShapes, of: Pass, num_tokens: int
) -> dict[str, dict[str, int]]:
    """Of transformers: such a pass over prompts, whose KV cache, 2 L K e a token, becomes one of each answer.

    num_tokens: of all answers with their prompts. Layers are copied one after the other. A layer has its keys
    and values again as the cache grows, and repeated for all query heads: 2e (K + Q) a token."""
    e, a_token = DTYPE_BYTES[pool.dtype], kv_bytes_per_token(teacher, pool.dtype)
    pixels = activations.video_bytes(teacher, e, of.video_tokens)["pixels"]
    one_layer = num_tokens * 2 * e * (teacher.text.key + teacher.text.query)
    return {
        "prompts to answer": scoring_bytes(pool, teacher, of) | {"KV cache": of.tokens * a_token},
        "answering": {"KV cache": num_tokens * a_token, "one layer": one_layer, "pixels": pixels},
    }


def teacher_memory(config: Config, teacher: ModelShapes, work: Workload, gpu_bytes: int) -> RoleMemory:
    """A replica. With engine=vllm see vllm_memory; else weights eP, and phases of micro_batch prompts:

    scoring: scoring_bytes of the largest pass.
    response rows: 4V TEACHER_LOGIT_COPIES for each of micro_batch x max_response_tokens.
    answering: answering_phases, of A answers to each prompt."""
    pool, e = config.teacher_pool, DTYPE_BYTES[config.teacher_pool.dtype]
    loading = e * count(parameters(teacher))
    calls, prompts_a_call = 2 * pool.max_batch_requests, config.rollout.prompts_per_call
    if config.curriculum.group_by_video:
        prompts_a_call = max(prompts_a_call, config.groups_per_step)
    clips = config.teacher_clips
    host = _prompts_bytes(config, work, pool.micro_batch, calls, calls * prompts_a_call, clips)
    if config.teacher_engine == "vllm":
        computing = vllm_memory(config, pool, teacher, work, gpu_bytes)
        loading = _largest_tensor(teacher, pool.dtype)
        host |= _processed_bytes(host, work, clips)
    else:
        batch, video, curriculum = pool.micro_batch, work.max_video_tokens, config.curriculum
        length = longest_sequence(config, work, pool.max_model_len)
        logits = batch * config.rollout.max_response_tokens * teacher.text.vocab_size * 4
        answers = batch * (curriculum.num_teacher_predictions if curriculum.asks_teacher else 1)
        largest = largest_pass(batch, length, video, pool.attn_implementation)
        phases = {
            "scoring": scoring_bytes(pool, teacher, largest),
            "response rows": {"logits": logits * TEACHER_LOGIT_COPIES},
            **answering_phases(pool, teacher, largest, answers * length),
        }
        computing = ProcessMemory({"weights": loading}, phases)
        host["uploaded frames"] = batch * work.clip_bytes
    processes = pool.num_replicas * len(config.teacher_models) * pool.tensor_parallel
    return _place("teacher", processes, pool.num_gpus, computing, host, loading)


def vllm_memory(
    config: Config, engine: RolloutConfig | TeacherConfig, shapes: ModelShapes, work: Workload, gpu_bytes: int
) -> ProcessMemory:
    """A vLLM engine: weights (model_bytes), KV cache, an actor's adapter, and phases of N tokens a pass.

    N on a GPU: *_BATCHED_TOKENS, at most num_sequences whole ones, since prefills are cut. On a CPU, where
    they are not: the longest prompt, or as many prompts as CPU_BATCHED_TOKENS hold.
    prefill: forward_bytes. vLLM plans for the language model alone (skip_mm_profiling), so the vision tower
    comes on top of gpu_memory_utilization. So do CUDA context and NCCL: vLLM takes its snapshot of free
    memory after both exist (init_device in vllm/v1/worker/gpu_worker.py).
    logits: an actor's 4V VLLM_LOGIT_COPIES for each of max_num_seqs; a teacher's (4 + e) V for each of N, on
    a GPU 2eV for each of PROMPT_LOGPROB_ROWS. At a temperature bfloat16 ones are divided in float32: 4V more.
    input buffers, on a GPU: e N H (1 + D), embeddings and deepstack (vllm/model_executor/models/qwen3_vl.py).
    KV cache: kv_cache_bytes, or what gpu_memory_utilization leaves of a GPU, at least a max_model_len. On a
    shared GPU vLLM is given it (with_kv_caches).
    new weights: of an actor that gets them by NCCL, two buffer_bytes.
    With tensor_parallel, one shard: weights, KV cache, heads and MLPs are divided."""
    scores = isinstance(engine, TeacherConfig)
    on_gpu = engine.num_gpus > 0
    num_sequences = engine.micro_batch if scores else engine.max_num_seqs
    shards, eager = engine.tensor_parallel, not scores and engine.enforce_eager
    e, longest = DTYPE_BYTES[engine.dtype], longest_sequence(config, work, engine.max_model_len)
    num_tokens = max(longest, min(CPU_BATCHED_TOKENS, num_sequences * longest))
    if on_gpu:
        per_pass = GPU_BATCHED_TOKENS if gpu_bytes >= LARGE_GPU_BYTES else SMALL_GPU_BATCHED_TOKENS
        num_tokens = min(per_pass, num_sequences * engine.max_model_len)
    video_tokens = max(work.max_video_tokens, min(num_tokens, num_sequences * work.max_video_tokens))
    values = num_sequences * 4 * VLLM_LOGIT_COPIES
    if scores:
        of_row = (2 * e if on_gpu else 4 + e) + 4 * (e == 2 and config.rollout.temperature != 1.0)
        values = of_row * (min(num_tokens, PROMPT_LOGPROB_ROWS) if on_gpu else num_tokens)
    logits = shapes.text.vocab_size * values
    held = {"weights": model_bytes(shapes, e) // shards}
    if on_gpu:
        held["input buffers"] = e * num_tokens * shapes.text.hidden * (1 + shapes.vision.deepstack)
    if on_gpu and not eager:
        held["CUDA graphs"] = CUDA_GRAPH_BYTES
    if not scores and config.learner.publishes_adapters:
        held["adapter slot"] = e * slot_numbers(shapes, config.learner)
    kv_cache = engine.kv_cache_bytes or CPU_KV_CACHE_BYTES
    if on_gpu and engine.kv_cache_bytes is None:
        passing = max(num_tokens * activations.text_layer_passing(shapes, e, shards), logits)
        whole_blocks = -(-engine.max_model_len // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
        one_sequence = whole_blocks * kv_bytes_per_token(shapes, engine.dtype, shards)
        planned = int(engine.gpu_memory_utilization * gpu_bytes)
        kv_cache = max(planned - passing - sum(held.values()), one_sequence)
    prefill = activations.forward_bytes(shapes, e, num_tokens, video_tokens, shards)
    phases = {"prefill": prefill, "logits": {"logits": logits}}
    if not scores and config.weight_transfer == "collective":
        phases["new weights"] = {"NCCL's buffers": 2 * buffer_bytes(shapes, config.learner)}
    return ProcessMemory(held | {"KV cache": kv_cache}, phases)


def support_memory(config: Config, student: ModelShapes) -> list[RoleMemory]:
    """Processes without a model, and the object store, which holds one published version."""
    names = ["driver", "ray", "curriculum", *(["serve"] if config.needs_teacher else [])]
    held = {name: {"empty process": EMPTY_PROCESS_BYTES[name]} for name in names}
    held["object store"] = {"published weights": published_bytes(config, student)}
    return [RoleMemory(name, 1, 0.0, None, ProcessMemory(terms, {})) for name, terms in held.items()]


def _prompts_bytes(
    config: Config, work: Workload, in_engine: int, calls: int, most: int, clips: int = 1
) -> dict[str, int]:
    """On the host: frames (mapped files of the node's cache) of the prompts in the engine, and ahead of it.

    Ahead: video.feed_bytes, and one prompt of each call under way (video_opd/models/feed.py). most: prompts
    of those calls. clips: Config.teacher_clips."""
    ahead = calls + config.video.feed_bytes // max(1, clips * work.clip_bytes)
    return {"decoded frames": min(most, in_engine + ahead) * work.clip_bytes}


def _processed_bytes(frames: Mapping[str, int], work: Workload, clips: int = 1) -> dict[str, int]:
    """On the host, of vLLM: patches of those prompts, as bytes; with others, its cache has PROCESSED_GIB."""
    cache, pool = int(PROCESSED_GIB * GIB), work.num_clips * work.clip_bytes
    return {"processed clips": max(clips * frames["decoded frames"], min(cache, pool or cache))}


def _bucket_bytes(config: Config, student: ModelShapes) -> dict[str, int]:
    """On the host: one bucket of weights in transfer, at most learner.bucket_bytes."""
    return {"weight bucket": min(config.learner.bucket_bytes, published_bytes(config, student))}


def _largest_tensor(shapes: ModelShapes, dtype: str) -> int:
    """On the host while vLLM loads: it maps the files and takes one tensor after the other."""
    return DTYPE_BYTES[dtype] * max(count({name: shape}) for name, shape in parameters(shapes).items())


def _place(
    role: str, processes: int, num_gpus: float, computing: ProcessMemory, host: dict[str, int], loading: int
) -> RoleMemory:
    """With a GPU the host holds what a role loads only meanwhile; without one it holds everything."""
    host = {"empty process": EMPTY_PROCESS_BYTES[role]} | host
    if not num_gpus:
        return RoleMemory(role, processes, 0.0, None, ProcessMemory(host | computing.held, computing.phases))
    device = ProcessMemory(computing.held | {"CUDA context": GPU_CONTEXT_BYTES}, computing.phases)
    return RoleMemory(
        role, processes, min(1.0, num_gpus), device, ProcessMemory(host, {"loading": {"from files": loading}})
    )
