"""Scored groups -> the passes of one rank: sequences of one clip, which begin alike, go together."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, inf

import numpy as np

from learner.signals import Signal, signals_of
from video_opd.config_learner import LearnerConfig, LossConfig, Reduction
from video_opd.models.trees import trees_of
from video_opd.types import Clip, Prompt, ScoredGroup, TeacherScores, Trajectory
from video_opd.video.clips import frames_key


@dataclass(frozen=True)
class Row:
    """One trajectory with all that its loss needs."""

    prompt: Prompt
    trajectory: Trajectory
    token_ids: np.ndarray  # int32[M + N], of prompt and response
    is_video: np.ndarray  # bool[M + N]
    signal: Signal
    scores: TeacherScores | None
    weight: float  # 1, or 0 for a row that only keeps ranks in step, as one whose clip cannot be read


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one clip that share a pass: all of them, or as many as fit."""

    rows: list[Row]

    @cached_property
    def clip(self) -> Hashable:
        return _clip_key(self.rows[0].prompt.clip)

    @cached_property
    def num_tokens(self) -> int:
        """Computed: those that rows begin with once."""
        ids, videos = zip(*((row.token_ids, row.is_video) for row in self.rows), strict=True)
        return sum(tree.num_tokens for tree in trees_of(ids, videos, [None] * len(ids)))


@dataclass
class Pass:
    """What a rank computes at once."""

    parts: list[Part] = field(default_factory=list)  # of different clips

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    def has_room(self, part: Part, learner: LearnerConfig) -> bool:
        if not self.parts:
            return True
        filled = Pass(self._with(part))
        num_rows = sum(len(part.rows) for part in filled.parts)
        return num_rows <= learner.micro_batch and filled.num_tokens <= (learner.tree_tokens or inf)

    def add(self, part: Part) -> None:
        self.parts = self._with(part)

    def _with(self, part: Part) -> list[Part]:
        """Parts of one clip become one: together they may share less than each of them alone."""
        same = [p for p in self.parts if p.clip == part.clip]
        joined = Part([row for p in [*same, part] for row in p.rows]) if same else part
        return [*(p for p in self.parts if p.clip != part.clip), joined]

    def take_smallest(self) -> Part:
        smallest = min(self.parts, key=lambda part: part.num_tokens)
        self.parts.remove(smallest)
        return smallest


@dataclass(frozen=True)
class UpdatePlan:
    """One rank's part of one update. Every rank has the same number of micro-batches."""

    micro_batches: list[list[Row]]
    most_tokens: list[int]  # of each micro-batch: response tokens of the rank that has most
    denominator: float  # of the loss; see denominator_of


def plan_update(
    groups: Sequence[ScoredGroup],
    loss: LossConfig,
    learner: LearnerConfig,
    rank: int,
    ids_of: Callable[[Prompt], np.ndarray],
    video_id: int,
    num_sequences: int | None = None,
    baseline: float | None = None,
) -> UpdatePlan:
    """Deals the rows of each clip to ranks, and packs those of a rank into passes; every rank plans the same.

    ids_of: the tokens int32[M] of a prompt whose trajectories have none, as nobody sampled them.
    video_id: the token that stands for a part of a video. num_sequences: see denominator_of.
    baseline: see signals_of.
    """
    denominator = denominator_of(groups, loss.reduction, num_sequences)
    rows = _rows_of(groups, signals_of(groups, loss, baseline), ids_of, video_id)
    if not rows:
        return UpdatePlan([], [], denominator)
    of_clips = defaultdict(list)
    for row in rows:
        of_clips[_clip_key(row.prompt.clip)].append(row)
    of_ranks = _deal([part for of_clip in of_clips.values() for part in _parts(of_clip, learner)], learner)
    batches = [_filled(passes, rows) for passes in of_ranks]
    counts = [[sum(len(row.signal.advantage) for row in batch) for batch in of_rank] for of_rank in batches]
    return UpdatePlan(batches[rank], [max(of_pass) for of_pass in zip(*counts, strict=True)], denominator)


def denominator_of(
    groups: Sequence[ScoredGroup], reduction: Reduction, num_sequences: int | None = None
) -> float:
    """What the sum of the loss over all response tokens, of ALL ranks and micro-batches, is divided by.

    sequence: B in eq. 6 of arXiv 2602.02994, the number of rollouts. With SCC's schedule it is num_sequences,
    n_t in eq. 8 of arXiv 2609.40055, however many there are. token_mean: so many times a rollout's mean
    length; without the schedule, all response tokens. sum: 1. It is known before a clip is read. Suspended
    and unreadable rollouts stay in it: losing them never scales up the rest.
    """
    lengths = [len(t.response_token_ids) for g in groups for t in g.group.sampled]
    sequences = len(lengths) if num_sequences is None else num_sequences
    tokens = sum(lengths) * sequences / max(1, len(lengths))
    return {"token_mean": tokens, "sequence": sequences, "sum": 1}[reduction]


def _rows_of(
    groups: Sequence[ScoredGroup],
    signals: Sequence[Signal],
    ids_of: Callable[[Prompt], np.ndarray],
    video_id: int,
) -> list[Row]:
    trajectories = [(g.group.prompt, t) for g in groups for t in g.group.trajectories]
    scores = [s for g in groups for s in g.scores] or [None] * len(trajectories)
    rows = []
    for (prompt, trajectory), signal, score in zip(trajectories, signals, scores, strict=True):
        asked = trajectory.prompt_token_ids if len(trajectory.prompt_token_ids) else ids_of(prompt)
        token_ids = np.concatenate([asked, trajectory.response_token_ids])
        rows.append(Row(prompt, trajectory, token_ids, token_ids == video_id, signal, score, 1.0))
    return rows


def _parts(rows: Sequence[Row], learner: LearnerConfig) -> list[Part]:
    """The fewest parts that fit into a pass, with about equally many rows; neighbours stay together."""
    bound = learner.tree_tokens or inf
    full = _cut(rows, learner.micro_batch, bound)
    return min(_cut(rows, ceil(len(rows) / len(full)), bound), full, key=len)


def _cut(rows: Sequence[Row], most_rows: int, most_tokens: float) -> list[Part]:
    """Parts filled one after another. A row that alone has more than `most_tokens` is a part of its own."""
    parts: list[Part] = []
    for row in rows:
        if parts and len(parts[-1].rows) < most_rows:
            longer = Part([*parts[-1].rows, row])
            if longer.num_tokens <= most_tokens:
                parts[-1] = longer
                continue
        parts.append(Part([row]))
    return parts


def _deal(parts: Sequence[Part], learner: LearnerConfig) -> list[list[list[Row]]]:
    """For each rank its passes, equally many; one is empty only where a rank has fewer parts than passes.

    The largest part comes first and goes to the rank with fewest tokens, into its pass with fewest tokens.
    There are more passes only where a part fits into no rank's.
    """
    num_rows = sum(len(part.rows) for part in parts)
    num_passes = ceil(num_rows / (learner.micro_batch * learner.world_size))
    of_ranks = [[Pass() for _ in range(num_passes)] for _ in range(learner.world_size)]
    tokens = [0] * learner.world_size
    for part in sorted(parts, key=lambda part: part.num_tokens, reverse=True):
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        rank = next((r for r in order if any(p.has_room(part, learner) for p in of_ranks[r])), None)
        if rank is None:
            rank = order[0]
            for passes in of_ranks:
                passes.append(Pass())
        room = [p for p in of_ranks[rank] if p.has_room(part, learner)]
        min(room, key=lambda p: p.num_tokens).add(part)
        tokens[rank] += part.num_tokens
    for passes in of_ranks:
        for empty in [p for p in passes if not p.parts]:
            fullest = max(passes, key=lambda p: len(p.parts))
            if len(fullest.parts) > 1:
                empty.add(fullest.take_smallest())
    return [[[row for part in p.parts for row in part.rows] for p in _in_order(rank)] for rank in of_ranks]


def _in_order(passes: list[Pass]) -> list[Pass]:
    """Largest first, as on the other ranks; passes of one clip follow each other, so it is held briefly."""
    passes = sorted(passes, key=lambda p: p.num_tokens, reverse=True)
    clips = [[part.clip for part in p.parts] for p in passes]
    first: dict[Hashable, int] = {}
    for place, of_pass in enumerate(clips):
        for clip in of_pass:
            first.setdefault(clip, place)
    places = [min((first[clip] for clip in of_pass), default=len(passes)) for of_pass in clips]
    return [passes[i] for i in sorted(range(len(passes)), key=places.__getitem__)]


def _clip_key(clip: Clip) -> Hashable:
    """Equal for clips of the same frames at the same times: their prompts have one text of the video."""
    return frames_key(clip), clip.timestamps_s.tobytes(), clip.duration_s


def _filled(passes: list[list[Row]], rows: Sequence[Row]) -> list[list[Row]]:
    """A rank's passes, the shortest of its rows, or of all `rows` if it has none, in place of no row."""
    own = [row for of_pass in passes for row in of_pass] or rows
    filler = replace(min(own, key=lambda row: len(row.token_ids)), weight=0.0)
    return [of_pass or [filler] for of_pass in passes]
