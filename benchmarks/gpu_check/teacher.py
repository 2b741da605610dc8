"""Both engines of the teacher against transformers in float32."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from benchmarks.command import timed
from benchmarks.gpu_check.measure import Arrays, Setting, check_memory, planned, release, within
from benchmarks.gpu_check.part import Bench, NotHere
from benchmarks.gpu_check.tree import compare
from teacher_service.engine import ENGINES, TokenScores, Wanted, top_k_of
from video_opd.config import Config
from video_opd.models.forward import ResponseLogits, VideoLLM, collate, load_model
from video_opd.types import EncodedPrompt

Cases = tuple[Sequence[EncodedPrompt], Arrays]  # prompts, and a response to each
TOP_K = 5
ALIKE = 130  # tokens that responses to one prompt begin with: more than a block of a KV cache


class Checks(Setting):
    def __init__(self, bench: Bench, _: str):
        super().__init__(bench)
        self._responses = self.random_responses()
        self._engine: Any = None

    def reference(self) -> str:
        shared = np.random.default_rng(1).integers(0, 500, ALIKE).astype(np.int32)
        alike = [shared, shared, *(np.append(shared, response) for response in self._responses)]
        self._cases = [(self.encoded, self._responses), ([self.encoded[0]] * len(alike), alike)]
        self._model = model = self.float32_model()
        seconds, self._expected = timed(lambda: [self.exact(model, *cases) for cases in self._cases])
        self._expected_best = [self._best(model, cases) for cases in self._cases]
        rng = np.random.default_rng(2)
        self._given = [[rng.integers(0, 500, (len(r), TOP_K)) for r in own] for _, own in self._cases]
        both = zip(self._cases, self._given, strict=True)
        self._expected_given = [self._best(model, cases, given) for cases, given in both]
        return f"{sum(map(len, self._expected))} responses in {seconds:.2f} s"

    def tree(self) -> str:
        """Three sequences of a clip in one pass, in both dtypes."""
        told = [compare(self, self._model, "float32", trains=False)]
        self._model = load_model(self.config.student, "bfloat16").eval().to(self.bench.device)
        return "; ".join([*told, compare(self, self._model, "bfloat16", trains=False)])

    def transformers(self) -> str:
        return self._scores("transformers")

    def transformers_memory(self) -> str:
        return check_memory(self._with("transformers"), "teacher")

    def vllm(self) -> str:
        _need_vllm()
        return self._scores("vllm")

    def vllm_alike(self) -> str:
        """Responses to one prompt that begin alike: vLLM gives no scores of what its prefix cache holds."""
        _need_vllm()
        scores = self._engine.score(*self._cases[1])
        return within([s.logprobs for s in scores], self._expected[1], self.tolerance)

    def vllm_top_k(self) -> str:
        """With an empty prefix cache, with a full one, and with responses that begin alike."""
        _need_vllm()
        self._engine.wanted = Wanted(top_k=TOP_K)
        self._engine._llm.reset_prefix_cache()
        told = [self._top_k(self._cases[i], self._expected[i], self._expected_best[i]) for i in (0, 0, 1)]
        return "; ".join(told)

    def vllm_given(self) -> str:
        """Of tokens that are given beside the response, as the student's likeliest are."""
        _need_vllm()
        self._engine.wanted = Wanted(TOP_K, is_given=True)
        self._engine._llm.reset_prefix_cache()
        every = zip(self._cases, self._expected, self._expected_given, self._given, strict=True)
        return "; ".join(self._top_k(*of_cases) for of_cases in every)

    def vllm_memory(self) -> str:
        _need_vllm()
        return check_memory(self._with("vllm"), "teacher")

    def _scores(self, engine: str) -> str:
        self._engine = self._model = None
        release()
        config = self._with(engine)
        wanted = Wanted(top_k=TOP_K + 1 if engine == "vllm" else 0)  # vLLM is told the most it will give
        how = wanted, 0, self.encoder, False, config.rollout.temperature
        self._engine = ENGINES[engine](config.student, config.teacher_pool, *how)
        self._engine.wanted = Wanted()
        seconds, scores = timed(self._score_one_by_one)
        told = within([s.logprobs for s in scores], self._expected[0], self.tolerance)
        how_long = planned(config, lambda plan: plan.phases["score"].seconds)
        return f"{told}; {len(scores)} responses in {seconds:.2f} s ({how_long})"

    def _score_one_by_one(self) -> list[TokenScores]:
        """A pass for each, as the config's micro_batch says."""
        pairs = zip(self.encoded, self._responses, strict=True)
        return [scores for p, r in pairs for scores in self._engine.score([p], [r])]

    def _top_k(self, cases: Cases, expected: Arrays, best: Arrays, given: Arrays | None = None) -> str:
        scores = self._engine.score(*cases, None, given)
        within([s.logprobs for s in scores], expected, self.tolerance)
        return within([s.top_k.logprobs.ravel() for s in scores], best, self.tolerance)

    @torch.no_grad()
    def _best(self, model: VideoLLM, cases: Cases, given: Arrays | None = None) -> Arrays:
        """float32[N * K] of each response: the K highest log-probs at each token, or of those given."""
        batches = (collate([p], [r], 0, self.bench.device) for p, r in zip(*cases, strict=True))
        logits = (self.policy(ResponseLogits(model)(batch)) for batch in batches)
        asked = [None] * len(cases[1]) if given is None else [[ids] for ids in given]
        pairs = zip(logits, asked, strict=True)
        return [top_k_of(of_response, TOP_K, ids).logprobs.ravel() for of_response, ids in pairs]

    def _with(self, engine: str) -> Config:
        pool = self.config.teacher_pool.model_copy(update={"engine": engine})
        return self.config.model_copy(update={"teacher_pool": pool})


def _need_vllm() -> None:
    if find_spec("vllm") is None:
        raise NotHere("vLLM is not installed")
