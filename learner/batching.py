"""Scored groups -> the micro-batches of one rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from learner.loss import group_advantages, pointwise_signal
from video_opd.config import LossConfig
from video_opd.types import Prompt, ScoredGroup, TeacherScores, Trajectory


@dataclass(frozen=True)
class Row:
    """One trajectory with all that its loss needs."""

    prompt: Prompt
    trajectory: Trajectory
    signal: np.ndarray  # float32[N]; see signals_of
    scores: TeacherScores | None
    weight: float  # 1, or 0 for a row that only keeps ranks in step


@dataclass(frozen=True)
class UpdatePlan:
    """What one rank does in one update. Every rank has the same number of micro-batches."""

    micro_batches: list[list[Row]]
    most_tokens: list[int]  # of each micro-batch: the response tokens of the rank that has most
    num_tokens: int  # response tokens over ALL ranks and micro-batches, those of suspended rollouts included


def plan_update(
    groups: Sequence[ScoredGroup], loss: LossConfig, micro_batch: int, rank: int, world_size: int
) -> UpdatePlan:
    """Deals the trajectories to ranks, longest first, so that micro-batches hold like lengths.

    The signal is computed here, over the whole batch, so that centring means the same for any world size. A rank
    that has no row for its last micro-batch repeats one with weight 0. Suspended rollouts are in the denominator
    alone, so that suspension never scales up what is left; when all are suspended there are no micro-batches.
    """
    trajectories = [(g.group.prompt, t) for g in groups for t in g.group.trajectories]
    num_tokens = sum(len(t.response_token_ids) for g in groups for t in g.group.sampled)
    if not trajectories:
        return UpdatePlan([], [], num_tokens)
    scores = [s for g in groups for s in g.scores] or [None] * len(trajectories)
    rows = [
        Row(prompt, trajectory, signal, score, 1.0)
        for (prompt, trajectory), signal, score in zip(
            trajectories, signals_of(groups, loss), scores, strict=True
        )
    ]
    rows.sort(key=lambda row: len(row.trajectory.prompt_token_ids) + len(row.signal), reverse=True)
    per_round = micro_batch * world_size
    micro_batches, most_tokens = [], []
    for first in range(0, len(rows), per_round):
        dealt = rows[first : first + per_round]
        of_ranks = [dealt[r::world_size] or [replace(rows[0], weight=0.0)] for r in range(world_size)]
        micro_batches.append(of_ranks[rank])
        most_tokens.append(max(sum(len(row.signal) for row in of_rank) for of_rank in of_ranks))
    return UpdatePlan(micro_batches, most_tokens, num_tokens)


def signals_of(groups: Sequence[ScoredGroup], loss: LossConfig) -> list[np.ndarray]:
    """float32[N] for every trajectory: its advantage (grpo), r_t where a teacher scored what the student sampled, or zeros."""
    trajectories = [t for g in groups for t in g.group.trajectories]
    lengths = [len(t.response_token_ids) for t in trajectories]
    if loss.needs.rewards:
        advantages = np.concatenate(
            [group_advantages(g.rewards or (), loss.advantage_std) for g in groups if g.group.trajectories]
        )
        return [np.full(n, a, np.float32) for n, a in zip(lengths, advantages, strict=True)]
    if loss.needs.teacher == "none" or not loss.needs.rollouts:
        return [np.zeros(n, np.float32) for n in lengths]
    teacher = np.concatenate([s.teacher_logprobs for g in groups for s in g.scores])
    signal = pointwise_signal(teacher, np.concatenate([t.actor_logprobs for t in trajectories]), loss)
    return np.split(signal, np.cumsum(lengths)[:-1])
