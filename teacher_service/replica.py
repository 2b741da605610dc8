"""A replica of a teacher: what runs in the processes of its Ray Serve deployment."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from ray import serve

from video_opd.answers import parse_span
from video_opd.config import Config, TeacherModel
from video_opd.logs import log, start_role_log
from video_opd.models.prompting import PromptEncoder, check_parity
from video_opd.types import EncodedPrompt, FailedPrompt, Prediction, Prompt, TeacherScores, TrajectoryGroup

if TYPE_CHECKING:
    from teacher_service.engine import ScoringEngine

ScoreResult = tuple[TeacherScores, ...] | FailedPrompt
Prompts = Sequence[Prompt]
Answers = list[list[Prediction] | FailedPrompt]  # one per prompt


class Reply(NamedTuple):
    """The results of one call, and the cost of the batch it was merged into."""

    results: list[Any]
    engine_s: float  # seconds that the replica worked on the batch: encoding and forward passes
    num_calls: int  # in the batch


class TeacherReplica:
    """Encodes each prompt, checks that it sees what the actor saw, and scores."""

    def __init__(self, config: Config, teacher: TeacherModel):
        start_role_log(config.run_name, f"teacher-{teacher.name}")
        started, pool = time.monotonic(), config.teacher_pool
        self._teacher_id = teacher.name
        self._max_tokens = config.rollout.max_response_tokens
        # One call after the other, and all in one thread: CUDA's streams are those of a thread
        self._thread = ThreadPoolExecutor(1, "engine")
        self._encoder, self._engine = self._thread.submit(self._load, config, teacher.model).result()
        batching: Any = self._score_batch  # serve.batch adds setters
        batching.set_max_batch_size(pool.max_batch_requests)
        batching.set_batch_wait_timeout_s(pool.batch_wait_s)
        log.info("started in %.1f s", time.monotonic() - started)

    def _load(self, config: Config, model: str) -> tuple[PromptEncoder, "ScoringEngine"]:
        """The encoder and the engine; benchmarks and tests replace them."""
        from teacher_service.engine import ENGINES, Wanted  # torch takes seconds to import

        pool, needs, trust = config.teacher_pool, config.loss.needs.teacher, config.trust_remote_code
        encoder = PromptEncoder(model, config.prompt, config.video, trust)
        wanted = Wanted(top_k=config.loss.top_k if needs == "top_k" else 0, hidden=needs == "hidden")
        return encoder, ENGINES[pool.engine](model, pool, wanted, config.seed, encoder, trust)

    async def score(self, groups: Sequence[TrajectoryGroup]) -> Reply:
        """A ScoreResult per group, in order: scores, or a FailedPrompt where the clip cannot be read."""
        return await self._score_batch(groups)

    @serve.batch
    async def _score_batch(self, requests: list[Sequence[TrajectoryGroup]]) -> list[Reply]:
        flat, engine_s = await self._in_turn(self._score, [g for groups in requests for g in groups])
        results = iter(flat)
        return [Reply([next(results) for _ in groups], engine_s, len(requests)) for groups in requests]

    async def predict(self, prompts: Prompts, num_answers: int, temperature: float) -> Reply:
        """The teacher's own answers to each prompt, for evaluation and for the curriculum."""
        return Reply(*await self._in_turn(self._predict, prompts, num_answers, temperature), num_calls=1)

    async def _in_turn(self, work: Callable[..., list], *arguments: Any) -> tuple[list, float]:
        """Runs the work when the engine is free; its result, and the seconds it took."""

        def timed() -> tuple[list, float]:
            started = time.perf_counter()
            return work(*arguments), time.perf_counter() - started

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)

    def _score(self, groups: list[TrajectoryGroup]) -> list[ScoreResult]:
        encoded = self._encoder.encode_all([g.prompt for g in groups])
        readable = [(e, g) for e, g in zip(encoded, groups, strict=True) if isinstance(e, EncodedPrompt)]
        pairs = [(e, t) for e, g in readable for t in g.trajectories]
        for prompt, trajectory in pairs:
            check_parity(prompt, trajectory, "the teacher")
        responses = [t.response_token_ids for _, t in pairs]
        scored = self._engine.score([e for e, _ in pairs], responses) if pairs else []
        scores = iter(
            TeacherScores(
                trajectory_id=t.trajectory_id,
                teacher_id=self._teacher_id,
                teacher_logprobs=s.logprobs,
                top_k=s.top_k,
                hidden=s.hidden,
                entropy=s.entropy,
            )
            for (_, t), s in zip(pairs, scored, strict=True)
        )
        return [
            e if isinstance(e, FailedPrompt) else tuple(next(scores) for _ in g.trajectories)
            for e, g in zip(encoded, groups, strict=True)
        ]

    def _predict(self, prompts: Prompts, num_answers: int, temperature: float) -> Answers:
        encoded = self._encoder.encode_all(prompts)
        readable = [e for e in encoded if isinstance(e, EncodedPrompt)]
        sampling = (num_answers, temperature, self._max_tokens)
        texts = iter(self._engine.predict(readable, *sampling) if readable else [])

        def answers(prompt_id: str) -> list[Prediction]:
            of_prompt = map(self._encoder.written, next(texts))
            return [Prediction(prompt_id=prompt_id, text=t, span_s=parse_span(t)) for t in of_prompt]

        return [e if isinstance(e, FailedPrompt) else answers(e.prompt_id) for e in encoded]
