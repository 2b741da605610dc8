"""The two halves of the way to a scored trajectory: rollouts, and what the objective needs of the teacher."""

from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import repeat
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from actors.actor_pool import RolloutResult
from driver.demonstrations import demonstrations, is_demonstrated
from driver.records.step import num_tokens
from driver.run import Run
from teacher_service.calls import ScoreResult
from video_opd.cluster.faults import cause_of
from video_opd.errors import LearnerLostError, WeightsLostError
from video_opd.rewards import mean_reward, next_baseline, total_reward
from video_opd.types import FailedPrompt, Prompt, ScoredGroup, TrajectoryGroup


async def roll_out(
    run: Run, prompts: list[Prompt], steps: Sequence[int]
) -> AsyncIterator[tuple[Any, Sequence[RolloutResult]]]:
    """Rollouts as they arrive, as (reference, results); the ground truth if the objective uses that.

    steps: which update each prompt is for.
    """
    shown = [p for p, step in zip(prompts, steps, strict=True) if is_demonstrated(run.config, p, step)]
    if shown:
        groups = demonstrations(run.config, shown, run.step)
        yield groups, groups
    ids = {p.prompt_id for p in shown}
    if not (prompts := [p for p in prompts if p.prompt_id not in ids]):
        return
    with run.clock("rollout"):
        async for reference, results in run.actors.rollout(prompts):
            groups = [r for r in results if isinstance(r, TrajectoryGroup)]
            run.clock.count("rollout", sum(num_tokens(g.trajectories) for g in groups))
            yield reference, results


async def score(
    run: Run, reference: ray.ObjectRef | Sequence[RolloutResult], results: Sequence[RolloutResult]
) -> list[ScoredGroup | FailedPrompt]:
    """Adds what the objective needs, the teacher's scores or rewards, to every group; keeps the order.

    Suspended rollouts and failed prompts are not scored. reference: to the results, for the teacher to fetch.
    """
    groups = [r if isinstance(r, FailedPrompt) else run.curriculum.route(r) for r in results]
    asked = [g for g in groups if isinstance(g, TrajectoryGroup) and g.trajectories]
    scores: Iterator[ScoreResult] = repeat(())
    if asked and run.config.loss.needs.teacher != "none":
        whole = len(asked) == len(results) and not any(g.suspended for g in asked)
        scores = iter(await ask_teacher(run, reference if whole else asked, asked))
    return [
        g if isinstance(g, FailedPrompt) else _scored(run, g, next(scores) if g.trajectories else ())
        for g in groups
    ]


async def ask_teacher(
    run: Run, sent: Any, asked: Sequence[TrajectoryGroup], for_selection: bool = False
) -> list[ScoreResult]:
    """sent: the groups `asked`, or a reference to them, which the teacher fetches past the driver.

    for_selection: see TeacherReplica.score.
    """
    assert run.teacher, "the objective or the curriculum needs a teacher"
    with run.clock("score"):
        try:
            scores = await run.teacher.score(sent, for_selection)
        except ObjectLostError:  # with the actor's node; the driver has the value
            scores = await run.teacher.score(asked, for_selection)
        except WeightsLostError as error:  # which a teacher that follows the student was to load
            raise LearnerLostError(
                f"a teacher lacks the student: {cause_of(getattr(error, 'cause', error))}"
            ) from error
    tokens = sum(num_tokens(g.trajectories) for g in asked)
    run.totals.update(scored_rollouts=sum(len(g.trajectories) for g in asked), scored_tokens=tokens)
    run.clock.count("score", tokens)
    return scores


def _scored(run: Run, group: TrajectoryGroup, scores: ScoreResult) -> ScoredGroup | FailedPrompt:
    """What the learner gets; with rewards if the objective needs them."""
    if isinstance(scores, FailedPrompt):
        return scores
    rewards = None
    if run.rewards and group.rollouts:
        rewards = tuple(total_reward(run.rewards, t, group.prompt) for t in group.trajectories)
    return ScoredGroup(group=group, scores=scores, rewards=rewards)


def reward_baseline(run: Run, groups: Sequence[ScoredGroup]) -> float | None:
    """What this step's rewards are compared with at one rollout a prompt; None: with their groups'.

    The running mean of past steps, which the batch itself is no part of; the first step's own mean reward.
    """
    if not run.rewards or run.config.rewards_in_groups:
        return None
    return mean_reward(groups) if run.progress.baseline is None else run.progress.baseline


def count_rewards(run: Run, groups: Sequence[ScoredGroup]) -> None:
    """Takes the step's rewards into the running mean, once it has been trained on."""
    decay = run.config.loss.baseline_decay
    run.progress.baseline = next_baseline(run.progress.baseline, mean_reward(groups), decay)
