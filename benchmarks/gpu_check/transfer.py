"""A publication between processes: a learner rank trains, an actor takes its weights and samples."""

import asyncio
from pathlib import Path

import numpy as np
import ray
import torch

from actors.actor_pool import ActorPool
from benchmarks.gpu_check.learner import made_up_groups
from benchmarks.gpu_check.measure import NOTICED, Arrays, Setting, gap, planned, within
from benchmarks.gpu_check.part import Bench, CheckError, NotHere
from driver.start_ray import start_ray
from learner.learner import Learner
from video_opd.types import Trajectory, TrajectoryGroup, WeightUpdate

SHARES = {"learner": 0.7, "rollout": 0.2}  # of one GPU of 80 GB


def overrides_for(way: str, device: str) -> list[str]:
    """What makes of a bench's config one that publishes in this way."""
    if device == "cpu":
        return []
    gpus = [f"{part}.num_gpus={1 if way == 'collective' else share}" for part, share in SHARES.items()]
    return [*gpus, f"learner.weight_transfer={way}"]


class Checks(Setting):
    def __init__(self, bench: Bench, way: str):
        super().__init__(bench, *overrides_for(way, bench.device))
        self._way = way
        self._exported = Path(bench.folder) / f"exported-{way}"

    def publication(self) -> str:
        """The actor's log-probs before and after it, both against the weights that the learner exports."""
        if self.bench.device == "cpu" and self._way != "object_store":
            raise NotHere("needs a GPU")
        if self._way == "collective" and torch.cuda.device_count() < 2:
            raise NotHere("needs two GPUs")
        start_ray(self.config, address="local")
        try:
            before, after, update = asyncio.run(self._publish())
        finally:
            ray.shutdown()
        model = self.float32_model(str(self._exported))
        of_prompt = {p.prompt_id: e for p, e in zip(self.prompts, self.encoded, strict=True)}

        def both(rows: list[Trajectory]) -> tuple[Arrays, Arrays]:
            encoded = [of_prompt[t.prompt_id] for t in rows]
            return [t.actor_logprobs for t in rows], self.exact(
                model, encoded, [t.response_token_ids for t in rows]
            )

        if (moved := gap(*both(before))) < NOTICED * self.tolerance:
            raise CheckError(f"the step changes log-probs by {moved:.2g} only: old weights would pass")
        told = within(*both(after), self.tolerance)
        how_long = planned(self.config, lambda plan: plan.phases["publish"].seconds)
        sent = f"{update.num_bytes / 1e9:.2f} GB in {update.duration_s:.2f} s ({how_long})"
        return f"{sent}; {told}, {moved:.2g} before"

    async def _publish(self) -> tuple[list[Trajectory], list[Trajectory], WeightUpdate]:
        """Engines start one after the other: vLLM measures the memory that is free."""
        pool = ActorPool("gpu_check", self.config)
        await pool.start()
        learner = Learner("gpu_check", self.config)
        await learner.start()
        before = await self._sample(pool)
        responses = self.random_responses()
        ones = [np.ones(len(r), np.float32) for r in responses]
        await learner.update(made_up_groups(self, responses, [-6 * one for one in ones], ones), 0)
        update = await pool.publish(1, learner)
        after = await self._sample(pool)
        await learner.export(self._exported)
        return before, after, update

    async def _sample(self, pool: ActorPool) -> list[Trajectory]:
        groups = [group async for _, results in pool.rollout(self.prompts) for group in results]
        return [t for group in groups if isinstance(group, TrajectoryGroup) for t in group.trajectories]
