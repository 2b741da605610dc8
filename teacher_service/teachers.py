"""Several teachers behind the interface of one: each prompt goes to those that are its teachers, their log-probs become one."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from teacher_service.pool import TeacherPool
from teacher_service.replica import ScoreResult, TeacherReplica
from video_opd.cluster.deadline import with_deadline
from video_opd.config import Config, TeacherModel
from video_opd.types import FailedPrompt, Prediction, Prompt, TeacherScores, TrajectoryGroup


def combine(weights: Sequence[float], scores: Sequence[TeacherScores]) -> TeacherScores:
    """What several teachers say of one trajectory: sum_i w_i log pi_i, weights divided by their sum.

    r_t is then the weighted sum of the log-ratios, and the objective the weighted sum of the reverse KLs. Of one teacher alone
    top-K and hidden states remain; of several there are none. Entropy is the weighted mean of theirs, where all know it.
    """
    if len(scores) == 1:
        return scores[0]
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    entropies = [s.entropy for s in scores if s.entropy is not None]
    return TeacherScores(
        trajectory_id=scores[0].trajectory_id,
        teacher_id="+".join(s.teacher_id for s in scores),
        teacher_logprobs=np.tensordot(shares, [s.teacher_logprobs for s in scores], 1).astype(np.float32),
        top_k=None,
        entropy=np.tensordot(shares, entropies, 1).astype(np.float32)
        if len(entropies) == len(scores)
        else None,
    )


def combine_results(teachers: Sequence[TeacherModel], results: Sequence[ScoreResult]) -> ScoreResult:
    """The same for a group; a FailedPrompt where a teacher cannot read the clip."""
    scored: list[tuple[TeacherScores, ...]] = []
    for result in results:
        if isinstance(result, FailedPrompt):
            return result
        scored.append(result)
    weights = [t.weight for t in teachers]
    return tuple(combine(weights, of_trajectory) for of_trajectory in zip(*scored, strict=True))


class Teachers:
    """A TeacherPool for each of config.teachers; see there for what the methods do and raise."""

    def __init__(self, run: str, config: Config, replica: type[TeacherReplica] = TeacherReplica):
        self._config = config
        self.pools = {t.name: TeacherPool(run, config, t, replica) for t in config.teacher_models}

    async def start(self) -> None:
        await asyncio.gather(*(pool.start() for pool in self.pools.values()))

    async def score(self, groups: ray.ObjectRef | Sequence[TrajectoryGroup]) -> list[ScoreResult]:
        """Each group by all of its teachers. A reference is read here, to see whose prompts they are, and sent on where all go."""
        read: Any = groups
        if isinstance(groups, ray.ObjectRef):
            read = await with_deadline(
                self._config.request_timeout_s, asyncio.ensure_future(groups), "trajectories to score"
            )
        teachers = [self._config.teachers_of(g.prompt.prompt_id) for g in read]

        async def score(name: str) -> dict[int, ScoreResult]:
            places = [i for i, of_prompt in enumerate(teachers) if any(t.name == name for t in of_prompt)]
            if not places:
                return {}
            part = groups if len(places) == len(read) else [read[i] for i in places]
            return dict(zip(places, await self.pools[name].score(part), strict=True))

        by_name = dict(
            zip(self.pools, await asyncio.gather(*(score(name) for name in self.pools)), strict=True)
        )
        return [combine_results(own, [by_name[t.name][i] for t in own]) for i, own in enumerate(teachers)]

    async def predict(
        self, prompts: Sequence[Prompt], num_answers: int = 1, temperature: float = 0.0
    ) -> list[list[Prediction] | FailedPrompt]:
        """Each prompt by the first of its teachers."""
        teachers = [self._config.teachers_of(p.prompt_id)[0].name for p in prompts]

        async def predict(name: str) -> list[list[Prediction] | FailedPrompt]:
            part = [p for p, own in zip(prompts, teachers, strict=True) if own == name]
            return await self.pools[name].predict(part, num_answers, temperature) if part else []

        answers = dict(
            zip(
                self.pools,
                map(iter, await asyncio.gather(*(predict(name) for name in self.pools))),
                strict=True,
            )
        )
        return [next(answers[name]) for name in teachers]

    async def take_metrics(self) -> dict[str, float]:
        """The metrics of each, teacher/NAME/queue_s and so on."""
        return self._named(await asyncio.gather(*(pool.take_metrics() for pool in self.pools.values())))

    async def counts(self) -> dict[str, float]:
        """The same of each: teacher/NAME/calls and so on."""
        return self._named(await asyncio.gather(*(pool.counts() for pool in self.pools.values())))

    def _named(self, by_pool: Sequence[dict[str, float]]) -> dict[str, float]:
        return {
            f"teacher/{name}/{metric.removeprefix('teacher/')}": value
            for name, metrics in zip(self.pools, by_pool, strict=True)
            for metric, value in metrics.items()
        }

    def stop(self) -> None:
        for pool in self.pools.values():
            pool.stop()


def create_teacher(run: str, config: Config) -> TeacherPool | Teachers | None:
    """What the run's prompts are scored by; None where neither the objective nor the curriculum asks."""
    if not config.needs_teacher:
        return None
    return Teachers(run, config) if config.teachers else TeacherPool(run, config, config.teacher_models[0])
