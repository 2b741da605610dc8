"""Student-curriculum coupling (SCC, arXiv 2609.40055): selects the prompts of a run and suspends rollouts."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import numpy as np
from numpy.random import Generator

from video_opd.grounding import reaches
from video_opd.types import TrajectoryGroup


def anchors_and_frontier(
    sigma: np.ndarray,
    k: int | None,
    anchor_iou: float,
    frontier_iou: float,
    share: float,
    rng: Generator,
    most: float = np.inf,
) -> np.ndarray:
    """Draws Anchors (sigma_i >= anchor_iou) and Frontier (sigma_i < frontier_iou); int64[k], ascending.

    A `share` are Anchors (paper: 1 of 10). k None: as many as both kinds allow at that share, up to `most`.
    Raises ValueError when there are too few of a kind.
    """
    anchors = np.flatnonzero(reaches(sigma, anchor_iou))
    frontier = np.flatnonzero(~reaches(sigma, frontier_iou))
    if k is None:
        of_kinds = _at_share(len(anchors), share), _at_share(len(frontier), 1.0 - share)
        k = int(min(*of_kinds, len(sigma), most))
    num_anchors = round(k * share)
    if k < 1 or num_anchors > len(anchors) or k - num_anchors > len(frontier):
        found = f"{len(anchors)} Anchors (student IoU >= {anchor_iou}) and {len(frontier)} Frontier prompts"
        wanted = f"{max(k, 1)} prompts with a share of {share} Anchors"
        raise ValueError(f"{found} (below {frontier_iou}) cannot give {wanted}")
    chosen = [rng.permutation(anchors)[:num_anchors], rng.permutation(frontier)[: k - num_anchors]]
    return np.sort(np.concatenate(chosen))


def _at_share(available: int, share: float) -> float:
    """The largest total of which `available` prompts can be the share."""
    return np.floor(available / share + 1e-9) if share else np.inf


def suspend(group: TrajectoryGroup, ious: Sequence[float], threshold: float) -> TrajectoryGroup:
    """Suspends each rollout of IoU >= threshold: not scored, and only in the denominator of the loss."""
    solved = reaches(np.asarray(ious), threshold)
    left, suspended = (tuple(compress(group.trajectories, which)) for which in (~solved, solved))
    return replace(group, trajectories=left, suspended=suspended)
