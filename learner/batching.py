"""Scored groups -> the micro-batches of one rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.loss import pointwise_signal
from video_opd.config import LossConfig
from video_opd.types import Prompt, ScoredGroup, TopK, Trajectory


@dataclass(frozen=True)
class Row:
    """One trajectory with all that its loss needs."""

    prompt: Prompt
    trajectory: Trajectory
    signal: np.ndarray  # float32[N]
    top_k: TopK | None
    weight: float  # 1, or 0 for a row that only keeps ranks in step


@dataclass(frozen=True)
class UpdatePlan:
    """What one rank does in one update. Every rank has the same number of micro-batches."""

    micro_batches: list[list[Row]]
    num_tokens: int  # response tokens over ALL ranks and micro-batches, those of suspended rollouts included


def plan_update(groups: Sequence[ScoredGroup], loss: LossConfig, micro_batch: int, rank: int, world_size: int) -> UpdatePlan:
    """Deals the trajectories to ranks, longest first, so that micro-batches hold like lengths.

    The signal is computed here, over the whole batch, so that centring means the same for any world size. A rank
    that has no row for its last micro-batch repeats one with weight 0. Suspended rollouts are in the denominator
    alone, so that suspension never scales up what is left; when all are suspended there are no micro-batches.
    """
    pairs = [(g.group.prompt, t, s) for g in groups for t, s in zip(g.group.trajectories, g.scores, strict=True)]
    lengths = [len(t.response_token_ids) for _, t, _ in pairs]
    num_tokens = sum(len(t.response_token_ids) for g in groups for t in g.group.sampled)
    if not pairs:
        return UpdatePlan([], num_tokens)
    signal = pointwise_signal(
        np.concatenate([s.teacher_logprobs for _, _, s in pairs]),
        np.concatenate([t.actor_logprobs for _, t, _ in pairs]),
        loss,
    )
    signals = np.split(signal, np.cumsum(lengths)[:-1])
    rows = [Row(p, t, r, s.top_k, 1.0) for (p, t, s), r in zip(pairs, signals, strict=True)]
    rows.sort(key=lambda row: len(row.trajectory.prompt_token_ids) + len(row.signal), reverse=True)
    per_round = micro_batch * world_size
    micro_batches = []
    for first in range(0, len(rows), per_round):
        mine = rows[first : first + per_round][rank::world_size]
        filler = Row(rows[0].prompt, rows[0].trajectory, rows[0].signal, rows[0].top_k, 0.0)
        micro_batches.append(mine or [filler])
    return UpdatePlan(micro_batches, num_tokens)
