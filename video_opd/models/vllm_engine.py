"""vLLM for rollout, evaluation and the teacher: starting it, and giving it encoded prompts."""

import gc
import hashlib
import importlib
import itertools
import json
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from video_opd.config import RolloutConfig
from video_opd.config_teachers import TeacherConfig
from video_opd.errors import ParityError
from video_opd.models.prompting import first_difference
from video_opd.models.shared_gpu import is_shared, starting_alone
from video_opd.types import EncodedPrompt, FinishReason

EngineConfig = RolloutConfig | TeacherConfig
LEAST_UTILIZATION = 0.01
PROCESSED_GIB = 1.0  # videos that vLLM has processed and keeps on the host, for prompts of the same video


def start_vllm(model: str, config: EngineConfig, seed: int, trust_remote_code: bool = False, **options: Any):
    """A vLLM engine in this process, with the safetensors of a folder. `options`: of vllm.LLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # whatever the node says: see SamplingEngine.settle
    from vllm import LLM

    if options.get("enforce_eager") and not config.num_gpus:
        _never_compile()
    options |= memory_options(config) | parallel_options(config)
    if not config.num_gpus:  # a seeded request with a chunked prefill fails: its generator cannot be rewound
        options["enable_chunked_prefill"] = False
        _register_architecture(model)
    # frames are read-only, and nobody writes to them
    warnings.filterwarnings("ignore", "The given NumPy array is not writ")
    gc.freeze()  # vLLM collects garbage five times while it starts: skip imported objects
    with starting_alone(config.num_gpus):
        llm = LLM(
            model,
            dtype=config.dtype,
            load_format="safetensors",
            generation_config="vllm",  # of the folder's generation_config.json only the end tokens count
            trust_remote_code=trust_remote_code,
            seed=seed,
            max_model_len=config.max_model_len,
            limit_mm_per_prompt={"video": 1, "image": 0},
            skip_mm_profiling=True,
            mm_processor_cache_gb=PROCESSED_GIB,
            disable_log_stats=True,
            **options,
        )
    if config.tensor_parallel > 1:  # a process that lost a shard must be lost itself, to be replaced
        llm.llm_engine.model_executor.register_failure_callback(_end_process)
    return llm


def _never_compile() -> None:
    """Else vLLM compiles functions of its sampler, once a shape, also with enforce_eager: 5 s of CPU time."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # for the processes of tensor_parallel
    of_compiler: Any = importlib.import_module("torch._dynamo.config")
    of_compiler.disable = True  # for this one


def memory_options(config: EngineConfig) -> dict[str, Any]:
    """vLLM's options for memory. On a shared GPU it may not measure, since its neighbours allocate too.

    A given KV cache ends the measuring (vllm/v1/worker/gpu_worker.py), but not the check that the share
    gpu_memory_utilization of the whole GPU is free (request_memory in vllm/v1/worker/utils.py)."""
    options: dict[str, Any] = {}
    if config.kv_cache_bytes:
        options["kv_cache_memory_bytes"] = config.kv_cache_bytes
    if config.num_gpus:
        unmeasured = config.kv_cache_bytes and is_shared(config.num_gpus)
        options["gpu_memory_utilization"] = LEAST_UTILIZATION if unmeasured else config.gpu_memory_utilization
    return options


def parallel_options(config: EngineConfig) -> dict[str, Any]:
    """vLLM's options for tensor parallelism: Ray actors in the placement group, or processes of this one."""
    if config.tensor_parallel == 1:
        return {}
    if not config.num_gpus:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it wants a NUMA node per process
    # mp on a CPU: its processes lack cpu_torch.py and need torch's own torchvision
    backend = "ray" if config.num_gpus and ray.is_initialized() else "mp"
    return {"tensor_parallel_size": config.tensor_parallel, "distributed_executor_backend": backend}


def _end_process() -> None:
    os._exit(1)


def _register_architecture(model: str) -> None:
    """Imports the model's class here, not in vLLM's subprocess, which lacks cpu_torch."""
    from vllm import ModelRegistry

    (architecture,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def vllm_prompt(encoded: EncodedPrompt, response: np.ndarray | None = None) -> dict[str, Any]:
    """vLLM's input: UNEXPANDED prompt ids (vLLM expands the video pad), the response, and the frames.

    The video's name stands for its pixels in vLLM's caches, so that vLLM hashes none, and for its times,
    because the processor's cache holds the timestamps' text, too.
    """
    ids = encoded.unexpanded_token_ids + ([] if response is None else response.tolist())
    seen = json.dumps([encoded.frames_digest, encoded.video_metadata])
    return {
        "prompt_token_ids": ids,
        "multi_modal_data": {"video": [(encoded.frames, encoded.video_metadata)]},
        "multi_modal_uuids": {"video": [hashlib.blake2b(seen.encode(), digest_size=16).hexdigest()]},
    }


def check_expansion(encoded: EncodedPrompt, seen: list[int], party: str) -> None:
    """Raises ParityError unless vLLM expanded the prompt into the same ids as transformers."""
    if where := first_difference(encoded.token_ids, np.asarray(seen)):
        what = f"{party}'s vLLM does not expand it as the processor does"
        raise ParityError(f"prompt {encoded.prompt_id}: {what}: {where}")


class Added(NamedTuple):
    """A prompt in the engine."""

    name: str  # of its output
    internal_name: str
    states: Sequence[Any] = ()  # vLLM's, of its answers


class Rendered(NamedTuple):
    """A prompt as vLLM takes it."""

    vllm_input: Any
    was_processed: bool  # the clip: vLLM had it from another prompt


@dataclass(frozen=True)
class Completion:
    """One sampled response."""

    token_ids: np.ndarray  # int32[N]
    logprobs: np.ndarray  # float32[N]
    finish_reason: FinishReason
    text: str
    top_k_ids: np.ndarray | None = None  # int32[N, K], the likeliest tokens; None for K = 0


def most_likely(position: Mapping[int, Any], k: int) -> list[int]:
    """The k likeliest tokens of vLLM's log-probs of a position, which hold the given token's too."""
    return sorted(position, key=lambda token: position[token].rank)[:k]


class SamplingEngine:
    """Samples from a student's folder with vLLM. For one thread, except `render`."""

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        seed: int,
        banned_ids: Sequence[int],
        top_k: int = 0,
        **options: Any,
    ):
        """`banned_ids` are never sampled: the learner would take a sampled video pad for a video.

        top_k: K, of how many of the likeliest tokens answers have the ids.
        """
        from video_opd.models.policy import BANNED  # imports torch

        self._config, self._top_k = config, top_k
        self._banned = dict.fromkeys(banned_ids, BANNED)
        self._adapter: Any = None  # a LoRARequest for what is sampled; None: the folder's weights alone
        self._numbers = itertools.count()
        self._one_at_a_time = threading.Lock()
        options |= {"enforce_eager": config.enforce_eager, "max_num_seqs": config.max_num_seqs}
        options["logprobs_mode"] = "processed_logprobs"  # with the temperature and the ban
        options["max_logprobs"] = max(top_k, 1)  # at least one: a request may name tokens
        self._llm: Any = start_vllm(model, config, seed, **options)

    @property
    def tokens_a_pass(self) -> int:
        """The most tokens that one step computes."""
        return self._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens

    def waiting(self) -> tuple[int, int]:
        """Tokens of the prompts in the engine that no step has computed, and the answers under way."""
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        begun = sum(max(0, r.num_prompt_tokens - r.num_computed_tokens) for r in scheduler.running)
        return begun + sum(r.num_tokens for r in scheduler.waiting), len(scheduler.running)

    def render(self, encoded: EncodedPrompt) -> Rendered:
        """vLLM's processing of a prompt, all that is slow: patches from frames, and ids. From any thread.

        Not by vLLM's cache of what the engine holds, which breaks when a rendered prompt is never added.
        """
        renderer = self._llm.llm_engine.renderer
        with self._one_at_a_time:  # neither the processor nor its cache is thread-safe
            (prompt,) = renderer.render_cmpl([vllm_prompt(encoded)], skip_mm_cache=True)
            since_last = renderer._mm_processor_only_cache.make_stats(delta=True)
        return Rendered(prompt, since_last.hits > 0)

    def add(
        self, rendered: Rendered, seed: int | None, num_answers: int = 1, temperature: float | None = None
    ) -> Added:
        """Begins answers to a rendered prompt: sampled, the i-th by seed + i; with None one, greedy.

        temperature: None: the config's. Raises ValueError for a prompt that vLLM refuses.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            n=num_answers,
            temperature=0.0 if seed is None else temperature or self._config.temperature,
            seed=seed,
            max_tokens=self._config.max_response_tokens,
            logprobs=self._top_k,
            logit_bias=self._banned,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name, engine = str(next(self._numbers)), self._llm.llm_engine
        internal = engine.add_request(name, rendered.vllm_input, parameters, lora_request=self._adapter)
        # ParentRequest.get_child_info of vllm/v1/engine/parallel_sampling.py
        names = [internal] if num_answers == 1 else [f"{i}_{internal}" for i in range(num_answers)]
        return Added(name, internal, [engine.output_processor.request_states[n] for n in names])

    def step(self) -> list[Any]:
        """One pass of the model. Returns vLLM's output of each prompt whose last answer is finished."""
        return self._llm.llm_engine.step()

    def settle(self) -> None:
        """Ends the pass that vLLM, on GPUs, has begun before it knew that nothing is left to sample."""
        core = self._llm.llm_engine.engine_core.engine_core
        while core.batch_queue:
            self.step()

    def abort(self, added: Sequence[Added]) -> None:
        self._llm.llm_engine.abort_request([a.internal_name for a in added], internal=True)

    def num_cached_tokens(self, added: Added) -> int:
        """How many tokens of the prompts of its answers, all begun, came from the prefix cache."""
        return sum(state.num_cached_tokens for state in added.states)

    def completions(self, encoded: EncodedPrompt, output: Any) -> list[Completion]:
        """The answers in an output of `step`. Log-probs are those of the distribution sampled from.

        Of a greedy answer they are those at temperature 1.
        """
        check_expansion(encoded, output.prompt_token_ids, "the actor")
        return [self._completion(answer) for answer in output.outputs]

    def generate(
        self, prompts: Sequence[EncodedPrompt], seeds: Sequence[int] | None, num_answers: int = 1
    ) -> list[list[Completion]]:
        """num_answers to each prompt, one after another; see `add`. `seeds`: one per prompt."""
        of_prompt = zip(prompts, seeds or [None] * len(prompts), strict=True)
        names = [self.add(self.render(prompt), seed, num_answers).name for prompt, seed in of_prompt]
        outputs: dict[str, Any] = {}
        while not outputs.keys() >= set(names):
            outputs |= {output.request_id: output for output in self.step()}
        return [self.completions(p, outputs[name]) for p, name in zip(prompts, names, strict=True)]

    def _completion(self, answer: Any) -> Completion:
        ids = np.asarray(answer.token_ids, dtype=np.int32)
        assert not np.isin(ids, list(self._banned)).any(), f"a banned token was sampled: {ids}"
        steps = zip(answer.logprobs, answer.token_ids, strict=True)
        logprobs = np.asarray([step[token].logprob for step, token in steps], np.float32)
        top = [most_likely(step, self._top_k) for step in answer.logprobs]
        top_k_ids = np.asarray(top, np.int32) if self._top_k else None
        return Completion(ids, logprobs, FinishReason(answer.finish_reason), answer.text, top_k_ids)
