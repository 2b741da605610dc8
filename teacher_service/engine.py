"""Scoring engines: tokens in, the teacher's log-probs out. Two engines with one interface."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from video_opd.config import TeacherConfig
from video_opd.models import forward
from video_opd.models.prompting import PromptEncoder
from video_opd.models.vllm_engine import check_expansion, start_vllm, vllm_prompt
from video_opd.types import EncodedPrompt, TopK

Encoded = Sequence[EncodedPrompt]
Texts = list[list[str]]  # the answers to each prompt


class TokenScores(NamedTuple):
    """The teacher's scores of one response of N tokens."""

    logprobs: np.ndarray  # float32[N]
    top_k: TopK | None = None
    hidden: np.ndarray | None = None  # float32[N, H]
    entropy: np.ndarray | None = None  # float32[N]


@dataclass(frozen=True)
class Wanted:
    """What the objective needs from the teacher in addition to log-probs."""

    top_k: int = 0
    hidden: bool = False


@dataclass
class ScoringEngine(ABC):
    """Scores responses and predicts answers with one teacher model."""

    model: str
    config: TeacherConfig
    wanted: Wanted
    seed: int
    encoder: PromptEncoder
    trust_remote_code: bool = False

    @abstractmethod
    def __post_init__(self) -> None:
        """Loads the model."""

    @abstractmethod
    def score(self, prompts: Encoded, responses: Sequence[np.ndarray]) -> list[TokenScores]:
        """The scores of each response int32[N], with all that is wanted."""

    @abstractmethod
    def predict(self, prompts: Encoded, num_answers: int, temperature: float, max_tokens: int) -> Texts:
        """`num_answers` texts for each prompt; temperature 0 is greedy."""


def top_k_of(logits: torch.Tensor, k: int) -> TopK:
    """The k most likely tokens of each row of logits[R, V]."""
    values, ids = logits.log_softmax(-1).topk(k, dim=-1)
    return TopK(ids=ids.to(torch.int32).cpu().numpy(), logprobs=values.cpu().numpy())


class TransformersEngine(ScoringEngine):
    """Prefill with transformers: the language-model head runs on response rows only."""

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self._device = "cuda" if self.config.num_gpus else "cpu"
        dtype, attention = self.config.dtype, self.config.attn_implementation
        self._model = forward.load_model(self.model, dtype, self.trust_remote_code, attention)
        self._model.eval().to(self._device)
        self._logits = forward.ResponseLogits(self._model)

    @torch.inference_mode()
    def score(self, prompts: Encoded, responses: Sequence[np.ndarray]) -> list[TokenScores]:
        lengths = [len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        order = np.argsort(lengths, kind="stable").tolist()  # a pass takes similar lengths
        scores: dict[int, TokenScores] = {}
        for first in range(0, len(order), self.config.micro_batch):
            chosen = order[first : first + self.config.micro_batch]
            of_chosen = self._score_batch([prompts[i] for i in chosen], [responses[i] for i in chosen])
            scores.update(zip(chosen, of_chosen, strict=True))
        return [scores[i] for i in range(len(prompts))]

    def _score_batch(self, prompts: list[EncodedPrompt], responses: list[np.ndarray]) -> list[TokenScores]:
        batch = forward.collate(prompts, responses, self.encoder.tokenizer.pad_token_id, self._device)
        hidden = self._logits.hidden(batch)
        logits = self._model.lm_head(hidden).float()
        logprobs = forward.token_logprobs(logits, batch.targets).cpu().numpy()
        entropy = forward.token_entropy(logits).cpu().numpy()
        top_k = top_k_of(logits, self.wanted.top_k) if self.wanted.top_k else None
        kept = hidden.float().cpu().numpy() if self.wanted.hidden else None
        scores = []
        for stop, length in zip(np.cumsum(batch.lengths), batch.lengths, strict=True):
            rows = slice(stop - length, stop)
            of_rows = top_k and TopK(ids=top_k.ids[rows], logprobs=top_k.logprobs[rows])
            states = None if kept is None else kept[rows]
            scores.append(TokenScores(logprobs[rows], of_rows, states, entropy[rows]))
        return scores

    def predict(self, prompts: Encoded, num_answers: int, temperature: float, max_tokens: int) -> Texts:
        tokenizer, size, texts = self.encoder.tokenizer, self.config.micro_batch, []
        how: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "banned_ids": self.encoder.pad_ids}
        how |= {"max_tokens": max_tokens, "temperature": temperature, "num_answers": num_answers}
        for first in range(0, len(prompts), size):
            answers = forward.generate(self._model, prompts[first : first + size], **how)
            texts += [[tokenizer.decode(ids, skip_special_tokens=True) for ids in row] for row in answers]
        return texts


def parallel_options(config: TeacherConfig) -> dict[str, Any]:
    """vLLM's options for tensor parallelism: Ray actors in the placement group on GPUs, processes on CPUs."""
    if config.tensor_parallel == 1:
        return {}
    if config.num_gpus:
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = f"{config.num_gpus:g}"
    else:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it wants a NUMA node per process
    backend = "ray" if config.num_gpus else "mp"  # mp: without cpu_torch.py, needs torch's own torchvision
    return {"tensor_parallel_size": config.tensor_parallel, "distributed_executor_backend": backend}


class VllmEngine(ScoringEngine):
    """Prefill with vLLM's prompt_logprobs; prefer `transformers` for long videos.

    vLLM then computes logits for every prompt position, video tokens included, and bypasses its prefix cache.
    """

    def __post_init__(self) -> None:
        limits = {"max_num_seqs": self.config.micro_batch, "max_logprobs": max(self.wanted.top_k, 1)}
        options = {"enforce_eager": not self.config.num_gpus} | limits | parallel_options(self.config)
        self._llm: Any = start_vllm(self.model, self.config, self.seed, self.trust_remote_code, **options)

    def score(self, prompts: Encoded, responses: Sequence[np.ndarray]) -> list[TokenScores]:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, prompt_logprobs=self.wanted.top_k, detokenize=False)
        inputs = [vllm_prompt(p, r) for p, r in zip(prompts, responses, strict=True)]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        scores = []
        for prompt, response, output in zip(prompts, responses, outputs, strict=True):
            check_expansion(prompt, output.prompt_token_ids[: -len(response)], "the teacher")
            positions = output.prompt_logprobs[-len(response) :]
            logprobs = [p[token].logprob for p, token in zip(positions, response.tolist(), strict=True)]
            scores.append(TokenScores(np.asarray(logprobs, np.float32), self._top_k_of(positions)))
        return scores

    def _top_k_of(self, positions: list[dict]) -> TopK | None:
        """Each position maps the K most likely tokens and the response's own to a log-prob with its rank."""
        k = self.wanted.top_k
        if not k:
            return None
        best = [sorted(p.items(), key=lambda item: item[1].rank)[:k] for p in positions]
        ids = np.asarray([[token for token, _ in row] for row in best], np.int32)
        logprobs = np.asarray([[entry.logprob for _, entry in row] for row in best], np.float32)
        return TopK(ids=ids, logprobs=logprobs)

    def predict(self, prompts: Encoded, num_answers: int, temperature: float, max_tokens: int) -> Texts:
        from vllm import SamplingParams

        never = dict.fromkeys(self.encoder.pad_ids, -100.0)
        parameters = SamplingParams(
            n=num_answers, temperature=temperature, max_tokens=max_tokens, logit_bias=never, seed=self.seed
        )
        outputs = self._llm.generate([vllm_prompt(p) for p in prompts], parameters, use_tqdm=False)
        return [[answer.text for answer in output.outputs] for output in outputs]


ENGINES: dict[str, type[ScoringEngine]] = {"transformers": TransformersEngine, "vllm": VllmEngine}
