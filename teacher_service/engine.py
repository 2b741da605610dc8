"""Scoring engines: given tokens in, the teacher's log-probs out. Two of them behind one interface."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from video_opd.config import LossConfig, TeacherConfig
from video_opd.models.forward import (
    ResponseLogits,
    collate,
    generate,
    load_model,
    token_entropy,
    token_logprobs,
)
from video_opd.models.prompting import PromptEncoder
from video_opd.models.vllm_engine import check_expansion, start_vllm, vllm_prompt
from video_opd.types import EncodedPrompt, TopK

T = TypeVar("T")


class TokenScores(NamedTuple):
    """What the teacher says of one response of N tokens."""

    logprobs: np.ndarray  # float32[N]
    top_k: TopK | None
    hidden: np.ndarray | None  # float32[N, H]
    entropy: np.ndarray | None  # float32[N]


@dataclass(frozen=True)
class Wanted:
    """What the objective needs of the teacher beside log-probs."""

    top_k: int = 0
    hidden: bool = False


def wanted_by(loss: LossConfig) -> Wanted:
    needs = loss.needs.teacher
    return Wanted(top_k=loss.top_k if needs == "top_k" else 0, hidden=needs == "hidden")


class ScoringEngine(Protocol):
    """What the teacher service asks of an engine."""

    def score(self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray]) -> list[TokenScores]:
        """For each response int32[N], what is wanted of its tokens."""
        ...

    def predict(
        self, prompts: Sequence[EncodedPrompt], num_answers: int, temperature: float, max_tokens: int
    ) -> list[list[str]]:
        """`num_answers` texts for each prompt; temperature 0 is greedy."""
        ...


def start_engine(
    model: str,
    config: TeacherConfig,
    wanted: Wanted,
    seed: int,
    encoder: PromptEncoder,
    trust_remote_code: bool,
) -> ScoringEngine:
    """The engine the config names."""
    engine = {"transformers": TransformersEngine, "vllm": VllmEngine}[config.engine]
    return engine(model, config, wanted, seed, encoder, trust_remote_code)


def top_k_of(logits: torch.Tensor, k: int) -> TopK:
    """The k most likely tokens of every row of logits[R, V]."""
    values, ids = logits.log_softmax(-1).topk(k, dim=-1)
    return TopK(ids=ids.to(torch.int32).cpu().numpy(), logprobs=values.cpu().numpy())


class TransformersEngine:
    """Prefill with transformers: the language-model head runs on response rows only."""

    def __init__(
        self,
        model: str,
        config: TeacherConfig,
        wanted: Wanted,
        seed: int,
        encoder: PromptEncoder,
        trust_remote_code: bool = False,
    ):
        torch.manual_seed(seed)
        device = "cuda" if config.num_gpus else "cpu"
        self._model = load_model(model, config.dtype, trust_remote_code).eval().to(device)
        self._logits = ResponseLogits(self._model)
        self._config, self._encoder, self._device = config, encoder, device
        self._wanted = wanted

    @torch.inference_mode()
    def score(self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray]) -> list[TokenScores]:
        lengths = [len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        order = np.argsort(lengths, kind="stable")  # like lengths share a pass
        scores: dict[int, TokenScores] = {}
        for chosen in _chunks(order.tolist(), self._config.micro_batch):
            pad_id = self._encoder.tokenizer.pad_token_id
            batch = collate(
                [prompts[i] for i in chosen], [responses[i] for i in chosen], pad_id, self._device
            )
            hidden = self._logits.hidden(batch)
            logits = self._model.lm_head(hidden).float()
            logprobs = token_logprobs(logits, batch.targets).cpu().numpy()
            entropy = token_entropy(logits).cpu().numpy()
            top_k = top_k_of(logits, self._wanted.top_k) if self._wanted.top_k else None
            kept = hidden.float().cpu().numpy() if self._wanted.hidden else None
            stops = np.cumsum(batch.lengths)
            for i, stop, length in zip(chosen, stops, batch.lengths, strict=True):
                rows = slice(stop - length, stop)
                of_rows = top_k and TopK(ids=top_k.ids[rows], logprobs=top_k.logprobs[rows])
                scores[i] = TokenScores(
                    logprobs[rows], of_rows, None if kept is None else kept[rows], entropy[rows]
                )
        return [scores[i] for i in range(len(prompts))]

    def predict(
        self, prompts: Sequence[EncodedPrompt], num_answers: int, temperature: float, max_tokens: int
    ) -> list[list[str]]:
        tokenizer, texts = self._encoder.tokenizer, []
        for chosen in _chunks(list(prompts), self._config.micro_batch):
            answers = generate(
                self._model,
                chosen,
                max_tokens=max_tokens,
                pad_id=tokenizer.pad_token_id,
                banned_ids=self._encoder.pad_ids,
                temperature=temperature,
                num_answers=num_answers,
            )
            texts += [[tokenizer.decode(ids, skip_special_tokens=True) for ids in row] for row in answers]
        return texts


def parallel_options(config: TeacherConfig) -> dict[str, Any]:
    """How vLLM cuts a model into parts: as Ray actors in the replica's placement group, without GPUs as its own processes.

    The latter in a replica need a torchvision of torch's own build: vLLM spawns them there, past cpu_torch.py.
    """
    if config.tensor_parallel == 1:
        return {}
    parts = {"tensor_parallel_size": config.tensor_parallel}
    if config.num_gpus:
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = f"{config.num_gpus:g}"
        return parts | {"distributed_executor_backend": "ray"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it wants a NUMA node for each part
    return parts | {"distributed_executor_backend": "mp"}


class VllmEngine:
    """Prefill with vLLM's prompt_logprobs.

    vLLM computes logits for every prompt position here, video tokens included, and bypasses its prefix cache:
    prefer `transformers` for long videos (STACK.md).
    """

    def __init__(
        self,
        model: str,
        config: TeacherConfig,
        wanted: Wanted,
        seed: int,
        encoder: PromptEncoder,
        trust_remote_code: bool = False,
    ):
        most = max(wanted.top_k, 1)
        self._llm: Any = start_vllm(
            model,
            config,
            seed,
            trust_remote_code,
            enforce_eager=not config.num_gpus,
            max_num_seqs=config.micro_batch,
            max_logprobs=most,
            **parallel_options(config),
        )
        self._top_k, self._seed, self._banned = wanted.top_k, seed, dict.fromkeys(encoder.pad_ids, -100.0)

    def score(self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray]) -> list[TokenScores]:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, prompt_logprobs=self._top_k, detokenize=False)
        inputs = [vllm_prompt(p, r) for p, r in zip(prompts, responses, strict=True)]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        scores = []
        for prompt, response, output in zip(prompts, responses, outputs, strict=True):
            check_expansion(prompt, output.prompt_token_ids[: -len(response)], "the teacher")
            positions = output.prompt_logprobs[-len(response) :]
            logprobs = [p[token].logprob for p, token in zip(positions, response.tolist(), strict=True)]
            scores.append(
                TokenScores(np.asarray(logprobs, np.float32), self._top_k_of(positions), None, None)
            )
        return scores

    def _top_k_of(self, positions: list[dict]) -> TopK | None:
        """Each position maps the K most likely tokens, and the response's own, to a log-prob with its rank."""
        if not self._top_k:
            return None
        best = [sorted(p.items(), key=lambda item: item[1].rank)[: self._top_k] for p in positions]
        return TopK(
            ids=np.asarray([[token for token, _ in row] for row in best], np.int32),
            logprobs=np.asarray([[entry.logprob for _, entry in row] for row in best], np.float32),
        )

    def predict(
        self, prompts: Sequence[EncodedPrompt], num_answers: int, temperature: float, max_tokens: int
    ) -> list[list[str]]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            n=num_answers,
            temperature=temperature,
            max_tokens=max_tokens,
            logit_bias=self._banned,
            seed=self._seed,
        )
        outputs = self._llm.generate([vllm_prompt(p) for p in prompts], parameters, use_tqdm=False)
        return [[answer.text for answer in output.outputs] for output in outputs]


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
