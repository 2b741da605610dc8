"""Teacher-Validated Disagreement Focusing (TVDF; arXiv 2602.02994 §3.2 and App. B; docs/algorithm.md).

The pool has P prompts. tau_i is the mean IoU of the teacher's answers to prompt i, sigma_i that of the
student's answers. A sampler takes delta float64[P], the number k of prompts to select and a random generator.
It returns int64[min(k, P)], distinct indices; ties keep the order of the pool.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

BBDS_BUCKETS = 5
GWDS_CENTRE, GWDS_SPREAD = 0.9, 0.2
Sampler = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def disagreement(teacher_iou: np.ndarray, student_iou: np.ndarray) -> np.ndarray:
    """DBTP: delta_i = tau_i - sigma_i (eq. 12), float64[P]."""
    return teacher_iou.astype(np.float64) - student_iou


def reverse_kl(student_logprobs: np.ndarray, teacher_logprobs: np.ndarray) -> float:
    """D = sum_t (log pi(a_t|s_t) - log pi_T(a_t|s_t)) along a response that the student sampled, nats.

    §3.2: "the aggregated reverse KL divergence ... along the sampled reasoning trajectory", with the signal
    of eq. 5: D = -sum_t r_t. logprobs: float[N], of the response's tokens.
    """
    return float(np.sum(student_logprobs.astype(np.float64) - teacher_logprobs))


def top_k(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """The k largest delta, largest first; the paper's default."""
    return _descending(delta)[:k]


def dsus(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Evenly spaced in the prompts sorted by delta, descending, both ends included (eq. 14).

    Positions round(1 + (P - 1) t / (k - 1)), t = 0 .. k - 1, counted from 1; of one, the first.
    """
    return _descending(delta)[_uniform_positions(len(delta), min(k, len(delta)))]


def bbds(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """An equal share of k from each of 5 equal-width buckets over the range of delta, spaced as in dsus.

    The remainder goes to the buckets of smallest delta (eq. 19). The others share what a bucket lacks: ours,
    the paper does not say.
    """
    k = min(k, len(delta))
    if k == 0:
        return np.zeros(0, np.int64)
    above, extent = delta - delta.min(), np.ptp(delta)
    bucket = np.minimum(above * BBDS_BUCKETS / (extent or 1.0), BBDS_BUCKETS - 1).astype(np.int64)
    order = _descending(delta)
    members = [order[bucket[order] == b] for b in range(BBDS_BUCKETS)]
    shares = equal_shares([len(m) for m in members], k)
    chosen = [m[_uniform_positions(len(m), n)] for m, n in zip(members, shares, strict=True)]
    return np.concatenate(chosen[::-1])


def gwds(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draws by gaussian_draw around 0.9, with a spread of 0.2 (eq. 21 and 22)."""
    return gaussian_draw(delta, k, GWDS_CENTRE, GWDS_SPREAD, rng)


def uniform(delta: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k prompts, each equally likely."""
    return rng.permutation(len(delta))[:k]


SAMPLERS: dict[str, Sampler] = {"top_k": top_k, "dsus": dsus, "bbds": bbds, "gwds": gwds, "uniform": uniform}


def gaussian_draw(
    values: np.ndarray, k: int, mean: float, std: float, rng: np.random.Generator
) -> np.ndarray:
    """int64[min(k, P)]: draws without replacement, p_i proportional to exp(-(x_i - mean)^2 / (2 std^2)).

    Of values x float64[P]. Eq. 21 over delta; eq. 30 over the student's IoU, grpo's selection by difficulty.
    """
    log_p = -((values - mean) ** 2) / (2 * std**2)
    # The k largest of log p_i plus Gumbel noise are distributed like k successive draws, without underflow.
    return _descending(log_p + rng.gumbel(size=len(values)))[:k]


def by_video(
    sampler: Sampler, delta: np.ndarray, videos: np.ndarray, k: int, rng: np.random.Generator
) -> np.ndarray:
    """Whole videos: the sampler runs on the means of delta, D_v = (1 / |v|) sum_{i in v} delta_i.

    videos: int64[P], of each prompt. The sampler selects m videos, so many that they have k prompts where
    m - 1 videos have fewer. In its order, the prompts of a video by delta, descending, the first k are taken:
    the last video is cut. Ours, not the paper's.
    """
    _, first, video = np.unique(videos, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first))[video]  # of each prompt's video, in the order of the pool
    sizes = np.bincount(place)
    means = np.bincount(place, weights=delta) / sizes
    before = rng.bit_generator.state

    def drawn(m: int) -> np.ndarray:
        rng.bit_generator.state = before  # the same draws whatever m is
        return sampler(means, m, rng)

    k = min(k, len(delta))
    chosen = drawn(bisect_left(range(len(sizes)), k, key=lambda m: int(sizes[drawn(m)].sum())))
    rank = np.full(len(sizes), len(sizes))
    rank[chosen] = np.arange(len(chosen))
    return np.lexsort((np.argsort(_descending(delta)), rank[place]))[:k]


def equal_shares(sizes: Sequence[int], k: int) -> list[int]:
    """Deals k one at a time to the groups in turn, skipping full ones; k is at most the sum of the sizes."""
    full, shares = np.asarray(sizes), np.zeros(len(sizes), np.int64)
    while left := k - int(shares.sum()):
        open_groups = np.flatnonzero(shares < full)[:left]
        each = left // len(open_groups)
        shares[open_groups] = np.minimum(shares[open_groups] + each, full[open_groups])
    return shares.tolist()


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")


def _uniform_positions(length: int, k: int) -> np.ndarray:
    """int64[k]: from 0 to length - 1; a half is rounded up."""
    gaps = max(k - 1, 1)
    return (2 * np.arange(k) * (length - 1) + gaps) // (2 * gaps)
