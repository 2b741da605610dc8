"""The teacher pool: a Ray Serve deployment called by handle, and the caller's side of it."""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ApplicationStatus

from teacher_service.engine import start_engine, wanted_by
from video_opd.config import Config
from video_opd.deadline import within
from video_opd.errors import RunError
from video_opd.prompting import PromptEncoder, check_parity, parse_span
from video_opd.types import EncodedPrompt, FailedPrompt, Prediction, Prompt, TeacherScores, TrajectoryGroup

BACK_PRESSURE_PAUSE_S = 0.2
START_POLL_S = 0.2
ScoreResult = tuple[TeacherScores, ...] | FailedPrompt


class TeacherReplica:
    """One replica: encodes each prompt itself, checks that it sees what the actor saw, and scores."""

    def __init__(self, config: Config):
        pool = config.teacher_pool
        assert config.teacher, "make_plan asks for a teacher"
        self._teacher_id = Path(config.teacher).name
        self._max_tokens = config.rollout.max_response_tokens
        self._encoder = PromptEncoder(config.teacher, config.prompt, config.video)
        self._engine = start_engine(config.teacher, pool, wanted_by(config.loss), config.seed, self._encoder)
        self._busy = asyncio.Lock()  # engines take one call at a time
        batching: Any = self._score_batch  # serve.batch adds setters
        batching.set_max_batch_size(pool.max_batch_requests)
        batching.set_batch_wait_timeout_s(pool.batch_wait_s)

    async def score(self, groups: Sequence[TrajectoryGroup]) -> list[ScoreResult]:
        """Scores for every group, in order; a FailedPrompt where the clip cannot be read."""
        return await self._score_batch(groups)

    @serve.batch
    async def _score_batch(self, requests: list[Sequence[TrajectoryGroup]]) -> list[list[ScoreResult]]:
        async with self._busy:
            flat = await asyncio.to_thread(self._score, [g for groups in requests for g in groups])
        results = iter(flat)
        return [[next(results) for _ in groups] for groups in requests]

    def _score(self, groups: list[TrajectoryGroup]) -> list[ScoreResult]:
        encoded = self._encoder.encode_all([g.prompt for g in groups])
        pairs = [(e, t) for e, g in zip(encoded, groups, strict=True) if isinstance(e, EncodedPrompt) for t in g.trajectories]
        for prompt, trajectory in pairs:
            check_parity(prompt, trajectory, "the teacher")
        scored = self._engine.score([e for e, _ in pairs], [t.response_token_ids for _, t in pairs]) if pairs else []
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

    async def predict(
        self, prompts: Sequence[Prompt], num_answers: int = 1, temperature: float = 0.0
    ) -> list[list[Prediction] | FailedPrompt]:
        """The teacher's own answers to each prompt, for evaluation and for the curriculum."""
        async with self._busy:
            return await asyncio.to_thread(self._predict, prompts, num_answers, temperature)

    def _predict(self, prompts: Sequence[Prompt], num_answers: int, temperature: float) -> list[list[Prediction] | FailedPrompt]:
        encoded = self._encoder.encode_all(prompts)
        readable = [e for e in encoded if isinstance(e, EncodedPrompt)]
        answers = iter(self._engine.predict(readable, num_answers, temperature, self._max_tokens) if readable else [])
        return [
            e
            if isinstance(e, FailedPrompt)
            else [Prediction(prompt_id=e.prompt_id, text=text, span_s=parse_span(text)) for text in next(answers)]
            for e in encoded
        ]


class TeacherPool:
    """The caller's side: starts the deployment and sends it work. Arguments and results travel as Ray objects."""

    def __init__(self, name: str, config: Config):
        self._name, self._config = name, config
        self._handle: Any = None

    async def start(self) -> None:
        """Returns when every replica answers. Raises RunError at config.start_timeout_s."""
        pool = self._config.teacher_pool
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(
            TeacherReplica,
            name="teacher",
            num_replicas=pool.num_replicas,
            max_ongoing_requests=2 * pool.max_batch_requests,
            max_queued_requests=pool.max_queued_requests,
            max_constructor_retry_count=1,
            ray_actor_options={
                "num_cpus": pool.num_cpus,
                "num_gpus": pool.num_gpus,
                "resources": {"teacher": 1},
                "runtime_env": {"env_vars": self._config.worker_env},
            },
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        target = serve.RunTarget(deployment.bind(self._config), name=self._name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        self._handle = serve.get_app_handle(self._name)
        await within(self._config.start_timeout_s, self._running(), "the start of the teacher service")

    async def _running(self) -> None:
        """Waits until the application runs. Raises RunError when Serve gives up on it."""
        while (application := serve.status().applications[self._name]).status != ApplicationStatus.RUNNING:
            if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise RunError(f"the teacher service did not start: {application.message.strip()[-2000:]}")
            await asyncio.sleep(START_POLL_S)

    async def score(self, groups: ray.ObjectRef | Sequence[TrajectoryGroup]) -> list[ScoreResult]:
        """See TeacherReplica.score. A reference is fetched by the replica, past the caller."""
        return await self._call("score", groups)

    async def predict(
        self, prompts: Sequence[Prompt], num_answers: int = 1, temperature: float = 0.0
    ) -> list[list[Prediction] | FailedPrompt]:
        """See TeacherReplica.predict. The work is spread over the replicas."""
        size = self._config.rollout.prompts_per_call
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        places = asyncio.Semaphore(self._config.teacher_pool.num_replicas)  # a call's deadline covers its own work alone

        async def predict(chunk: Sequence[Prompt]) -> list[list[Prediction] | FailedPrompt]:
            async with places:
                return await self._call("predict", chunk, num_answers, temperature)

        results = await asyncio.gather(*(predict(chunk) for chunk in chunks))
        return [answer for chunk in results for answer in chunk]

    async def _call(self, method: str, *arguments: Any) -> Any:
        deadline = time.monotonic() + self._config.request_timeout_s
        while True:
            response = getattr(self._handle, method).remote(*arguments)
            try:
                return await within(deadline - time.monotonic(), response, f"a {method} call to the teacher service")
            except ray.exceptions.RayActorError:
                await asyncio.sleep(BACK_PRESSURE_PAUSE_S)
            except BackPressureError:  # every replica's queue is full: the pool's way to say wait
                await asyncio.sleep(BACK_PRESSURE_PAUSE_S)

    def stop(self) -> None:
        """Deletes the deployment; other Serve applications of the cluster stay."""
        serve.delete(self._name, _blocking=False)
