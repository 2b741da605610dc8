"""A replica of a teacher: what runs in the processes of its Ray Serve deployment."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from teacher_service.calls import Ready, Reply, ScoreCall, in_passes
from teacher_service.following import Weights
from video_opd.cluster.faults import cause_of
from video_opd.config import Config
from video_opd.config_teachers import TeacherModel
from video_opd.errors import WeightsLostError
from video_opd.hub import fetch
from video_opd.logs import log, start_role_log
from video_opd.models.prompting import PromptEncoder, without_video
from video_opd.passes import passes_by_cut
from video_opd.types import (
    EncodedPrompt,
    FailedPrompt,
    Prediction,
    Prompt,
    TeacherScores,
    Trajectory,
    TrajectoryGroup,
)

if TYPE_CHECKING:
    from teacher_service.engine import ScoringEngine, TokenScores

Prompts = Sequence[Prompt]
Answers = list[list[Prediction] | FailedPrompt]  # one per prompt


class TeacherReplica:
    """Encodes each prompt, checks that it sees what the actor saw, and scores.

    A call's prompts are encoded from its arrival on, by the threads of the encoder's feed. The engine has a
    thread of its own, which takes the encoded prompts of the calls that wait.
    """

    def __init__(self, config: Config, teacher: TeacherModel):
        start_role_log(config.run_name, f"teacher-{teacher.name}")
        started, self._pool = time.monotonic(), config.teacher_pool
        self._teacher = teacher
        self._max_tokens = config.rollout.max_response_tokens
        self._are_given = bool(config.loss.student_top_k)  # the tokens of top-K
        self._scores_grey = config.loss.visual_weight is not None
        self._waiting: deque[ScoreCall] = deque()
        self._held: str | None = None  # name of the Weights that the engine has; None: its folder's
        # One call after the other, and all in one thread: CUDA's streams are those of a thread
        self._thread = ThreadPoolExecutor(1, "engine")
        fetched = teacher.model_copy(update={"model": fetch(teacher.model)})
        self._encoder, self._engine = self._thread.submit(self._load, config, fetched).result()
        log.info("started in %.1f s", time.monotonic() - started)

    def _load(self, config: Config, teacher: TeacherModel) -> tuple[PromptEncoder, "ScoringEngine"]:
        """The encoder and the engine; benchmarks and tests replace them."""
        from teacher_service.engine import ENGINES, Wanted  # torch takes seconds to import
        from teacher_service.views import ViewEncoder

        # Prompts ahead of the engine hold all their processed clips
        held = {"feed_bytes": max(1, config.video.feed_bytes // config.teacher_clips)}
        config = config.model_copy(update={"video": config.video.model_copy(update=held)})
        pool, needs, trust = config.teacher_pool, config.loss.needs.teacher, config.trust_remote_code
        if teacher.has_view:
            encoder = ViewEncoder(config, teacher)
        else:
            encoder = PromptEncoder(teacher.model, config.prompt, config.video, trust)
        wanted = Wanted(config.loss.top_k if needs == "top_k" else 0, self._are_given, needs == "hidden")
        how = wanted, config.seed, encoder, trust, config.rollout.temperature
        return encoder, ENGINES[config.teacher_engine](teacher.model, pool, *how)

    async def score(
        self,
        groups: Sequence[TrajectoryGroup],
        for_selection: bool = False,
        weights: Weights | None = None,
    ) -> Reply:
        """A ScoreResult per group, in order: scores, or a FailedPrompt where the clip cannot be read.

        With loss.visual_weight each pass is made once more on grey frames, for the log-probs alone;
        for_selection: not, as these choose prompts and are not trained on.
        When the engine is free it takes as many of the waiting calls as fill a pass. `weights` of a teacher
        that follows the student: the engine loads them first, unless it has them. Raises WeightsLostError.
        """
        make_ready = partial(self._make_ready, with_grey=self._scores_grey and not for_selection)
        call = ScoreCall(groups, make_ready, not self._teacher.has_view, weights)
        await asyncio.sleep(self._pool.batch_wait_s)
        self._waiting.append(call)
        self._thread.submit(self._score_waiting)
        return await asyncio.wrap_future(call.answer)

    async def predict(self, prompts: Prompts, num_answers: int, temperature: float) -> Reply:
        """The teacher's own answers to each prompt, for evaluation and for the curriculum.

        It is not shown where the true spans are: crop_margin_frac is for scores.
        """
        prompts = [replace(p, answer_spans_s=None) for p in prompts]
        passes = passes_by_cut(prompts, self._pool.micro_batch)
        coming = self._make_ready([prompts[i] for places in passes for i in places])
        work = self._predict, passes, coming, num_answers, temperature
        return await asyncio.get_running_loop().run_in_executor(self._thread, *work)

    def _make_ready(self, prompts: Prompts, with_grey: bool = False) -> Iterator[Ready | FailedPrompt]:
        """Each prompt, in order, encoded and prepared ahead of the caller."""

        def ready(encoded: EncodedPrompt) -> Ready:
            grey = without_video(encoded) if with_grey else None
            of_grey = grey and Ready(grey, self._engine.prepare(grey))
            return Ready(encoded, self._engine.prepare(encoded), of_grey)

        return self._encoder.prepare_ahead(prompts, ready)

    def _score_waiting(self) -> None:
        """Answers the calls that it takes, if an earlier turn has left any."""
        if not (calls := self._take_calls()):
            return
        try:
            replies = self._score(calls)
        except BaseException as error:  # it is the callers'
            for call in calls:
                call.answer.set_exception(error)
        else:
            for call, reply in zip(calls, replies, strict=True):
                call.answer.set_result(reply)

    def _take_calls(self) -> list[ScoreCall]:
        """Waiting calls that nobody has given up, for the same weights, until their rows fill a pass."""
        calls: list[ScoreCall] = []
        most, size = self._pool.max_batch_requests, self._pool.micro_batch
        while self._waiting and len(calls) < most and sum(len(c.rows) for c in calls) < size:
            if calls and self._waiting[0].weights != calls[0].weights:
                break
            call = self._waiting.popleft()
            if call.answer.set_running_or_notify_cancel():
                calls.append(call)
        return calls

    def _load_weights(self, weights: Weights) -> None:
        """Raises WeightsLostError, before any change, unless the version is there and whole."""
        from video_opd.weights.buckets import check_whole, unpack

        if self._held == weights.name:
            return
        try:
            fetched = ray.get(list(weights.buckets))
        except ObjectLostError as error:
            raise WeightsLostError(f"weights {weights.policy_version} are gone: {cause_of(error)}") from error
        check_whole(fetched, weights.policy_version)
        self._held = "a mixture"
        self._engine.load_weights(unpack(fetched))
        self._held = weights.name
        log.info("scores with the student's weights %d now", weights.policy_version)

    def _score(self, calls: Sequence[ScoreCall]) -> list[Reply]:
        if weights := calls[0].weights:
            self._load_weights(weights)
        version = weights and weights.policy_version
        engine_s, separate_tokens, computed_before = 0.0, 0, self._engine.num_computed_tokens
        for rows in in_passes(calls, self._pool.micro_batch):
            found = [(call, row, call.ready(row)) for call, row in rows]
            batch = [(call, row, ready) for call, row, ready in found if ready]
            prompts, prepared = [r.prompt for *_, r in batch], [r.prepared for *_, r in batch]
            responses = [row.trajectory.response_token_ids for _, row, _ in batch]
            num_tokens = sum(map(len, responses)) + sum(len(p.token_ids) for p in prompts)
            started = time.perf_counter()
            given = [ids for _, row, _ in batch if (ids := row.trajectory.top_k_ids) is not None]
            assert len(given) == (len(batch) if self._are_given else 0), "top-K ids of some responses alone"
            scored = self._engine.score(prompts, responses, prepared, given or None) if batch else []
            separate_tokens += num_tokens
            pairs = [(r.grey, response) for (*_, r), response in zip(batch, responses, strict=True) if r.grey]
            of_grey = iter(self._score_grey(pairs))
            separate_tokens += sum(len(g.prompt.token_ids) + len(response) for g, response in pairs)
            engine_s += time.perf_counter() - started
            for (call, row, ready), scores in zip(batch, scored, strict=True):
                call.add(row, self._named(row.trajectory, scores, next(of_grey) if ready.grey else None))
        tokens = self._engine.num_computed_tokens - computed_before, separate_tokens
        return [Reply(call.results(), engine_s, len(calls), *tokens, version) for call in calls]

    def _score_grey(self, pairs: Sequence[tuple[Ready, np.ndarray]]) -> list[np.ndarray]:
        """float32[N] of each response after its prompt with grey frames."""
        if not pairs:
            return []
        grey, responses = zip(*pairs, strict=True)
        return self._engine.logprobs([g.prompt for g in grey], responses, [g.prepared for g in grey])

    def _named(
        self, trajectory: Trajectory, scores: "TokenScores", grey_logprobs: np.ndarray | None
    ) -> TeacherScores:
        return TeacherScores(
            trajectory_id=trajectory.trajectory_id,
            teacher_id=self._teacher.name,
            teacher_logprobs=scores.logprobs,
            top_k=scores.top_k,
            hidden=scores.hidden,
            entropy=scores.entropy,
            grey_logprobs=grey_logprobs,
        )

    def _predict(
        self,
        passes: list[list[int]],
        coming: Iterator[Ready | FailedPrompt],
        num_answers: int,
        temperature: float,
    ) -> Reply:
        """passes: the places of the prompts that are `coming`, in their order."""
        assert self._held is None, "a teacher answers with the weights of its folder"
        answers: dict[int, list[Prediction] | FailedPrompt] = {}
        engine_s = 0.0
        sampling = num_answers, temperature, self._max_tokens
        for places in passes:
            batch = list(islice(coming, len(places)))
            ready = [r for r in batch if isinstance(r, Ready)]
            prompts, prepared = [r.prompt for r in ready], [r.prepared for r in ready]
            started = time.perf_counter()
            texts = iter(self._engine.predict(prompts, *sampling, prepared) if ready else [])
            engine_s += time.perf_counter() - started
            for place, r in zip(places, batch, strict=True):
                answers[place] = r if isinstance(r, FailedPrompt) else self._read(r.prompt, next(texts))
        assert next(coming, None) is None  # the feed gets the last prompt's bytes back
        return Reply([answers[place] for place in range(len(answers))], engine_s, num_calls=1)

    def _read(self, prompt: EncodedPrompt, texts: Sequence[str]) -> list[Prediction]:
        name, spans_in, written = prompt.prompt_id, self._encoder.spans_in, map(self._encoder.written, texts)
        return [Prediction(prompt_id=name, text=t, spans_s=spans_in(t, prompt.style)) for t in written]
