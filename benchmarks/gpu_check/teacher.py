"""Both engines of the teacher against transformers in float32."""

from typing import Any

from benchmarks.command import timed
from benchmarks.gpu_check.measure import Setting, check_memory, planned, release, within
from benchmarks.gpu_check.part import Bench
from teacher_service.engine import ENGINES, Wanted
from video_opd.config import Config


class Checks(Setting):
    def __init__(self, bench: Bench, _: str):
        super().__init__(bench)
        self._responses = self.random_responses()
        self._engine: Any = None

    def reference(self) -> str:
        seconds, self._expected = timed(self.exact, self.float32_model(), self.encoded, self._responses)
        return f"{len(self._expected)} responses in {seconds:.2f} s"

    def transformers(self) -> str:
        return self._scores("transformers")

    def transformers_memory(self) -> str:
        return check_memory(self._with("transformers"), "teacher")

    def vllm(self) -> str:
        return self._scores("vllm")

    def vllm_memory(self) -> str:
        return check_memory(self._with("vllm"), "teacher")

    def _scores(self, engine: str) -> str:
        self._engine = None
        release()
        config = self._with(engine)
        self._engine = ENGINES[engine](config.student, config.teacher_pool, Wanted(), 0, self.encoder)
        seconds, scores = timed(self._engine.score, self.encoded, self._responses)
        told = within([s.logprobs for s in scores], self._expected, self.tolerance)
        how_long = planned(config, lambda plan: plan.phases["score"].seconds)
        return f"{told}; {len(scores)} responses in {seconds:.2f} s ({how_long})"

    def _with(self, engine: str) -> Config:
        pool = self.config.teacher_pool.model_copy(update={"engine": engine})
        return self.config.model_copy(update={"teacher_pool": pool})
