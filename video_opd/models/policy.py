"""The distribution that actor, teacher and learner share: softmax(logits / T) without banned ids."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

BANNED = -1e9  # added to the logits of banned ids: their probability is 0; finite, so that 0 * log 0 is 0

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [R, H] -> logits [R, V]."""


class Policy:
    """Raw logits -> those of the policy. An actor's vLLM makes the same of its requests' settings."""

    def __init__(self, temperature: float, banned_ids: Sequence[int], device: torch.device | str):
        self._temperature = temperature
        self._banned = torch.tensor(banned_ids, device=device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """logits[R, V], changed in place; at another temperature than 1 in float32 at least."""
        if self._temperature != 1.0:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(self._temperature)
        ban = logits.new_full((len(logits), len(self._banned)), BANNED)
        return logits.index_add_(-1, self._banned, ban)  # backward passes the gradient on; a fill copies it


def score_by_policy(worker: Any, temperature: float, banned_ids: Sequence[int]) -> None:
    """Makes the prompt log-probs of a vLLM worker, in which this runs, those of the policy.

    vLLM computes them from raw logits, whatever the request: vllm/v1/worker/gpu_model_runner.py, and, of its
    second runner, gpu/sample/prompt_logprob.py. What it samples stays as the request says.
    """
    runner = worker.model_runner
    policy = Policy(temperature, banned_ids, runner.device)
    second = getattr(runner, "prompt_logprobs_worker", None)
    if second is None:  # then requests without `logprobs` need the sampler's for prompts alone
        of_logits = runner.sampler.compute_logprobs
        runner.sampler.compute_logprobs = lambda logits: of_logits(policy(logits))
        return
    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        setattr(second, name, partial(_scored, policy, getattr(second, name)))


def _scored(policy: Policy, compute: Callable[..., Any], logits_of: LogitsOf, *arguments: Any) -> Any:
    return compute(lambda hidden: policy(logits_of(hidden)), *arguments)
