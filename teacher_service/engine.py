"""Scoring engines: tokens in, the teacher's log-probs out. Two engines with one interface."""

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from video_opd.config_teachers import TeacherConfig
from video_opd.errors import ConfigError, RunError
from video_opd.models import forward
from video_opd.models.policy import BANNED, Policy, score_by_policy
from video_opd.models.prompting import PromptEncoder
from video_opd.models.shared_gpu import starting_alone
from video_opd.models.vllm_engine import check_expansion, most_likely, start_vllm, vllm_prompt
from video_opd.types import EncodedPrompt, TopK
from video_opd.weights.buckets import Named

Encoded = Sequence[EncodedPrompt]
Prepared = Sequence[Any] | None
Given = Sequence[np.ndarray] | None
Rendered = dict[str, Any]  # vLLM's input
Pair = tuple[Rendered, np.ndarray]  # a prompt; int32[N, 1 + K], the response and tokens given beside it
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

    top_k: int = 0  # K
    is_given: bool = False  # the ids of the K tokens are given with each response
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
    temperature: float = 1.0  # of the policy, of which log-probs and top-K are; not of answers
    num_computed_tokens: int = field(default=0, init=False)  # to score, so far

    @abstractmethod
    def __post_init__(self) -> None:
        """Loads the model."""

    def prepare(self, prompt: EncodedPrompt) -> Any:
        """What `score` and `predict` otherwise make of the prompt first; from any thread."""
        return None

    def load_weights(self, named: Named) -> None:
        """Replaces all weights, by the names of the plain transformers model."""
        raise NotImplementedError(f"{type(self).__name__} keeps the weights of its folder")

    @abstractmethod
    def score(
        self,
        prompts: Encoded,
        responses: Sequence[np.ndarray],
        prepared: Prepared = None,
        given: Given = None,
    ) -> list[TokenScores]:
        """The scores of each response int32[N], with all that is wanted; prepared: of each prompt.

        In one pass, which computes once what prompts of one clip share, if they are next to each other.
        given: top-K ids int32[N, K] of each response, in place of the teacher's own.
        """

    def logprobs(
        self, prompts: Encoded, responses: Sequence[np.ndarray], prepared: Prepared = None
    ) -> list[np.ndarray]:
        """float32[N] of each response: `score` without what else is wanted."""
        wanted, self.wanted = self.wanted, Wanted()
        try:
            return [scores.logprobs for scores in self.score(prompts, responses, prepared)]
        finally:
            self.wanted = wanted

    @abstractmethod
    def predict(
        self,
        prompts: Encoded,
        num_answers: int,
        temperature: float,
        max_tokens: int,
        prepared: Prepared = None,
    ) -> Texts:
        """`num_answers` texts for each prompt, in one pass like `score`; temperature 0 is greedy."""


def top_k_of(logits: torch.Tensor, k: int, given: Given = None) -> TopK:
    """The k most likely tokens of each row of logits[R, V], or the `given` ones."""
    logprobs = logits.log_softmax(-1)
    if given is None:
        values, ids = logprobs.topk(k, dim=-1)
    else:
        ids = torch.from_numpy(np.concatenate(given)).to(logits.device)
        values = logprobs.gather(-1, ids.long())
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
        self._policy = Policy(self.temperature, self.encoder.pad_ids, self._device)

    @torch.no_grad()
    def load_weights(self, named: Named) -> None:
        own = dict(self._model.named_parameters())
        for name, tensor in named:
            own.pop(name).copy_(tensor)
        assert not own, f"weights without {min(own)}"

    @torch.inference_mode()
    def score(
        self,
        prompts: Encoded,
        responses: Sequence[np.ndarray],
        prepared: Prepared = None,
        given: Given = None,
    ) -> list[TokenScores]:
        batch = forward.collate(prompts, responses, self.encoder.tokenizer.pad_token_id, self._device)
        hidden = self._logits.hidden(batch)
        self.num_computed_tokens += sum(tree.num_tokens for tree in batch.trees)
        logits = self._policy(self._model.lm_head(hidden).float())
        logprobs = forward.token_logprobs(logits, batch.targets).cpu().numpy()
        entropy = forward.token_entropy(logits).cpu().numpy()
        top_k = top_k_of(logits, self.wanted.top_k, given) if self.wanted.top_k else None
        kept = hidden.float().cpu().numpy() if self.wanted.hidden else None
        scores = []
        for stop, length in zip(np.cumsum(batch.lengths), batch.lengths, strict=True):
            rows = slice(stop - length, stop)
            of_rows = top_k and TopK(ids=top_k.ids[rows], logprobs=top_k.logprobs[rows])
            states = None if kept is None else kept[rows]
            scores.append(TokenScores(logprobs[rows], of_rows, states, entropy[rows]))
        return scores

    def predict(
        self,
        prompts: Encoded,
        num_answers: int,
        temperature: float,
        max_tokens: int,
        prepared: Prepared = None,
    ) -> Texts:
        tokenizer = self.encoder.tokenizer
        answers = forward.generate(
            self._model,
            prompts,
            max_tokens=max_tokens,
            pad_id=tokenizer.pad_token_id,
            banned_ids=self.encoder.pad_ids,
            temperature=temperature,
            num_answers=num_answers,
        )
        return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in row] for row in answers]


class VllmEngine(ScoringEngine):
    """Prefill with vLLM.

    Its second model runner, which GPUs use, computes logits of response rows alone and takes the video from
    the prefix cache. Its first one computes logits of every prompt position, video tokens included.
    """

    def __post_init__(self) -> None:
        most = self.wanted.top_k + self.wanted.is_given  # the response's own token is asked for beside them
        limits = {"max_num_seqs": self.config.micro_batch, "max_logprobs": max(most, 1)}
        options = {"enforce_eager": not self.config.num_gpus} | limits
        self._llm: Any = start_vllm(self.model, self.config, self.seed, self.trust_remote_code, **options)
        self._llm.collective_rpc(score_by_policy, args=(self.temperature, self.encoder.pad_ids))
        self._second_runner = self._llm.llm_engine.vllm_config.use_v2_model_runner
        self._numbers, self._one_at_a_time = itertools.count(), threading.Lock()
        if self.wanted.is_given and not self._second_runner:
            cannot = "this vLLM cannot score tokens that it is given (loss.top_k_of=student)"
            raise ConfigError(f"{cannot}: set teacher_pool.engine=transformers")

    @property
    def _ranks(self) -> bool:
        """Whether vLLM is asked for the likeliest tokens, not for those of _rows."""
        return not self._second_runner or bool(self.wanted.top_k and not self.wanted.is_given)

    def prepare(self, prompt: EncodedPrompt) -> Rendered:
        """vLLM's processing of a prompt: patches from frames, and expanded ids. Raises ParityError."""
        with self._one_at_a_time:  # vLLM's processor is not thread-safe
            (rendered,) = self._llm.llm_engine.renderer.render_cmpl([vllm_prompt(prompt)], skip_mm_cache=True)
        check_expansion(prompt, rendered["prompt_token_ids"], "the teacher")
        return rendered

    def score(
        self,
        prompts: Encoded,
        responses: Sequence[np.ndarray],
        prepared: Prepared = None,
        given: Given = None,
    ) -> list[TokenScores]:
        rendered = prepared or [self.prepare(p) for p in prompts]
        asked = [r[:, None] for r in responses]
        if given is not None:
            asked = [np.concatenate(of_response, 1) for of_response in zip(asked, given, strict=True)]
        pairs = list(zip(rendered, asked, strict=True))
        found: list[TokenScores | None] = [None] * len(pairs)
        if self._second_runner:
            found = self._score_top_k(pairs) if self._ranks else self._ask(pairs, cached=True)
        missing = [pair for pair, scores in zip(pairs, found, strict=True) if scores is None]
        again = iter(self._ask(missing, cached=False))
        scores = [of_pair or next(again) for of_pair in found]
        if None in scores:
            raise RunError(f"vLLM gave no scores for prompt {prompts[scores.index(None)].prompt_id}")
        return [of_pair for of_pair in scores if of_pair]

    def _score_top_k(self, pairs: Sequence[Pair]) -> list[TokenScores | None]:
        """Puts each prompt but its last token into the prefix cache: what is then computed is a block or two.

        prompt_logprobs returns the log-probs of all positions that are computed.
        """
        scores: list[TokenScores | None] = []
        for _, of_prompt in itertools.groupby(pairs, key=lambda pair: id(pair[0])):
            own = list(of_prompt)
            rendered = own[0][0]
            prefix = rendered | {"prompt_token_ids": rendered["prompt_token_ids"][:-1]}
            self._prefill([prefix], [{"max_tokens": 1, "detokenize": False}])
            scores += self._ask(own, cached=True)
        return scores

    def _ask(self, pairs: Sequence[Pair], cached: bool) -> list[TokenScores | None]:
        """None: the prefix cache held rows whose scores are asked for, so vLLM did not compute them.

        That happens when a block of the cache ends in the response, or with the prompt's last token.
        """
        inputs, sampling = [], []
        for rendered, asked in pairs:
            ids = rendered["prompt_token_ids"]
            inputs.append(rendered | {"prompt_token_ids": ids + asked[:, 0].tolist()})
            how = {"max_tokens": 1, "detokenize": False, "skip_reading_prefix_cache": not cached}
            sampling.append(how | self._rows(len(ids), asked))
        outputs = self._prefill(inputs, sampling)
        return [self._read(pair[1], output) for pair, output in zip(pairs, outputs, strict=True)]

    def _rows(self, num_prompt_tokens: int, asked: np.ndarray) -> dict[str, Any]:
        """What to ask for; prompt_logprob_start has no effect on prompt_logprobs."""
        if self._ranks:
            return {"prompt_logprobs": self.wanted.top_k}
        given = asked.astype(np.int32)
        return {"prompt_logprob_start": num_prompt_tokens - 1, "prompt_logprob_token_ids": given}

    def _read(self, asked: np.ndarray, output: Any) -> TokenScores | None:
        if self._ranks:
            response = asked[:, 0]
            positions = output.prompt_logprobs[1:][-len(response) :]  # of the first token nothing is known
            if len(positions) < len(response):
                return None
            logprobs = [p[token].logprob for p, token in zip(positions, response.tolist(), strict=True)]
            return TokenScores(np.asarray(logprobs, np.float32), self._top_k_of(positions))
        if output.prompt_token_id_logprobs is None:
            return None
        own, *others = np.array(output.prompt_token_id_logprobs, np.float32).T
        top_k = TopK(ids=asked[:, 1:], logprobs=np.stack(others, 1)) if others else None
        return TokenScores(own, top_k)

    def _prefill(self, inputs: Sequence[Rendered], sampling: Sequence[dict[str, Any]]) -> list[Any]:
        """As `_run`; counts what the prefix cache did not hold."""
        outputs = self._run(inputs, sampling)
        lengths = zip(inputs, outputs, strict=True)
        self.num_computed_tokens += sum(len(i["prompt_token_ids"]) - o.num_cached_tokens for i, o in lengths)
        return outputs

    def _run(self, inputs: Sequence[Rendered], sampling: Sequence[dict[str, Any]]) -> list[Any]:
        """vLLM's finished output of each, in order; `sampling`: of SamplingParams."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, outputs = self._llm.llm_engine, dict[str, Any]()
        names = [str(next(self._numbers)) for _ in inputs]
        for name, rendered, how in zip(names, inputs, sampling, strict=True):
            parameters = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **how)
            engine.add_request(name, rendered, parameters)
        while len(outputs) < len(names):
            outputs |= {output.request_id: output for output in engine.step()}
        return [outputs[name] for name in names]

    def _top_k_of(self, positions: list[dict]) -> TopK | None:
        """Each position maps the K most likely tokens and the response's own to a log-prob with its rank."""
        k = self.wanted.top_k
        if not k:
            return None
        best = [most_likely(p, k) for p in positions]
        logprobs = [[p[token].logprob for token in row] for p, row in zip(positions, best, strict=True)]
        return TopK(ids=np.asarray(best, np.int32), logprobs=np.asarray(logprobs, np.float32))

    def predict(
        self,
        prompts: Encoded,
        num_answers: int,
        temperature: float,
        max_tokens: int,
        prepared: Prepared = None,
    ) -> Texts:
        how: dict[str, Any] = {"n": num_answers, "temperature": temperature, "max_tokens": max_tokens}
        how |= {"seed": self.seed, "logit_bias": dict.fromkeys(self.encoder.pad_ids, BANNED)}
        outputs = self._run(prepared or [self.prepare(p) for p in prompts], [how] * len(prompts))
        return [[answer.text for answer in output.outputs] for output in outputs]


ENGINES: dict[str, type[ScoringEngine]] = {"transformers": TransformersEngine, "vllm": VllmEngine}
