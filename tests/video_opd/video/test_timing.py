"""Times of pictures from timestamps that cannot all be right."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from video_opd.video.timing import rate_and_times, shown_times

NONE = np.full(100, np.nan)
gaps = st.lists(st.sampled_from([0.02, 0.04, 0.2, 3.0]), min_size=20, max_size=60)


def times_of(gaps_s: list[float]) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(gaps_s)])


@given(gaps, st.floats(-5, 100))
def test_good_timestamps_are_taken_as_they_are(gaps_s, start):
    times = times_of(gaps_s)
    shown = shown_times(times + start, np.full(len(times), np.nan))
    assert shown is not None
    np.testing.assert_allclose(shown, times, atol=1e-9)


@given(gaps, st.integers(3, 18), st.sampled_from(["equal", "missing", "back", "ahead"]))
@example([0.04] * 40, 5, "equal")
def test_one_doubtful_timestamp_moves_no_other(gaps_s, place, fault):
    times = times_of(gaps_s)
    bad = {"equal": times[place - 1], "missing": np.nan, "back": -1.0, "ahead": times[-1] + 9}
    pts = times.copy()
    pts[place] = bad[fault]
    shown = shown_times(pts, np.full(len(pts), np.nan))
    assert shown is not None and (np.diff(shown) > 0).all()
    others = np.arange(len(times)) != place
    np.testing.assert_allclose(shown[others], times[others], atol=1e-9)
    assert times[place - 1] < shown[place] < times[place + 1]


@given(gaps, st.sets(st.integers(2, 19), max_size=4))
def test_several_doubtful_timestamps_move_no_other(gaps_s, places):
    times = times_of(gaps_s)
    pts, at = times.copy(), np.array(sorted(places), int)
    assume((np.diff(at) > 1).all())
    pts[at] = pts[at - 1]
    shown = shown_times(pts, np.full(len(pts), np.nan))
    others = ~np.isin(np.arange(len(times)), at)
    assert shown is not None and (np.diff(shown) > 0).all()
    np.testing.assert_allclose(shown[others], times[others], atol=1e-9)


def test_missing_ends_are_continued():
    pts = np.arange(20) / 10
    pts[[0, 1, 18, 19]] = np.nan
    shown = shown_times(pts, np.full(20, np.nan))
    assert shown is not None
    np.testing.assert_allclose(shown, np.arange(20) / 10, atol=1e-9)


@pytest.mark.parametrize("begin", [(0.0, 0.0), (50.0, 3.0), (2.0, 1.0)])
@pytest.mark.parametrize("lengths", [(30, 70), (70, 30)])
def test_recordings_that_were_joined_follow_each_other(begin, lengths):
    pts = np.concatenate([start + np.arange(n) / 25 for start, n in zip(begin, lengths, strict=True)])
    shown = shown_times(pts, NONE)
    assert shown is not None
    np.testing.assert_allclose(shown, np.arange(100) / 25, atol=1e-9)


def test_a_file_without_presentation_times_has_those_of_its_packets():
    dts = np.delete(np.arange(101) / 25, 40)
    for pts in (NONE, np.where(np.arange(100) % 3, dts, np.nan), np.roll(dts, 50) % 0.4):
        shown = shown_times(pts, dts)
        assert shown is not None
        np.testing.assert_allclose(shown, dts, atol=1e-9)


@pytest.mark.parametrize(
    "pts", [NONE, np.zeros(100), np.arange(100)[::-1] % 7, np.array([]), np.array([1.0])]
)
def test_a_file_may_have_no_times(pts):
    assert shown_times(pts.astype(float), np.full(len(pts), np.nan)) is None


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=40))
def test_whatever_is_in_a_file_its_times_ascend_from_0_or_are_none(pts):
    shown = shown_times(np.array(pts), np.full(len(pts), np.nan))
    assert shown is None or (shown[0] == 0 and np.isfinite(shown).all() and (np.diff(shown) >= 0).all())


def test_the_rate_is_constant_if_every_frame_is_within_half_a_frame_of_its_place():
    times = np.arange(100) / 25
    assert rate_and_times(100, 25.0, times) == (25.0, None)
    assert rate_and_times(100, 25.0, None) == (25.0, None)
    for wrong in (0.0, 50.0, 24.0):  # of the container
        rate, varying = rate_and_times(100, wrong, times)
        assert rate == pytest.approx(25) and varying is None
    times[50:] += 0.1
    rate, varying = rate_and_times(100, 25.0, times)
    assert varying is times and rate == pytest.approx(99 / times[-1])
