"""The rollout actors of a run, as the driver sees them."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.rollout_actor import RolloutActor
from video_opd.config import Config
from video_opd.deadline import within
from video_opd.types import FailedPrompt, Prediction, Prompt, WeightUpdate


class ActorPool:
    """Starts the actors, bounds every wait on them."""

    def __init__(self, name: str, config: Config):
        self._config = config
        self.actors = [
            ray.remote(RolloutActor)
            .options(
                name=f"{name}/actor-{i}",
                num_cpus=config.rollout.num_cpus,
                num_gpus=config.rollout.num_gpus,
                resources={"rollout": 1},
                max_restarts=0,  # a silent restart would sample from old weights
                runtime_env={"env_vars": config.worker_env},
            )
            .remote(f"actor-{i}", config)
            for i in range(config.rollout.num_actors)
        ]

    async def start(self) -> None:
        """Returns when every engine is up."""
        calls = asyncio.gather(*(a.pid.remote() for a in self.actors))
        await within(self._config.start_timeout_s, calls, "the start of the rollout actors")

    def rollout(self, actor: Any, prompts: Sequence[Prompt]) -> ray.ObjectRef:
        """A reference to RolloutActor.rollout's result, which the teacher can fetch past the driver."""
        return actor.rollout.remote(prompts)

    async def result(self, reference: ray.ObjectRef) -> Any:
        """The value behind `rollout`'s reference."""
        return await within(self._config.request_timeout_s, asyncio.ensure_future(reference), "a rollout")

    async def predict(self, prompts: Sequence[Prompt], blank_video: bool = False) -> list[Prediction | FailedPrompt]:
        """The student's greedy answers, the work spread over the actors; see RolloutActor.predict."""
        size = self._config.rollout.prompts_per_call
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        answers: list[list[Prediction | FailedPrompt]] = [[] for _ in chunks]
        waiting = iter(enumerate(chunks))

        async def work(actor: Any) -> None:  # one call at a time, so that its deadline covers its own work alone
            for i, chunk in waiting:
                call = asyncio.ensure_future(actor.predict.remote(chunk, blank_video))
                answers[i] = await within(self._config.request_timeout_s, call, "the student's predictions")

        await asyncio.gather(*(work(actor) for actor in self.actors))
        return [answer for chunk in answers for answer in chunk]

    async def load_weights(self, policy_version: int, buckets: list[ray.ObjectRef], num_bytes: int) -> WeightUpdate:
        """Every actor takes the version, after the rollouts it already has."""
        started = time.monotonic()
        calls = [a.load_weights.remote(policy_version, buckets) for a in self.actors]
        await within(self._config.request_timeout_s, asyncio.gather(*calls), "loading weights into the actors")
        return WeightUpdate(policy_version=policy_version, num_bytes=num_bytes, duration_s=time.monotonic() - started)
