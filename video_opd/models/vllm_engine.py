"""vLLM for rollout, evaluation and the teacher: starting it, and giving it encoded prompts."""

import gc
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from video_opd.answers import parse_span
from video_opd.config import RolloutConfig, TeacherConfig
from video_opd.errors import ParityError
from video_opd.models.prompting import PromptEncoder, first_difference
from video_opd.types import EncodedPrompt, FailedPrompt, FinishReason, Prediction, Prompt

EngineConfig = RolloutConfig | TeacherConfig
Seeds = Sequence[Sequence[int]] | None


def start_vllm(model: str, config: EngineConfig, seed: int, trust_remote_code: bool = False, **options: Any):
    """A vLLM engine in this process, with the safetensors of a folder. `options`: of vllm.LLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    if config.kv_cache_bytes:
        options["kv_cache_memory_bytes"] = config.kv_cache_bytes
    if config.num_gpus:
        options["gpu_memory_utilization"] = config.gpu_memory_utilization
    else:  # on a CPU a seeded request with a chunked prefill fails: its generator cannot be rewound
        options["enable_chunked_prefill"] = False
        _register_architecture(model)
    gc.freeze()  # vLLM collects garbage five times while it starts: skip imported objects
    return LLM(
        model,
        dtype=config.dtype,
        load_format="safetensors",
        generation_config="vllm",  # of the folder's generation_config.json only the end tokens count
        trust_remote_code=trust_remote_code,
        seed=seed,
        max_model_len=config.max_model_len,
        limit_mm_per_prompt={"video": 1, "image": 0},
        skip_mm_profiling=True,
        mm_processor_cache_gb=0,
        disable_log_stats=True,
        **options,
    )


def _register_architecture(model: str) -> None:
    """Imports the model's class here, not in vLLM's subprocess, which lacks cpu_torch."""
    from vllm import ModelRegistry

    (architecture,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def vllm_prompt(encoded: EncodedPrompt, response: np.ndarray | None = None) -> dict[str, Any]:
    """vLLM's input: UNEXPANDED prompt ids (vLLM expands the video pad), the response, and the frames."""
    ids = encoded.unexpanded_token_ids + ([] if response is None else response.tolist())
    video = (encoded.frames.copy(), encoded.video_metadata)  # vLLM warns of read-only arrays
    return {"prompt_token_ids": ids, "multi_modal_data": {"video": [video]}}


def check_expansion(encoded: EncodedPrompt, seen: list[int], party: str) -> None:
    """Raises ParityError unless vLLM expanded the prompt into the same ids as transformers."""
    if where := first_difference(encoded.token_ids, np.asarray(seen)):
        what = f"{party}'s vLLM does not expand it as the processor does"
        raise ParityError(f"prompt {encoded.prompt_id}: {what}: {where}")


@dataclass(frozen=True)
class Completion:
    """One sampled response."""

    token_ids: np.ndarray  # int32[N]
    logprobs: np.ndarray  # float32[N]
    finish_reason: FinishReason
    text: str


class SamplingEngine:
    """Samples from a student's folder with vLLM."""

    def __init__(
        self, model: str, config: RolloutConfig, seed: int, banned_ids: Sequence[int], **options: Any
    ):
        """`banned_ids` are never sampled: the learner would take a sampled video pad for a video."""
        self._config = config
        self._banned = dict.fromkeys(banned_ids, -100.0)
        self._adapter: Any = None  # a LoRARequest for what is sampled; None: the folder's weights alone
        options |= {"enforce_eager": config.enforce_eager, "max_num_seqs": config.max_num_seqs}
        self._llm: Any = start_vllm(model, config, seed, **options)

    def generate(self, prompts: Sequence[EncodedPrompt], seeds: Seeds) -> list[list[Completion]]:
        """Responses to each prompt: one per seed, sampled; one, greedy, if `seeds` is None.

        Log-probs are those of the model itself, before the ban.
        """
        finished = dict(self.stream(prompts, seeds))
        return [finished[place] for place in range(len(prompts))]

    def stream(
        self, prompts: Sequence[EncodedPrompt], seeds: Seeds
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The same as (index of the prompt, its responses), when the prompt's last response is finished."""
        from vllm import SamplingParams

        rows = seeds or [[None]] * len(prompts)
        wanted = [(place, number, seed) for place, row in enumerate(rows) for number, seed in enumerate(row)]
        parameters = [
            SamplingParams(
                temperature=0.0 if seed is None else self._config.temperature,
                seed=seed,
                max_tokens=self._config.max_response_tokens,
                logprobs=0,
                logit_bias=self._banned,
            )
            for _, _, seed in wanted
        ]
        inputs = [vllm_prompt(prompts[place]) for place, _, _ in wanted]
        names = self._llm.enqueue(inputs, parameters, lora_request=self._adapter, use_tqdm=False)
        of_request = {name.partition("-")[0]: request for name, request in zip(names, wanted, strict=True)}
        finished: list[dict[int, Completion]] = [{} for _ in prompts]
        engine = self._llm.llm_engine
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():  # only finished requests
                    place, number, _ = of_request.pop(output.request_id)
                    check_expansion(prompts[place], output.prompt_token_ids, "the actor")
                    finished[place][number] = self._completion(output.outputs[0])
                    if len(finished[place]) == len(rows[place]):
                        yield place, [finished[place][n] for n in range(len(rows[place]))]
        finally:  # a caller may stop early
            engine.abort_request(names, internal=True)

    def _completion(self, output) -> Completion:
        ids = np.asarray(output.token_ids, dtype=np.int32)
        assert not np.isin(ids, list(self._banned)).any(), f"a banned token was sampled: {ids}"
        steps = zip(output.logprobs, output.token_ids, strict=True)
        logprobs = np.asarray([step[token].logprob for step, token in steps], np.float32)
        return Completion(ids, logprobs, FinishReason(output.finish_reason), output.text)


def predict(
    encoder: PromptEncoder, engine: SamplingEngine, prompts: Sequence[Prompt], blank_video: bool = False
) -> list[Prediction | FailedPrompt]:
    """The greedy answer to each prompt, in order, or a FailedPrompt. `blank_video`: with grey frames."""
    encoded, failed = encoder.encode_readable(prompts, blank_video)
    texts = [completion.text for (completion,) in engine.generate(encoded, None)] if encoded else []
    answers: dict[str, Prediction | FailedPrompt] = dict(failed)
    for name, text in zip([e.prompt_id for e in encoded], map(encoder.written, texts), strict=True):
        answers[name] = Prediction(prompt_id=name, text=text, span_s=parse_span(text))
    return [answers[p.prompt_id] for p in prompts]
