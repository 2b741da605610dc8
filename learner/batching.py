"""Scored groups -> the micro-batches of one rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from learner.loss import group_advantages, sampled_advantage
from video_opd.config_learner import LossConfig
from video_opd.types import Prompt, ScoredGroup, TeacherScores, Trajectory


@dataclass(frozen=True)
class Row:
    """One trajectory with all that its loss needs."""

    prompt: Prompt
    trajectory: Trajectory
    advantage: np.ndarray  # float32[N]; see advantages_of
    scores: TeacherScores | None
    weight: float  # 1, or 0 for a row that only keeps ranks in step, as one whose clip cannot be read


@dataclass(frozen=True)
class UpdatePlan:
    """One rank's part of one update. Every rank has the same number of micro-batches."""

    micro_batches: list[list[Row]]
    most_tokens: list[int]  # of each micro-batch: response tokens of the rank that has most
    num_tokens: int  # response tokens over ALL ranks and micro-batches, and of suspended rollouts: the
    # denominator, known before a clip is read; a row that then gets weight 0 stays in it


def plan_update(
    groups: Sequence[ScoredGroup], loss: LossConfig, micro_batch: int, rank: int, world_size: int
) -> UpdatePlan:
    """Deals the trajectories to ranks, longest first, so that micro-batches hold similar lengths.

    Suspended rollouts count in num_tokens only, so that suspension never scales up the rest.
    """
    trajectories = [(g.group.prompt, t) for g in groups for t in g.group.trajectories]
    num_tokens = sum(len(t.response_token_ids) for g in groups for t in g.group.sampled)
    if not trajectories:
        return UpdatePlan([], [], num_tokens)
    scores = [s for g in groups for s in g.scores] or [None] * len(trajectories)
    columns = zip(trajectories, advantages_of(groups, loss), scores, strict=True)
    rows = [Row(prompt, t, advantage, score, 1.0) for (prompt, t), advantage, score in columns]
    rows.sort(key=lambda row: len(row.trajectory.prompt_token_ids) + len(row.advantage), reverse=True)
    per_round = micro_batch * world_size
    micro_batches, most_tokens = [], []
    for first in range(0, len(rows), per_round):
        dealt = rows[first : first + per_round]
        of_ranks = [dealt[r::world_size] or [replace(rows[0], weight=0.0)] for r in range(world_size)]
        micro_batches.append(of_ranks[rank])
        most_tokens.append(max(sum(len(row.advantage) for row in of_rank) for of_rank in of_ranks))
    return UpdatePlan(micro_batches, most_tokens, num_tokens)


def advantages_of(groups: Sequence[ScoredGroup], loss: LossConfig) -> list[np.ndarray]:
    """float32[N] per trajectory: its group's advantage (grpo), r_t of scored rollouts, or zeros."""
    trajectories = [t for g in groups for t in g.group.trajectories]
    lengths = [len(t.response_token_ids) for t in trajectories]
    if loss.needs.rewards:
        advantages = [group_advantages(g.rewards or (), loss.advantage_std) for g in groups if g.rewards]
        return [np.full(n, a, np.float32) for n, a in zip(lengths, np.concatenate(advantages), strict=True)]
    if loss.needs.teacher == "none" or not loss.needs.rollouts:
        return [np.zeros(n, np.float32) for n in lengths]
    teacher = np.concatenate([s.teacher_logprobs for g in groups for s in g.scores])
    actor = np.concatenate([t.actor_logprobs for t in trajectories])
    return np.split(sampled_advantage(teacher, actor, loss), np.cumsum(lengths)[:-1])
