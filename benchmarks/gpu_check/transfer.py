"""A publication between processes: a learner rank trains, actors take its weights and sample from them."""

import asyncio
from pathlib import Path

import ray
import torch

from actors.actor_pool import ActorPool
from benchmarks.gpu_check.learner import made_up_groups
from benchmarks.gpu_check.measure import Arrays, Setting, within
from benchmarks.gpu_check.stage import Bench, NotHere
from driver.start_ray import start_ray
from learner.learner import Learner
from video_opd.types import Trajectory, TrajectoryGroup

NUM_GPUS = {"object_store": 1, "ipc": 1, "collective": 2}  # that it needs
SHARE = 0.4  # of one GPU, for the learner and for the actor


class Stage(Setting):
    def __init__(self, bench: Bench, way: str):
        self._way = way
        on_gpu = bench.device == "cuda"
        share = 0 if not on_gpu else 1 if way == "collective" else SHARE
        parts = [f"{part}.num_gpus={share}" for part in ("learner", "rollout")]
        is_here = on_gpu or way == "object_store"
        super().__init__(bench, *parts, *([f"learner.weight_transfer={way}"] if is_here else []))

    def publication(self) -> str:
        found = torch.cuda.device_count() if self.bench.device == "cuda" else 0
        needed = NUM_GPUS[self._way]
        if found < needed and (self._way != "object_store" or self.bench.device == "cuda"):
            raise NotHere(f"needs {needed} GPU(s), here are {found}")
        exported = Path(self.bench.folder) / f"exported-{self._way}"
        start_ray(self.config, address="local")
        try:
            trajectories, told = asyncio.run(self._publish(exported))
        finally:
            ray.shutdown()
        rows = {p.prompt_id: e for p, e in zip(self.prompts, self.encoded, strict=True)}
        exact = self.exact(
            self.float32_model(str(exported)),
            [t.response_token_ids for t in trajectories],
            [rows[t.prompt_id] for t in trajectories],
        )
        return f"{told}; {within([t.actor_logprobs for t in trajectories], exact, self.tolerance, 'log-probs')}"

    async def _publish(self, exported: Path) -> tuple[list[Trajectory], str]:
        """The actors sample before and after a step that moves all weights far; the latter are returned."""
        pool = ActorPool("check", self.config)
        await pool.start()
        learner = Learner("check", self.config)
        await learner.start()
        await self._sample(pool)  # fills the caches
        responses = self.random_responses()
        zeros: Arrays = [0.0 * r - 6.0 for r in responses]
        await learner.update(made_up_groups(self, responses, zeros, [0 * z + 1 for z in zeros]), 0)
        update = await pool.publish(1, learner)
        trajectories = await self._sample(pool)
        await learner.export(exported)
        return trajectories, f"{update.num_bytes / 1e9:.2f} GB in {update.duration_s:.2f} s"

    async def _sample(self, pool: ActorPool) -> list[Trajectory]:
        groups = [g async for _, results in pool.rollout(self.prompts) for g in results]
        return [t for g in groups if isinstance(g, TrajectoryGroup) for t in g.trajectories]
