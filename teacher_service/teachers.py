"""Several teachers with the interface of one: each prompt has its own teachers, whose scores are combined."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from teacher_service.calls import ScoreResult
from teacher_service.following import PublishedVersions, Weights
from teacher_service.pool import TeacherPool
from teacher_service.replica import Answers, Prompts, TeacherReplica
from video_opd.cluster.deadline import with_deadline
from video_opd.config import Config
from video_opd.config_teachers import TeacherModel, shares_of
from video_opd.passes import Arrived
from video_opd.types import FailedPrompt, TeacherScores, TrajectoryGroup


def combine(weights: Sequence[float], scores: Sequence[TeacherScores]) -> TeacherScores:
    """The scores of one trajectory as one: sum_i w_i log pi_i, with the weights of shares_of.

    r_t becomes the weighted sum of the log-ratios, and the objective that of the reverse KLs. One teacher's
    scores stay as they are. Several keep the mean entropy, if all have one and no weight is negative, but no
    top-K or hidden states. Log-probs after grey frames are combined alike, so that v_t is the weighted sum of
    theirs.
    """
    if len(scores) == 1:
        return scores[0]
    shares = shares_of(weights)

    def mean(values: list[np.ndarray]) -> np.ndarray:
        return np.tensordot(shares, values, 1).astype(np.float32)

    entropies = [s.entropy for s in scores if s.entropy is not None]
    grey = [s.grey_logprobs for s in scores if s.grey_logprobs is not None]
    return TeacherScores(
        trajectory_id=scores[0].trajectory_id,
        teacher_id="+".join(s.teacher_id for s in scores),
        teacher_logprobs=mean([s.teacher_logprobs for s in scores]),
        top_k=None,
        entropy=mean(entropies) if len(entropies) == len(scores) and min(shares) > 0 else None,
        grey_logprobs=mean(grey) if grey else None,
    )


def combine_results(teachers: Sequence[TeacherModel], results: Sequence[ScoreResult]) -> ScoreResult:
    """Combines the results for one group; a FailedPrompt where a teacher cannot read the clip."""
    if failed := [r for r in results if isinstance(r, FailedPrompt)]:
        return failed[0]
    return tuple(combine([t.weight for t in teachers], scores) for scores in zip(*results, strict=True))


class Teachers:
    """A TeacherPool for each of config.teachers, which documents the methods."""

    def __init__(self, run: str, config: Config, replica: type[TeacherReplica] = TeacherReplica):
        self._config = config
        self.pools = {t.name: TeacherPool(run, config, t, replica) for t in config.teacher_models}
        lag = config.max_policy_lag
        self._student = {t.name: PublishedVersions(t.delay, lag) for t in config.followers}

    async def start(self) -> None:
        await asyncio.gather(*(pool.start() for pool in self.pools.values()))

    def take_published(self, weights: Weights) -> None:
        """The student's new version, for the teachers that follow it."""
        for versions in self._student.values():
            versions.add(weights)

    async def score(
        self, groups: ray.ObjectRef | Sequence[TrajectoryGroup], for_selection: bool = False
    ) -> list[ScoreResult]:
        """Scores each group with all its teachers. A reference is read here for routing.

        A teacher that follows the student gets a call for each version of its weights.
        """
        read: Any = groups
        if isinstance(groups, ray.ObjectRef):
            reading = asyncio.ensure_future(groups)
            read = await with_deadline(self._config.request_timeout_s, reading, "trajectories to score")
        teachers = [self._config.teachers_of(g.prompt.prompt_id) for g in read]

        async def score(name: str) -> dict[int, ScoreResult]:
            own = [i for i, of_group in enumerate(teachers) if name in (t.name for t in of_group)]
            versions = self._student.get(name)
            calls = defaultdict[Weights | None, list[int]](list)
            for i in own:
                calls[versions and versions.behind(read[i].trajectories[0].policy_version)].append(i)
            parts = await asyncio.gather(*(ask(name, *call) for call in calls.items()))
            return {i: result for part in parts for i, result in part.items()}

        async def ask(name: str, weights: Weights | None, own: list[int]) -> dict[int, ScoreResult]:
            part = groups if len(own) == len(read) else [read[i] for i in own]
            scores = await self.pools[name].score(part, for_selection, weights)
            return dict(zip(own, scores, strict=True))

        results = await asyncio.gather(*map(score, self.pools))
        by_name = dict(zip(self.pools, results, strict=True))
        return [combine_results(own, [by_name[t.name][i] for t in own]) for i, own in enumerate(teachers)]

    async def predict(
        self,
        prompts: Prompts,
        num_answers: int = 1,
        temperature: float = 0.0,
        arrived: Arrived | None = None,
    ) -> Answers:
        """The first of its teachers answers each prompt."""
        teachers = [self._config.teachers_of(p.prompt_id)[0].name for p in prompts]

        async def predict(name: str) -> Answers:
            part = [p for p, own in zip(prompts, teachers, strict=True) if own == name]
            return await self.pools[name].predict(part, num_answers, temperature, arrived) if part else []

        results = await asyncio.gather(*map(predict, self.pools))
        answers = {name: iter(of_pool) for name, of_pool in zip(self.pools, results, strict=True)}
        return [next(answers[name]) for name in teachers]

    async def take_metrics(self) -> dict[str, float]:
        """Each pool's, as teacher/NAME/queue_s and so on."""
        return self._named(await asyncio.gather(*(pool.take_metrics() for pool in self.pools.values())))

    async def counts(self) -> dict[str, float]:
        """Each pool's, as teacher/NAME/calls and so on."""
        return self._named(await asyncio.gather(*(pool.counts() for pool in self.pools.values())))

    def _named(self, by_pool: Sequence[dict[str, float]]) -> dict[str, float]:
        named = [(name, *m) for name, ms in zip(self.pools, by_pool, strict=True) for m in ms.items()]
        return {f"teacher/{name}/{k.removeprefix('teacher/')}": value for name, k, value in named}

    def stop(self) -> None:
        for pool in self.pools.values():
            pool.stop()


def create_teacher(run: str, config: Config) -> TeacherPool | Teachers | None:
    """The run's teacher or teachers; None where neither the objective nor the curriculum needs one."""
    if not config.needs_teacher:
        return None
    return Teachers(run, config) if config.teachers else TeacherPool(run, config, config.teacher_models[0])
