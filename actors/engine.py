"""The vLLM engine of a rollout actor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from video_opd.config import RolloutConfig
from video_opd.types import EncodedPrompt, FinishReason, WeightBucket
from video_opd.vllm_engine import check_expansion, start_vllm, vllm_prompt


@dataclass(frozen=True)
class Completion:
    """One sampled response."""

    token_ids: np.ndarray  # int32[N]
    logprobs: np.ndarray  # float32[N]
    finish_reason: FinishReason
    text: str


class PolicyEngine:
    """Samples from the student with vLLM; its weights can be replaced between calls."""

    def __init__(self, model: str, config: RolloutConfig, seed: int, banned_ids: Sequence[int]):
        """`banned_ids` are never sampled: a sampled video pad would be taken for a video by the learner."""
        self._config = config
        self._banned = dict.fromkeys(banned_ids, -100.0)
        self._llm: Any = start_vllm(
            model,
            config,
            seed,
            enforce_eager=config.enforce_eager,
            max_num_seqs=config.max_num_seqs,
            worker_extension_cls="actors.weight_receiver.WeightReceiver",
        )

    def generate(self, prompts: Sequence[EncodedPrompt], seeds: Sequence[Sequence[int]] | None) -> list[list[Completion]]:
        """Responses to each prompt: one per seed, sampled at temperature 1; greedy, and one, when `seeds` is None.

        Log-probs are those of the model itself, before the ban.
        """
        from vllm import SamplingParams

        wanted = [(p, seed) for p, row in zip(prompts, seeds or [[None]] * len(prompts), strict=True) for seed in row]
        parameters = [
            SamplingParams(
                temperature=0.0 if seed is None else self._config.temperature,
                seed=seed,
                max_tokens=self._config.max_response_tokens,
                logprobs=0,
                logit_bias=self._banned,
            )
            for _, seed in wanted
        ]
        outputs = self._llm.generate([vllm_prompt(p) for p, _ in wanted], parameters, use_tqdm=False)
        completions = []
        for (prompt, _), output in zip(wanted, outputs, strict=True):
            check_expansion(prompt, output.prompt_token_ids, "the actor")
            completions.append(self._completion(output.outputs[0]))
        grouped = iter(completions)
        return [[next(grouped) for _ in row] for row in (seeds or [[None]] * len(prompts))]

    def _completion(self, output) -> Completion:
        ids = np.asarray(output.token_ids, dtype=np.int32)
        assert not np.isin(ids, list(self._banned)).any(), f"a banned token was sampled: {ids}"
        logprobs = [position[token].logprob for position, token in zip(output.logprobs, output.token_ids, strict=True)]
        return Completion(ids, np.asarray(logprobs, np.float32), FinishReason(output.finish_reason), output.text)

    def load_weights(self, buckets: list[WeightBucket]) -> None:
        """Swaps the weights and drops all that was computed with the old ones. No generation may be under way."""
        self._llm.collective_rpc("receive_weights", args=(buckets,))
        assert self._llm.reset_prefix_cache(), "blocks of the prefix cache are still in use"
        self._llm.llm_engine.reset_encoder_cache()
