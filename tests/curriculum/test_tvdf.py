"""The samplers and the coupling against slow, literal readings of their formulas."""

import itertools
from collections import Counter
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.coupling import anchors_and_frontier, suspend
from curriculum.tvdf import (
    BBDS_BUCKETS,
    GWDS_CENTRE,
    GWDS_SPREAD,
    SAMPLERS,
    bbds,
    by_video,
    disagreement,
    dsus,
    gaussian_draw,
    gwds,
    reverse_kl,
    top_k,
    uniform,
)
from tests.fakes import make_group
from video_opd.grounding import best_iou, reaches

coarse = st.integers(-10, 10).map(lambda n: n / 10)  # many ties
fine = st.floats(-1, 1)
pools = st.one_of(st.lists(coarse, min_size=1, max_size=30), st.lists(fine, min_size=1, max_size=30))


@st.composite
def pool_and_k(draw) -> tuple[np.ndarray, int]:
    delta = draw(pools)
    return np.array(delta), draw(st.integers(1, len(delta)))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def sorted_descending(delta: np.ndarray) -> list[int]:
    """Places by delta, largest first; ties in the order of the pool."""
    return sorted(range(len(delta)), key=lambda i: (-delta[i], i))


@given(pool=pool_and_k(), name=st.sampled_from(sorted(SAMPLERS)), seed=st.integers(0, 99))
def test_every_sampler_takes_k_distinct_prompts_and_the_seed_decides(pool, name, seed):
    delta, k = pool
    chosen, again = (SAMPLERS[name](delta, k, np.random.default_rng(seed)).tolist() for _ in range(2))
    assert chosen == again
    assert len(chosen) == len(set(chosen)) == k and set(chosen) <= set(range(len(delta)))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("pool", [[], [0.5], [0.3, 0.3, 0.3], [1.0, -1.0]], ids=["none", "1", "equal", "far"])
def test_every_sampler_takes_what_there_is_when_more_is_asked_for(name, pool):
    for k in range(len(pool) + 3):
        chosen = SAMPLERS[name](np.array(pool), k, rng())
        assert chosen.dtype == np.int64 and len(set(chosen.tolist())) == len(chosen) == min(k, len(pool))
        assert set(chosen.tolist()) <= set(range(len(pool)))


@given(pool=pool_and_k())
def test_top_k_takes_the_largest(pool):
    delta, k = pool
    assert top_k(delta, k, rng()).tolist() == sorted_descending(delta)[:k]


@given(pool=pool_and_k())
def test_dsus_takes_evenly_spaced_ranks_of_the_sorted_list_both_ends_included(pool):
    delta, k = pool
    order = sorted_descending(delta)
    assert dsus(delta, k, rng()).tolist() == [order[rank - 1] for rank in ranks(len(delta), k)]


def ranks(n: int, k: int) -> list[int]:
    """round(1 + (n - 1) t / (k - 1)) for t = 0 .. k - 1: from 1 to n."""
    return [floor(1 + Fraction((n - 1) * t, max(k - 1, 1)) + Fraction(1, 2)) for t in range(k)]


def test_spaced_ranks_by_hand():
    delta = np.array([0.9, 0.8, 0.6, 0.5, 0.1, -0.2])
    assert dsus(delta, 4, rng()).tolist() == [0, 2, 3, 5]  # ranks 1, 2.67, 4.33 and 6
    assert dsus(delta, 3, rng()).tolist() == [0, 3, 5]  # ranks 1, 3.5 and 6
    assert dsus(delta, 1, rng()).tolist() == [0]
    # Buckets of 0.22 from -0.2 on have one prompt, one, none, two and two: one each of four, and the fifth of
    # the lowest that has another.
    assert sorted(bbds(delta, 5, rng()).tolist()) == [0, 2, 3, 4, 5]


dyadic = st.lists(
    st.integers(-64, 64).map(lambda n: n / 64), min_size=1, max_size=30
)  # exact in floating point


@given(delta=dyadic, data=st.data())
def test_bbds_deals_equal_shares_to_five_buckets_and_spaces_them(delta, data):
    k = data.draw(st.integers(1, len(delta)))
    low, extent = Fraction(min(delta)), Fraction(max(delta)) - Fraction(min(delta))
    buckets: list[list[int]] = [[] for _ in range(BBDS_BUCKETS)]  # that of the largest delta first
    for i in sorted_descending(np.array(delta)):
        place = (
            min(BBDS_BUCKETS - 1, int((Fraction(delta[i]) - low) / (extent / BBDS_BUCKETS))) if extent else 0
        )
        buckets[BBDS_BUCKETS - 1 - place].append(i)
    shares, turn = [0] * BBDS_BUCKETS, BBDS_BUCKETS - 1
    while sum(shares) < k:  # one at a time, in turn from the lowest on, a full bucket passed over
        if shares[turn] < len(buckets[turn]):
            shares[turn] += 1
        turn = (turn - 1) % BBDS_BUCKETS
    if all(len(b) > k // BBDS_BUCKETS for b in buckets):  # the paper's k_b, b = 1 the lowest
        floors = [k // BBDS_BUCKETS + (b <= k % BBDS_BUCKETS) for b in range(1, BBDS_BUCKETS + 1)]
        assert shares == floors[::-1]
    expected = [
        b[rank - 1] for b, share in zip(buckets, shares, strict=True) for rank in ranks(len(b), share)
    ]
    assert bbds(np.array(delta), k, rng()).tolist() == expected


def inclusion(weights: list[float], k: int) -> list[float]:
    """The exact chance of each item in k draws without replacement, by enumerating every order of draws."""
    chances = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), k):
        chance, left = 1.0, sum(weights)
        for i in order:
            chance *= weights[i] / left
            left -= weights[i]
        for i in order:
            chances[i] += chance
    return chances


@pytest.mark.parametrize(
    ("delta", "k"),
    [([0.9, 0.7, 0.5, 0.2, -0.1], 2), ([0.9, 0.9, 1.0, 0.6], 3), ([-0.9, -1.0, -0.95], 1)],
    ids=["spread", "near", "far"],
)
def test_gwds_draws_with_its_exact_inclusion_frequencies(delta, k):
    draws, generator, counts = 20_000, rng(), Counter()
    for _ in range(draws):
        counts.update(gwds(np.array(delta), k, generator).tolist())
    weights = [float(np.exp(-((d - GWDS_CENTRE) ** 2) / (2 * GWDS_SPREAD**2))) for d in delta]
    for i, chance in enumerate(inclusion(weights, k)):
        sd = (chance * (1 - chance) / draws) ** 0.5
        assert abs(counts[i] / draws - chance) <= 4.5 * sd + 1e-12, (i, counts[i] / draws, chance)


def test_difficulty_draws_each_prompt_first_with_the_probability_of_eq_30():
    """P(i) = exp(-(x_i - 0.3)^2 / (2 0.2^2)) / Z over the start's IoU: weights by hand, then chi-square."""
    iou = np.array([0.0, 0.1, 0.3, 0.5, 0.7, 1.0])  # 1.5, 1, 0, 1, 2 and 3.5 deviations from the mean
    weights = np.array([0.3246525, 0.6065307, 1.0, 0.6065307, 0.1353353, 0.0021875])
    np.testing.assert_allclose(np.exp(-((iou - 0.3) ** 2) / (2 * 0.2**2)), weights, atol=1e-7)
    draws, generator = 8_000, rng()
    chosen = np.array([gaussian_draw(iou, 3, 0.3, 0.2, generator) for _ in range(draws)])
    assert (np.diff(np.sort(chosen)) > 0).all(), "without replacement"
    expected = draws * weights / weights.sum()
    counts = np.bincount(chosen[:, 0], minlength=6)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5, (
        "99.9 % of chi-square with 5 degrees of freedom"
    )
    for i, chance in enumerate(inclusion(weights.tolist(), 3)):
        found = (chosen == i).any(1).mean()
        assert abs(found - chance) <= 4.5 * (chance * (1 - chance) / draws) ** 0.5, (i, found, chance)


def test_the_reverse_kl_along_a_rollout_by_hand_and_its_mean_over_rollouts():
    """D = sum_t (log pi - log pi_T). Its expectation over the student's rollouts is KL(pi || pi_T)."""
    assert reverse_kl(np.array([-1.0, -0.5, -2.0]), np.array([-3.0, -0.25, -2.5])) == 2.25
    pi, teacher = (
        {"a": {"a": 0.9, "b": 0.1}, "b": {"a": 0.4, "b": 0.6}},
        {"a": {"a": 0.5, "b": 0.5}, "b": {"a": 0.2, "b": 0.8}},
    )
    first, of_teacher = {"a": 0.7, "b": 0.3}, {"a": 0.2, "b": 0.8}
    rollouts = [(x, y) for x in "ab" for y in "ab"]
    chances = [first[x] * pi[x][y] for x, y in rollouts]
    divergences = [
        reverse_kl(np.log([first[x], pi[x][y]]), np.log([of_teacher[x], teacher[x][y]])) for x, y in rollouts
    ]
    kl = sum(
        p * np.log(p / (of_teacher[x] * teacher[x][y])) for p, (x, y) in zip(chances, rollouts, strict=True)
    )
    assert np.dot(chances, divergences) == pytest.approx(kl)


def test_gwds_still_draws_far_from_its_centre_where_every_weight_underflows():
    assert sorted(gwds(np.array([-500.0, -400.0]), 2, rng()).tolist()) == [0, 1]


def test_uniform_draws_every_prompt_alike():
    counts, generator = Counter(), rng()
    for _ in range(6000):
        counts.update(uniform(np.zeros(6), 2, generator).tolist())
    assert all(abs(counts[i] - 2000) < 4.5 * (6000 * (1 / 3) * (2 / 3)) ** 0.5 for i in range(6)), counts


def test_reliability_and_disagreement_by_hand():
    tau, sigma = np.array([0.7, 0.69, 1.0], np.float32), np.array([0.5, 0.0, 1.0], np.float32)
    assert reaches(np.array([0.7, 0.69, 1.0]), 0.7).tolist() == [True, False, True]
    assert reaches(np.array([np.mean([0.7] * 3)]), 0.7).tolist() == [True], (
        "rounding keeps this mean below 0.7"
    )
    np.testing.assert_allclose(disagreement(tau, sigma), [0.2, 0.69, 0.0], atol=1e-7)


@given(
    sigma=st.lists(st.sampled_from([0.0, 0.29, 0.3, 0.5, 0.69, 0.7, 1.0]), min_size=0, max_size=60),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
    k=st.one_of(st.none(), st.integers(1, 40)),
)
def test_anchors_and_frontier_come_in_their_share(sigma, share, k):
    anchors, frontier = (
        {i for i, s in enumerate(sigma) if of(s)} for of in (lambda s: s >= 0.7, lambda s: s < 0.3)
    )

    limits = [len(kind) / part for kind, part in ((anchors, share), (frontier, 1 - share)) if part]
    largest = min(len(sigma), *(int(limit + 1e-9) for limit in limits))
    n = k or largest
    possible = n >= 1 and round(n * share) <= len(anchors) and n - round(n * share) <= len(frontier)
    if not possible:
        with pytest.raises(ValueError, match=f"{len(anchors)} Anchors .* {len(frontier)} Frontier"):
            anchors_and_frontier(np.array(sigma), k, 0.7, 0.3, share, rng())
        return
    chosen = anchors_and_frontier(np.array(sigma), k, 0.7, 0.3, share, rng()).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == n and set(chosen) <= anchors | frontier
    assert len(set(chosen) & anchors) == round(n * share)


def test_suspension_takes_the_solved_rollouts_alone():
    group = make_group("p", [3, 4, 5]).group
    routed = suspend(group, (0.69, 0.7, 0.9), 0.7)
    assert [len(t.response_token_ids) for t in routed.trajectories] == [3]
    assert [len(t.response_token_ids) for t in routed.suspended] == [4, 5]
    assert routed.sampled == group.trajectories
    assert suspend(group, [best_iou(None, ((2.0, 5.0),))] * 3, 0.7) == group


@given(delta=dyadic, data=st.data(), name=st.sampled_from(sorted(SAMPLERS)), seed=st.integers(0, 99))
def test_by_video_takes_the_videos_of_the_sampler_until_there_are_k_prompts(delta, data, name, seed):
    """The sampler sees one number a video. Which m it is asked for: m videos have k prompts, m - 1 do not."""
    videos = data.draw(st.lists(st.integers(0, 4), min_size=len(delta), max_size=len(delta)))
    k = data.draw(st.integers(0, len(delta) + 2))
    chosen = by_video(SAMPLERS[name], np.array(delta), np.array(videos), k, np.random.default_rng(seed))
    members = {v: [i for i in range(len(delta)) if videos[i] == v] for v in dict.fromkeys(videos)}
    means = np.array([sum(delta[i] for i in of_video) / len(of_video) for of_video in members.values()])

    def prompts_of(m: int) -> list[int]:
        """The first of the sampler's m videos first, and in each the largest delta."""
        places = SAMPLERS[name](means, m, np.random.default_rng(seed))
        of_videos = [list(members.values())[v] for v in places]
        return [i for of in of_videos for i in sorted(of, key=lambda i: (-delta[i], i))]

    wanted = min(k, len(delta))
    possible = [
        prompts_of(m)[:wanted]
        for m in range(len(members) + 1)
        if len(prompts_of(m)) >= wanted and (m == 0 or len(prompts_of(m - 1)) < wanted)
    ]
    assert chosen.tolist() in possible
    if name in ("top_k", "gwds", "uniform"):  # one order of all videos, cut after k prompts
        assert chosen.tolist() == prompts_of(len(members))[:wanted]


@pytest.mark.parametrize("k", range(7))
def test_by_video_the_mean_counts_and_the_last_video_keeps_its_largest(k):
    """Video 7 has the largest prompt, 9 the larger mean."""
    delta, videos = np.array([0.1, 0.5, 0.0, 0.6, 0.9]), np.array([7, 9, 7, 9, 7])
    assert by_video(top_k, delta, videos, k, rng()).tolist() == [3, 1, 4, 0, 2][:k]
