"""Both engines of the teacher against transformers in float32."""

from typing import Any

from benchmarks.gpu_check.measure import Setting, check_memory, release, within
from benchmarks.gpu_check.stage import Bench
from teacher_service.engine import ENGINES, Wanted


class Stage(Setting):
    def __init__(self, bench: Bench, _: str):
        super().__init__(bench)
        self._responses = self.random_responses()

    def reference(self) -> str:
        self._exact = self.exact(self.float32_model(), self._responses)
        release()
        return f"{len(self._exact)} responses in float32"

    def transformers(self) -> str:
        return self._scores("transformers")

    def transformers_memory(self) -> str:
        return self._memory("transformers")

    def vllm(self) -> str:
        self._engine: Any = None
        release()
        return self._scores("vllm")

    def vllm_memory(self) -> str:
        return self._memory("vllm")

    def _scores(self, engine: str) -> str:
        pool = self.config.teacher_pool.model_copy(update={"engine": engine})
        self._engine = ENGINES[engine](self.config.student, pool, Wanted(), 0, self.encoder)
        scores = self._engine.score(self.encoded, self._responses)
        return within([s.logprobs for s in scores], self._exact, self.tolerance, "log-probs")

    def _memory(self, engine: str) -> str:
        pool = self.config.teacher_pool.model_copy(update={"engine": engine})
        return check_memory(self.config.model_copy(update={"teacher_pool": pool}), "teacher")
