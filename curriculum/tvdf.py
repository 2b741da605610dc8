"""Teacher-Validated Disagreement Focusing: pure functions over arrays (Video-OPD; ALGORITHM.md section 2).

P prompts of the pool. tau_i is the mean IoU of the teacher's answers to prompt i with the ground truth, sigma_i that of
the student's answer. Every sampler takes delta float64[P], the number k of prompts to select and a random generator,
and returns int64[k], distinct indices; ties fall in the order of the pool.
"""

from collections.abc import Callable, Sequence

import numpy as np

from video_opd.grounding import ROUNDING

BBDS_BUCKETS = 5
GWDS_CENTRE, GWDS_SPREAD = 0.9, 0.2
Sampler = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def reliable(teacher_iou: np.ndarray, threshold: float) -> np.ndarray:
    """bool[P]: TRPV keeps prompt i when tau_i >= threshold."""
    return teacher_iou >= threshold - ROUNDING


def disagreement(teacher_iou: np.ndarray, student_iou: np.ndarray) -> np.ndarray:
    """DBTP: delta_i = tau_i - sigma_i, float64[P]."""
    return teacher_iou.astype(np.float64) - student_iou


def top_k(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """The k largest delta_i, largest first: the paper's default."""
    return _descending(delta)[:k]


def dsus(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Every (P / k)-th of the prompts sorted by delta, descending: positions floor(j P / k), j = 0 .. k - 1."""
    return _descending(delta)[_uniform_positions(len(delta), k)]


def bbds(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """B = 5 buckets of equal width over the range of delta, an equal share of k from each, spaced as in dsus inside.

    What a bucket lacks is shared by the others; what does not divide goes to the buckets of larger delta.
    """
    above, extent = delta - delta.min(), np.ptp(delta)
    bucket = np.minimum(above * BBDS_BUCKETS / (extent or 1.0), BBDS_BUCKETS - 1).astype(np.int64)
    order = _descending(delta)
    members = [order[bucket[order] == b] for b in reversed(range(BBDS_BUCKETS))]
    shares = equal_shares([len(m) for m in members], k)
    return np.concatenate(
        [m[_uniform_positions(len(m), share)] for m, share in zip(members, shares, strict=True)]
    )


def gwds(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k draws without replacement, p_i proportional to exp(-(delta_i - c)^2 / (2 s^2)), c = 0.9, s = 0.2; in order of draw.

    Gumbel noise on log p_i and the k largest: the same distribution as k successive draws, in one pass and without
    underflow of small p_i.
    """
    log_p = -((delta - GWDS_CENTRE) ** 2) / (2 * GWDS_SPREAD**2)
    return _descending(log_p + rng.gumbel(size=len(delta)))[:k]


def uniform(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k of the prompts, each as likely as any other."""
    return rng.permutation(len(delta))[:k]


SAMPLERS: dict[str, Sampler] = {"top_k": top_k, "dsus": dsus, "bbds": bbds, "gwds": gwds, "uniform": uniform}


def equal_shares(sizes: Sequence[int], k: int) -> list[int]:
    """k dealt one at a time to the groups in turn, a full group passed over; k is at most the sum of the sizes."""
    shares = np.zeros(len(sizes), np.int64)
    while left := k - int(shares.sum()):
        unfilled = np.flatnonzero(shares < sizes)
        if left < len(unfilled):
            shares[unfilled[:left]] += 1
        else:
            shares[unfilled] = np.minimum(
                shares[unfilled] + left // len(unfilled), np.asarray(sizes)[unfilled]
            )
    return shares.tolist()


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")


def _uniform_positions(length: int, k: int) -> np.ndarray:
    return np.arange(k) * length // max(k, 1)
