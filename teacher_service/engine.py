"""Scoring engines: given tokens in, the teacher's log-probs out. Two of them behind one interface."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from video_opd.config import TeacherConfig
from video_opd.modeling import ResponseLogits, collate, generate, load_model, token_logprobs
from video_opd.prompting import PromptEncoder
from video_opd.types import EncodedPrompt, TopK
from video_opd.vllm_engine import check_expansion, start_vllm, vllm_prompt

T = TypeVar("T")


class ScoringEngine(Protocol):
    """What the teacher service asks of an engine."""

    def score(self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray]) -> list[tuple[np.ndarray, TopK | None]]:
        """For each response int32[N]: its log-probs float32[N], and the top-K at its positions when K > 0."""
        ...

    def predict(self, prompts: Sequence[EncodedPrompt], num_answers: int, temperature: float, max_tokens: int) -> list[list[str]]:
        """`num_answers` texts for each prompt; temperature 0 is greedy."""
        ...


def start_engine(model: str, config: TeacherConfig, top_k: int, seed: int, encoder: PromptEncoder) -> ScoringEngine:
    """The engine the config names. `top_k`: 0 for none."""
    engine = {"transformers": TransformersEngine, "vllm": VllmEngine}[config.engine]
    return engine(model, config, top_k, seed, encoder)


class TransformersEngine:
    """Prefill with transformers: the language-model head runs on response rows only."""

    def __init__(self, model: str, config: TeacherConfig, top_k: int, seed: int, encoder: PromptEncoder):
        torch.manual_seed(seed)
        device = "cuda" if config.num_gpus else "cpu"
        self._model = load_model(model, config.dtype).eval().to(device)
        self._logits = ResponseLogits(self._model)
        self._config, self._encoder, self._device = config, encoder, device
        self._top_k = min(top_k, self._model.config.get_text_config().vocab_size)

    @torch.inference_mode()
    def score(self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray]) -> list[tuple[np.ndarray, TopK | None]]:
        lengths = [len(p.token_ids) + len(r) for p, r in zip(prompts, responses, strict=True)]
        order = np.argsort(lengths, kind="stable")  # like lengths share a pass
        scores: dict[int, tuple[np.ndarray, TopK | None]] = {}
        for chosen in _chunks(order.tolist(), self._config.micro_batch):
            pad_id = self._encoder.tokenizer.pad_token_id
            batch = collate([prompts[i] for i in chosen], [responses[i] for i in chosen], pad_id, self._device)
            logits = self._logits(batch)
            logprobs = token_logprobs(logits, batch.targets).cpu().numpy()
            top_k = self._top_k_of(logits)
            stops = np.cumsum(batch.lengths)
            for i, stop, length in zip(chosen, stops, batch.lengths, strict=True):
                rows = slice(stop - length, stop)
                scores[i] = (logprobs[rows], top_k and TopK(ids=top_k.ids[rows], logprobs=top_k.logprobs[rows]))
        return [scores[i] for i in range(len(prompts))]

    def _top_k_of(self, logits: torch.Tensor) -> TopK | None:
        if not self._top_k:
            return None
        values, ids = logits.log_softmax(-1).topk(self._top_k, dim=-1)
        return TopK(ids=ids.to(torch.int32).cpu().numpy(), logprobs=values.cpu().numpy())

    def predict(self, prompts: Sequence[EncodedPrompt], num_answers: int, temperature: float, max_tokens: int) -> list[list[str]]:
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


class VllmEngine:
    """Prefill with vLLM's prompt_logprobs.

    vLLM computes logits for every prompt position here, video tokens included, and bypasses its prefix cache:
    prefer `transformers` for long videos (STACK.md).
    """

    def __init__(self, model: str, config: TeacherConfig, top_k: int, seed: int, encoder: PromptEncoder):
        self._llm: Any = start_vllm(
            model, config, seed, enforce_eager=not config.num_gpus, max_num_seqs=config.micro_batch, max_logprobs=max(top_k, 1)
        )
        vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        self._top_k, self._seed, self._banned = min(top_k, vocabulary), seed, dict.fromkeys(encoder.pad_ids, -100.0)

    def score(self, prompts: Sequence[EncodedPrompt], responses: Sequence[np.ndarray]) -> list[tuple[np.ndarray, TopK | None]]:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, prompt_logprobs=self._top_k, detokenize=False)
        inputs = [vllm_prompt(p, r) for p, r in zip(prompts, responses, strict=True)]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        scores = []
        for prompt, response, output in zip(prompts, responses, outputs, strict=True):
            check_expansion(prompt, output.prompt_token_ids[: -len(response)], "the teacher")
            positions = output.prompt_logprobs[-len(response) :]
            logprobs = [p[token].logprob for p, token in zip(positions, response.tolist(), strict=True)]
            scores.append((np.asarray(logprobs, np.float32), self._top_k_of(positions)))
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

    def predict(self, prompts: Sequence[EncodedPrompt], num_answers: int, temperature: float, max_tokens: int) -> list[list[str]]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            n=num_answers, temperature=temperature, max_tokens=max_tokens, logit_bias=self._banned, seed=self._seed
        )
        outputs = self._llm.generate([vllm_prompt(p) for p in prompts], parameters, use_tqdm=False)
        return [[answer.text for answer in output.outputs] for output in outputs]


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
