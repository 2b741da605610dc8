"""What a run needs of memory, computed before it starts: bytes of every process, by role.

Pure functions of shapes and configuration. Letters in the formulas:

    e   bytes of a number in the role's dtype: 2 in bfloat16, 4 in float32
    P   parameters of the model; T those that are trained; n data-parallel ranks
    H I Q K L V   the language model's hidden and MLP widths, width of all its query and of all its key heads, layers, vocabulary
    h i o   the vision tower's hidden and MLP widths, and the width of its output;  D deepstack outputs
    B S R   sequences of a pass, tokens of the longest sequence, response tokens of the pass
    p   patches of the clips of a pass: merge^2 for each video token

A process holds some things always and others in phases that do not overlap: its peak is what it holds and its largest phase.
Activation formulas count the tensors of transformers' own modules; tests/test_memory_plan.py compares them with real passes.
Not counted: fragmentation of the allocator and NCCL's buffers. No GPU has run these configurations.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preflight.model_shapes import ModelShapes, Parameters, count, parameters
from video_opd.config import Config, LearnerConfig, LossConfig, RolloutConfig, TeacherConfig
from video_opd.config_data import VideoConfig
from video_opd.types import Prompt
from video_opd.video.clips import TEMPORAL_PATCH, frames_key

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
VISION_PREFIX = "model.visual."

TEXT_TOKENS = 128  # template, query and chat format: an allowance
PAIR_TOKENS = {
    "qwen3_vl": 11,
    "qwen2_5_vl": 0,
}  # a frame pair's "<123.4 seconds>", nine tokens, and its two vision marks

# DeepSpeed 0.19, its defaults, in numbers rather than bytes (deepspeed/runtime/zero/config.py).
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000

# vLLM 0.32: tokens of one prefill pass of an engine made by LLM(...), on large GPUs and on a CPU (vllm/engine/arg_utils.py).
GPU_BATCHED_TOKENS, CPU_BATCHED_TOKENS = 16384, 4096
CPU_KV_CACHE_BYTES = 4 * GIB  # without rollout.kv_cache_bytes
VLLM_LOGIT_COPIES = 3  # float32 logits, log-probs, and what sampling sorts

TEACHER_LOGIT_COPIES = 4  # logits, and the three of token_entropy

GPU_CONTEXT_BYTES = GIB  # CUDA context and libraries of a process: assumed, not measured
CUDA_GRAPH_BYTES = GIB  # of a vLLM engine without enforce_eager: assumed, not measured

# Proportional set size of a process whose engine has started and has done nothing, demo models, one process of each role:
# `python -m benchmarks.memory_estimate --empty`. Pages that several processes share count once over all of them.
EMPTY_PROCESS_BYTES = {
    "driver": 285 << 20,
    "ray": 645 << 20,
    "serve": 90 << 20,
    "curriculum": 78 << 20,
    "actors": 596 << 20,
    "teacher": 380 << 20,
    "learner": 424 << 20,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the clips of a split ask of memory."""

    mean_video_tokens: float | None  # of a prompt; None: unknown
    max_video_tokens: int  # of a prompt
    max_prompt_tokens: int  # video, timestamps and text
    clip_bytes: int  # decoded frames of the largest clip


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes that a process always holds, and what each of its phases adds; phases do not overlap."""

    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def largest_phase(self) -> str:
        """Its name; empty without phases."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()), default="")

    @property
    def terms(self) -> dict[str, int]:
        """What the peak is made of, bytes by name."""
        return self.held | self.phases.get(self.largest_phase, {})

    @property
    def peak_bytes(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class RoleMemory:
    """The processes of one role, all alike. `device` is None where they compute on the CPU: all is in `host` then."""

    role: str
    processes: int
    gpu_share: float  # of one GPU, for one process
    device: ProcessMemory | None
    host: ProcessMemory


def workload_of(prompts: Sequence[Prompt], shapes: ModelShapes) -> Workload:
    """Of real clips: (F / 2) (H / m) (W / m) video tokens for F frames of H x W, m pixels a side of a video token."""
    clips = {frames_key(p.clip): p.clip for p in prompts}
    pairs = [len(p.clip.frame_indices) // TEMPORAL_PATCH for p in prompts]
    tokens = [
        n * (p.clip.frame_size[0] // shapes.size_multiple) * (p.clip.frame_size[1] // shapes.size_multiple)
        for n, p in zip(pairs, prompts, strict=True)
    ]
    return Workload(
        mean_video_tokens=sum(tokens) / len(tokens),
        max_video_tokens=max(tokens),
        max_prompt_tokens=max(
            t + n * PAIR_TOKENS[shapes.model_type] for t, n in zip(tokens, pairs, strict=True)
        )
        + TEXT_TOKENS,
        clip_bytes=max(len(c.frame_indices) * c.frame_size[0] * c.frame_size[1] * 3 for c in clips.values()),
    )


def workload_of_budget(video: VideoConfig, shapes: ModelShapes) -> Workload:
    """The most that the config's own video budget allows, where the clips are not there to be counted."""
    pairs = min(video.max_frames // TEMPORAL_PATCH, video.max_video_tokens)
    return Workload(
        mean_video_tokens=None,
        max_video_tokens=video.max_video_tokens,
        max_prompt_tokens=video.max_video_tokens + pairs * PAIR_TOKENS[shapes.model_type] + TEXT_TOKENS,
        clip_bytes=video.max_video_tokens * TEMPORAL_PATCH * shapes.size_multiple**2 * 3,
    )


# --- parameters, optimizer, KV cache: exact ---


def trained(shapes: ModelShapes, learner: LearnerConfig) -> Parameters:
    """What is trained: with lora_rank r the adapters alone, r (inputs + outputs) for each linear layer that lora_targets
    names; else all weights; without the vision tower where it is frozen."""
    of = parameters(shapes)
    if learner.lora_rank:
        linear = {n.removesuffix(".weight"): s for n, s in of.items() if len(s) == 2 and "embed" not in n}
        targets = {n: s for n, s in linear.items() if re.fullmatch(learner.lora_targets, n)}
        of = {f"{n}.lora": (learner.lora_rank, sum(s)) for n, s in targets.items()}
    return {n: s for n, s in of.items() if not (learner.freeze_vision and n.startswith(VISION_PREFIX))}


def kv_bytes_per_token(shapes: ModelShapes, dtype: str) -> int:
    """2 L K e: a key and a value in every layer."""
    return 2 * shapes.text.layers * shapes.text.key * DTYPE_BYTES[dtype]


def optimizer_bytes(num_trained: int, learner: LearnerConfig) -> dict[str, int]:
    """Of one rank: Adam's two moments 8T; masters 4T in bfloat16, and in float32 with ZeRO-1 and 2, whose partition is a copy.
    ZeRO 1 to 3 divide both by n."""
    ranks = learner.world_size if learner.zero_stage else 1
    copied = learner.dtype == "bfloat16" or learner.zero_stage > 0
    return {
        "optimizer moments": 8 * num_trained // ranks,
        "float32 masters": 4 * num_trained // ranks if copied else 0,
    }


def gradient_bytes(num_trained: int, learner: LearnerConfig) -> dict[str, int]:
    """Of one rank: eT; with ZeRO-2 and 3 eT / n. With ZeRO the bucket in which they are reduced as well, e REDUCE_BUCKET
    numbers, which a CPU touches only as far as there are gradients."""
    e = DTYPE_BYTES[learner.dtype]
    ranks = learner.world_size if learner.zero_stage >= 2 else 1
    bucket = REDUCE_BUCKET if learner.num_gpus else min(REDUCE_BUCKET, num_trained)
    return {"gradients": e * num_trained // ranks} | (
        {"gradient bucket": e * bucket} if learner.zero_stage else {}
    )


def weight_bytes(shapes: ModelShapes, learner: LearnerConfig) -> dict[str, int]:
    """Of one rank: eP; with ZeRO-3 eP / n, and what is gathered at a time: at most LIVE_PARAMETERS, at least the largest."""
    e, of = DTYPE_BYTES[learner.dtype], parameters(shapes)
    total = count(of)
    if learner.zero_stage < 3:
        return {"weights": e * total}
    largest = max(count({n: s}) for n, s in of.items())
    return {
        "weights": e * total // learner.world_size,
        "gathered weights": e * min(total, max(LIVE_PARAMETERS, largest)),
    }


def step_bytes(num_trained: int, learner: LearnerConfig) -> int:
    """Of the optimizer step: float32 gradients 4T / n and AdamW's square roots 4T / n; with ZeRO-3 of SUB_GROUP numbers at a
    time; without ZeRO in float32 the gradients are there already."""
    part = num_trained // (learner.world_size if learner.zero_stage else 1)
    if learner.zero_stage == 3:
        part = min(part, SUB_GROUP)
    return part * (4 if learner.dtype == "float32" and learner.zero_stage == 0 else 8)


# --- activations ---


def logit_copies(loss: LossConfig) -> int:
    """Float32 copies of a chunk's logits [rows, V] at the peak of learner/loss.py and token_entropy: 5; 8 where the loss is over
    the whole vocabulary, 12 for its jsd."""
    if loss.needs.teacher != "hidden":
        return 5
    return 12 if loss.kind == "opd_full" and loss.divergence == "jsd" else 8


def text_layer_saved(shapes: ModelShapes, e: int) -> int:
    """Bytes a token that one decoder layer keeps for its backward pass: 2H (4 + 2e) for the norms (float32 input, normalised,
    output), (Q + K)(4 + e) for Qwen3's norms of queries and keys, 4eQ for attention (queries, keys and values repeated to all
    heads, output), 4eI for the MLP (gate, its activation, up, their product)."""
    t = shapes.text
    head_norms = (t.query + t.key) * (4 + e) if shapes.model_type == "qwen3_vl" else 0
    return 2 * t.hidden * (4 + 2 * e) + head_norms + 4 * e * t.query + 4 * e * t.intermediate


def text_layer_gradients(shapes: ModelShapes, e: int) -> int:
    """Bytes a token beyond what a layer kept while its MLP goes backward: 3eI + 2eH."""
    return 3 * e * shapes.text.intermediate + 2 * e * shapes.text.hidden


def text_layer_passing(shapes: ModelShapes, e: int) -> int:
    """Bytes a token at the peak of one decoder layer that keeps nothing: 4eH (embeddings, input, residual, norm) beside the
    larger of attention 4eQ + 2eK and MLP 3eI."""
    t = shapes.text
    return 4 * e * t.hidden + max(4 * e * t.query + 2 * e * t.key, 3 * e * t.intermediate)


def vision_block_saved(shapes: ModelShapes, e: int) -> int:
    """Bytes a patch that one vision block keeps: Qwen3-VL 11eh + 2ei (two layer norms 4eh, qkv 3eh, rotated queries and keys
    2eh, attention 2eh, MLP 2ei); Qwen2.5-VL's norms keep 2h (4 + 2e), its gated MLP 4ei."""
    v = shapes.vision
    if shapes.model_type == "qwen3_vl":
        return e * (11 * v.hidden + 2 * v.intermediate)
    return 2 * v.hidden * (4 + 2 * e) + e * (7 * v.hidden + 4 * v.intermediate)


def vision_block_passing(shapes: ModelShapes, e: int) -> int:
    """Bytes a patch at the peak of one vision block that keeps nothing: 2eh of input and norm, Qwen3-VL's position embeddings
    in float32 4h, and the largest of rotation in float32 (3eh of qkv, 16h, and 8h of copies where e is 2), the end of attention
    8eh, and MLP 2ei (3ei where it is gated)."""
    v, qwen3 = shapes.vision, shapes.model_type == "qwen3_vl"
    rotation = 3 * e * v.hidden + 16 * v.hidden + (8 * v.hidden if e == 2 else 0)
    mlp = (2 if qwen3 else 3) * e * v.intermediate
    return 2 * e * v.hidden + (4 * v.hidden if qwen3 else 0) + max(rotation, 8 * e * v.hidden, mlp)


def video_bytes(shapes: ModelShapes, e: int, video_tokens: int) -> dict[str, int]:
    """Pixels: float32 as they come, and in the role's dtype where that is another. Features: e o (1 + D) a video token."""
    v = shapes.vision
    patches = video_tokens * v.patches_a_token
    return {
        "pixels": patches * v.patch_values * (4 + (e if e == 2 else 0)),
        "video features": video_tokens * v.output * (1 + v.deepstack) * e,
    }


def longest_sequence(config: Config, work: Workload, max_model_len: int) -> int:
    """S: the longest prompt and a whole response, never beyond max_model_len."""
    return min(work.max_prompt_tokens + config.rollout.max_response_tokens, max_model_len)


# --- the roles ---


def learner_memory(
    config: Config, student: ModelShapes, teacher: ModelShapes | None, train: Workload
) -> RoleMemory:
    """A rank. Phases, each beside weights, gradients, masters and moments:

    vision: the pass of the vision tower, vision_block_passing p.
    loss: what all layers keep, and 4V logit_copies for each of min(R, logit_rows) rows.
    backward: what all layers keep, one layer's recomputation where gradient_checkpointing is on, and text_layer_gradients.
    optimizer step: step_bytes.

    All layers keep L B S text_layer_saved; with gradient_checkpointing L B S eH. A tower that is trained keeps in the same way.
    With micro_batch over 1 the attention mask takes B S^2 (1 + e).
    """
    learner, e, batch = config.learner, DTYPE_BYTES[config.learner.dtype], config.learner.micro_batch
    num_trained = count(trained(student, learner))
    length = longest_sequence(config, train, config.rollout.max_model_len)
    tokens, patches = batch * length, batch * train.max_video_tokens * student.vision.patches_a_token
    kept, again = _kept(student, learner, tokens, patches)
    video = video_bytes(student, e, batch * train.max_video_tokens)
    of_pass = {
        "activations kept": kept,
        "attention mask": batch * length**2 * (1 + e) if batch > 1 else 0,
    } | video
    rows = min(learner.logit_rows, batch * config.rollout.max_response_tokens)
    logits = rows * student.text.vocab_size * 4 * logit_copies(config.loss)
    head = {}
    if config.loss.needs.teacher == "hidden" and teacher:
        values = teacher.text.vocab_size * teacher.text.hidden * len(config.teacher_models)
        head["teacher's head"] = values * DTYPE_BYTES[config.teacher_pool.dtype]
    computing = ProcessMemory(
        held={
            **weight_bytes(student, learner),
            **gradient_bytes(num_trained, learner),
            **optimizer_bytes(num_trained, learner),
            **head,
        },
        phases={
            "vision": {"vision pass": patches * vision_block_passing(student, e)} | video,
            "loss": of_pass | {"logits": logits},
            "backward": of_pass
            | {"activations again": again, "their gradients": tokens * text_layer_gradients(student, e)},
            "optimizer step": {"float32 gradients and roots": step_bytes(num_trained, learner)},
        },
    )
    host = _prompts_bytes(student, train, batch) | _buckets(config, student)
    if learner.vision_cache_bytes:
        host["vision cache"] = learner.vision_cache_bytes
    return _place("learner", learner.world_size, learner.num_gpus, computing, host)


def actors_memory(
    config: Config, student: ModelShapes, train: Workload, evaluation: Workload, gpu_bytes: int
) -> RoleMemory:
    """A vLLM engine; see vllm_memory. Sampling takes 4V VLLM_LOGIT_COPIES for each of max_num_seqs."""
    rollout = config.rollout
    logits = rollout.max_num_seqs * student.text.vocab_size * 4 * VLLM_LOGIT_COPIES
    computing = vllm_memory(
        config,
        rollout,
        student,
        together(train, evaluation),
        rollout.max_num_seqs,
        lambda _: logits,
        rollout.enforce_eager,
        gpu_bytes,
    )
    host = _prompts_bytes(student, together(train, evaluation), rollout.prompts_per_call) | _buckets(
        config, student
    )
    return _place("actors", rollout.num_actors, rollout.num_gpus, computing, host)


def teacher_memory(
    config: Config, teacher: ModelShapes, train: Workload, evaluation: Workload, gpu_bytes: int
) -> RoleMemory:
    """A replica; of several teachers all are taken to be as large as the largest. With engine=vllm see vllm_memory; logits are
    those of every token of a prefill, (4 + e) V each.

    With engine=transformers weights eP and these phases, of micro_batch sequences:
    scoring: the larger of text_layer_passing B S and the vision tower's pass before it.
    response rows: 4V TEACHER_LOGIT_COPIES for each of micro_batch x max_response_tokens.
    answering: A answers to each prompt are A sequences; as scoring, and 2 L K e A B S of KV cache.
    """
    pool, e, work = config.teacher_pool, DTYPE_BYTES[config.teacher_pool.dtype], together(train, evaluation)
    if pool.engine == "vllm":
        logits = teacher.text.vocab_size * (4 + e)
        computing = vllm_memory(
            config,
            pool,
            teacher,
            work,
            pool.micro_batch,
            lambda tokens: tokens * logits,
            not pool.num_gpus,
            gpu_bytes,
        )
    else:
        length = longest_sequence(config, work, pool.max_model_len)
        rows = pool.micro_batch * config.rollout.max_response_tokens
        answers = pool.micro_batch * (
            config.curriculum.num_teacher_predictions if config.curriculum.asks_teacher else 1
        )
        computing = ProcessMemory(
            held={"weights": e * count(parameters(teacher))},
            phases={
                "scoring": _passing(
                    teacher, e, pool.micro_batch * length, pool.micro_batch * work.max_video_tokens
                ),
                "response rows": {"logits": rows * teacher.text.vocab_size * 4 * TEACHER_LOGIT_COPIES},
                "answering": {
                    **_passing(teacher, e, answers * length, answers * work.max_video_tokens),
                    "KV cache": answers * length * kv_bytes_per_token(teacher, pool.dtype),
                },
            },
        )
    host = _prompts_bytes(teacher, work, pool.max_batch_requests * config.rollout.prompts_per_call)
    processes = pool.num_replicas * len(config.teacher_models) * pool.tensor_parallel
    return _place("teacher", processes, pool.num_gpus, computing, host)


def vllm_memory(
    config: Config,
    engine: RolloutConfig | TeacherConfig,
    shapes: ModelShapes,
    work: Workload,
    num_sequences: int,
    logit_bytes: Callable[[int], int],
    eager: bool,
    gpu_bytes: int,
) -> ProcessMemory:
    """A vLLM engine: weights eP, KV cache, and phases of N tokens a pass: the longest prompt, or as many of num_sequences as
    GPU_BATCHED_TOKENS (CPU_BATCHED_TOKENS) hold.

    prefill: the larger of N text_layer_passing and the vision tower's pass over as many video tokens. vLLM plans for the
    first alone, since skip_mm_profiling is set: the second comes on top of gpu_memory_utilization.
    logits: logit_bytes(N).

    Of a teacher in tensor_parallel parts, one part: weights and KV cache are divided, and so nearly are its layers, which are
    taken whole here.

    KV cache: kv_cache_bytes; on a GPU without it what gpu_memory_utilization leaves, at least one sequence of max_model_len.
    """
    e = DTYPE_BYTES[engine.dtype]
    per_pass = GPU_BATCHED_TOKENS if engine.num_gpus else CPU_BATCHED_TOKENS
    longest = longest_sequence(config, work, engine.max_model_len)
    num_tokens = max(longest, min(per_pass, num_sequences * longest))
    video_tokens = max(work.max_video_tokens, min(num_tokens, num_sequences * work.max_video_tokens))
    parts = engine.tensor_parallel if isinstance(engine, TeacherConfig) else 1
    weights, logits = e * count(parameters(shapes)) // parts, logit_bytes(num_tokens)
    graphs = 0 if eager or not engine.num_gpus else CUDA_GRAPH_BYTES
    kv_cache = engine.kv_cache_bytes or CPU_KV_CACHE_BYTES
    if engine.num_gpus and engine.kv_cache_bytes is None:
        planned = (
            max(num_tokens * text_layer_passing(shapes, e), logits) + weights + graphs + GPU_CONTEXT_BYTES
        )
        one_sequence = engine.max_model_len * kv_bytes_per_token(shapes, engine.dtype) // parts
        kv_cache = max(int(engine.gpu_memory_utilization * gpu_bytes) - planned, one_sequence)
    return ProcessMemory(
        held={"weights": weights, "KV cache": kv_cache} | ({"CUDA graphs": graphs} if graphs else {}),
        phases={"prefill": _passing(shapes, e, num_tokens, video_tokens), "logits": {"logits": logits}},
    )


def support_memory(config: Config, student: ModelShapes) -> list[RoleMemory]:
    """What runs beside the models: processes without one, and the object store, which holds one published version, eP."""
    names = ["driver", "ray", "curriculum", *(["serve"] if config.needs_teacher else [])]
    published = (
        DTYPE_BYTES[config.learner.dtype] * count(parameters(student)) if config.rollout.num_actors else 0
    )
    return [
        *(
            RoleMemory(n, 1, 0.0, None, ProcessMemory({"empty process": EMPTY_PROCESS_BYTES[n]}, {}))
            for n in names
        ),
        RoleMemory("object store", 1, 0.0, None, ProcessMemory({"published weights": published}, {})),
    ]


def estimate(
    config: Config,
    student: ModelShapes,
    teacher: ModelShapes | None,
    train: Workload,
    evaluation: Workload,
    gpu_bytes: int,
) -> list[RoleMemory]:
    """Every role of the run. `gpu_bytes`: memory of one GPU."""
    roles = [learner_memory(config, student, teacher, train)]
    if config.rollout.num_actors:
        roles.append(actors_memory(config, student, train, evaluation, gpu_bytes))
    if config.needs_teacher and teacher:
        roles.append(teacher_memory(config, teacher, train, evaluation, gpu_bytes))
    return [*roles, *support_memory(config, student)]


def together(train: Workload, evaluation: Workload) -> Workload:
    """What both splits ask of a process that sees both."""
    return Workload(
        mean_video_tokens=train.mean_video_tokens,
        max_video_tokens=max(train.max_video_tokens, evaluation.max_video_tokens),
        max_prompt_tokens=max(train.max_prompt_tokens, evaluation.max_prompt_tokens),
        clip_bytes=max(train.clip_bytes, evaluation.clip_bytes),
    )


def _kept(student: ModelShapes, learner: LearnerConfig, tokens: int, patches: int) -> tuple[int, int]:
    """(bytes that all layers keep until the backward pass, bytes of the one that is computed again)."""
    e, text, vision = DTYPE_BYTES[learner.dtype], student.text, student.vision
    of_text, of_vision = tokens * text_layer_saved(student, e), patches * vision_block_saved(student, e)
    in_text, in_vision = tokens * text.hidden * e, patches * vision.hidden * e
    if learner.freeze_vision or learner.lora_rank:
        of_vision = in_vision = 0
    if learner.gradient_checkpointing:
        return text.layers * in_text + vision.depth * in_vision, max(of_text, of_vision)
    return text.layers * of_text + vision.depth * of_vision, 0


def _passing(shapes: ModelShapes, e: int, tokens: int, video_tokens: int) -> dict[str, int]:
    """A pass that keeps nothing: the larger of a language and a vision layer, pixels and features."""
    patches = video_tokens * shapes.vision.patches_a_token
    largest = max(tokens * text_layer_passing(shapes, e), patches * vision_block_passing(shapes, e))
    return {"one layer": largest} | video_bytes(shapes, e, video_tokens)


def _prompts_bytes(shapes: ModelShapes, work: Workload, at_once: int) -> dict[str, int]:
    """On the host: frames (mapped files of the node's cache) and pixels, float32, of `at_once` encoded prompts."""
    pixels = work.max_video_tokens * shapes.vision.patches_a_token * shapes.vision.patch_values * 4
    return {"decoded frames": at_once * work.clip_bytes, "encoded prompts": at_once * pixels}


def _buckets(config: Config, student: ModelShapes) -> dict[str, int]:
    """On the host: one bucket of weights on its way, of learner.bucket_bytes or of all weights where they are less."""
    all_of = DTYPE_BYTES[config.learner.dtype] * count(parameters(student))
    return {"weight bucket": min(config.learner.bucket_bytes, all_of)}


def _place(
    role: str, processes: int, num_gpus: float, computing: ProcessMemory, host: dict[str, int]
) -> RoleMemory:
    """On a GPU its context comes on top, and the host holds the weights while they are loaded; on a CPU all is the host's."""
    host = {"empty process": EMPTY_PROCESS_BYTES[role]} | host
    if not num_gpus:
        return RoleMemory(role, processes, 0.0, None, ProcessMemory(host | computing.held, computing.phases))
    device = ProcessMemory(computing.held | {"CUDA context": GPU_CONTEXT_BYTES}, computing.phases)
    loading = {"loading": {"weights": computing.held["weights"]}}
    return RoleMemory(role, processes, min(1.0, num_gpus), device, ProcessMemory(host, loading))
