"""Scoring engines: tokens in, the teacher's log-probs out. Two engines with one interface."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from video_opd.config import TeacherConfig
from video_opd.errors import RunError
from video_opd.models import forward
from video_opd.models.prompting import PromptEncoder
from video_opd.models.shared_gpu import starting_alone
from video_opd.models.vllm_engine import check_expansion, start_vllm, vllm_prompt
from video_opd.types import EncodedPrompt, TopK

Encoded = Sequence[EncodedPrompt]
Pair = tuple[EncodedPrompt, np.ndarray]  # with a response int32[N]
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
        with starting_alone(self.config.num_gpus):
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


class VllmEngine(ScoringEngine):
    """Prefill with vLLM.

    Its second model runner, which GPUs use, computes logits of response rows alone and takes the video from
    the prefix cache. Its first one computes logits of every prompt position, video tokens included.
    """

    def __post_init__(self) -> None:
        limits = {"max_num_seqs": self.config.micro_batch, "max_logprobs": max(self.wanted.top_k, 1)}
        options = {"enforce_eager": not self.config.num_gpus} | limits
        self._llm: Any = start_vllm(self.model, self.config, self.seed, self.trust_remote_code, **options)
        self._second_runner = self._llm.llm_engine.vllm_config.use_v2_model_runner

    def score(self, prompts: Encoded, responses: Sequence[np.ndarray]) -> list[TokenScores]:
        pairs = list(zip(prompts, responses, strict=True))
        found: list[TokenScores | None] = [None] * len(pairs)
        if self._second_runner:
            found = self._score_top_k(pairs) if self.wanted.top_k else self._ask(pairs, cached=True)
        missing = [pair for pair, scores in zip(pairs, found, strict=True) if scores is None]
        again = iter(self._ask(missing, cached=False) if missing else [])
        scores = [of_pair or next(again) for of_pair in found]
        if None in scores:
            raise RunError(f"vLLM gave no scores for prompt {pairs[scores.index(None)][0].prompt_id}")
        return [of_pair for of_pair in scores if of_pair]

    def _score_top_k(self, pairs: Sequence[Pair]) -> list[TokenScores | None]:
        """Puts each prompt but its last token into the prefix cache: what is then computed is a block or two.

        prompt_logprobs returns the log-probs of all positions that are computed.
        """
        from vllm import SamplingParams

        scores: list[TokenScores | None] = []
        for _, of_prompt in groupby(pairs, key=lambda pair: pair[0].fingerprint):
            own = list(of_prompt)
            prefix = vllm_prompt(own[0][0])
            prefix["prompt_token_ids"] = prefix["prompt_token_ids"][:-1]
            self._llm.generate([prefix], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
            scores += self._ask(own, cached=True)
        return scores

    def _ask(self, pairs: Sequence[Pair], cached: bool) -> list[TokenScores | None]:
        """None: the prefix cache held rows whose scores are asked for, so vLLM did not compute them.

        That happens when a block of the cache ends in the response, or with the prompt's last token.
        """
        from vllm import SamplingParams

        how: dict[str, Any] = {"max_tokens": 1, "detokenize": False, "skip_reading_prefix_cache": not cached}
        parameters = [SamplingParams(**how, **self._rows(prompt, response)) for prompt, response in pairs]
        inputs = [vllm_prompt(p, r) for p, r in pairs]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [self._read(*pair, output) for pair, output in zip(pairs, outputs, strict=True)]

    def _rows(self, prompt: EncodedPrompt, response: np.ndarray) -> dict[str, Any]:
        """SamplingParams for the response rows; prompt_logprob_start has no effect on prompt_logprobs."""
        if self.wanted.top_k or not self._second_runner:
            return {"prompt_logprobs": self.wanted.top_k}
        given = response[:, None].astype(np.int32)
        return {"prompt_logprob_start": len(prompt.token_ids) - 1, "prompt_logprob_token_ids": given}

    def _read(self, prompt: EncodedPrompt, response: np.ndarray, output: Any) -> TokenScores | None:
        check_expansion(prompt, output.prompt_token_ids[: -len(response)], "the teacher")
        if self.wanted.top_k or not self._second_runner:
            positions = output.prompt_logprobs[1:][-len(response) :]  # of the first token nothing is known
            if len(positions) < len(response):
                return None
            logprobs = [p[token].logprob for p, token in zip(positions, response.tolist(), strict=True)]
            return TokenScores(np.asarray(logprobs, np.float32), self._top_k_of(positions))
        given = output.prompt_token_id_logprobs
        return None if given is None else TokenScores(np.array(given[:, 0], np.float32))

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
