"""Student-curriculum coupling (SCC, arXiv 2609.40055): selects the prompts of a run and suspends rollouts."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from video_opd.grounding import ROUNDING
from video_opd.types import Span, TrajectoryGroup


def anchors_and_frontier(
    student_iou: np.ndarray,
    k: int | None,
    anchor_iou: float,
    frontier_iou: float,
    anchor_frac: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws Anchors (sigma_i >= anchor_iou) and Frontier (sigma_i < frontier_iou); int64[k], ascending.

    A share of anchor_frac are Anchors (paper: 1 of 10). k None: as many as both kinds allow at that share.
    Raises ValueError when there are too few of a kind.
    """
    anchors = np.flatnonzero(student_iou >= anchor_iou - ROUNDING)
    frontier = np.flatnonzero(student_iou < frontier_iou - ROUNDING)
    if k is None:
        limits = (_at_share(len(anchors), anchor_frac), _at_share(len(frontier), 1.0 - anchor_frac))
        k = int(min(*limits, len(student_iou)))
    num_anchors = round(k * anchor_frac)
    if k < 1 or num_anchors > len(anchors) or k - num_anchors > len(frontier):
        raise ValueError(
            f"{len(anchors)} Anchors (student IoU >= {anchor_iou}) and {len(frontier)} Frontier prompts "
            f"(below {frontier_iou}) cannot give {max(k, 1)} prompts with a share of {anchor_frac} Anchors"
        )
    chosen = [rng.permutation(anchors)[:num_anchors], rng.permutation(frontier)[: k - num_anchors]]
    return np.sort(np.concatenate(chosen))


def _at_share(available: int, share: float) -> float:
    """The largest total of which `available` prompts can be the share."""
    return np.floor(available / share + 1e-9) if share else np.inf


def suspend(group: TrajectoryGroup, iou: Callable[[Span | None], float], threshold: float) -> TrajectoryGroup:
    """Suspends the rollouts of IoU >= threshold: not scored, and only in the denominator of the loss.

    Each rollout decides for itself, so a prompt is active again as soon as the student falls below.
    """
    solved = [iou(t.predicted_span_s) >= threshold - ROUNDING for t in group.trajectories]
    split = list(zip(group.trajectories, solved, strict=True))
    return replace(
        group, trajectories=tuple(t for t, s in split if not s), suspended=tuple(t for t, s in split if s)
    )
