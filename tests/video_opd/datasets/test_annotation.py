"""Intervals at the ends of clips: noise of decimals and float32 is none, and advice that is printed works."""

import math
import re

import numpy as np
import pytest

from video_opd.datasets.annotation import DUST_S, Annotation, fit, round_up

FRAME_S = 0.04


def annotation(*spans: tuple[float, float], duration_s: float | None) -> Annotation:
    return Annotation(
        where="a.json: item 1", prompt_id="a:1", video="a", query="q", spans_s=spans, duration_s=duration_s
    )


def faults(start: float, end: float, duration_s: float | None, clip_s: float, clamp_s: float = 0.0):
    spans, found = fit(annotation((start, end), duration_s=duration_s), clip_s, FRAME_S, clamp_s)
    assert spans is not None
    return spans[0], [fault.kind for fault in found], [fault.reason for fault in found]


@pytest.mark.parametrize(
    ("start", "end", "duration_s", "clip_s"),
    [
        (57.64, 70.29, 70.28999999999999, 70.5),  # ActivityNet Captions has many of these
        (57.64, math.nextafter(70.29, 99), 70.29, 70.5),
        (57.64, float(np.float32(70.29)), 70.29, 70.5),
        (57.64, 70.29, float(np.float32(70.29) - np.float32(1e-5)), 70.5),
        (6990.1, float(np.float32(7199.9999)), 7199.9998, 7200.0),
        (57.64, 70.29 + FRAME_S + 1e-9, None, 70.29),  # the file's end, and a frame
        (57.64, 70.29 + FRAME_S + 1e-9, 71.0, 70.29),
        (-1e-12, 70.29, 70.29, 70.5),
        (0.1 + 0.2 - 0.3 - 1e-9, 1.0, 70.29, 70.5),
    ],
)
def test_dust_at_the_ends_of_a_clip_is_no_fault_and_the_interval_lies_inside(start, end, duration_s, clip_s):
    span, kinds, _ = faults(start, end, duration_s, clip_s)
    assert not kinds
    length = clip_s if duration_s is None else min(duration_s, clip_s + FRAME_S)
    assert 0 <= span[0] < span[1] <= length
    assert span == pytest.approx((start, end), abs=FRAME_S + DUST_S)


@pytest.mark.parametrize(
    ("start", "end", "kind"),
    [
        (1.0, 10.01, "beyond_duration"),
        (10.0 - 1e-9, 10.0 + 1e-9, "zero_length"),
        (10.0 - 1e-9, 10.4, "beyond_duration"),
        (5.0, 5.0 + 1e-9, "zero_length"),
        (5.0 + 1e-9, 5.0, "zero_length"),
        (5.0 + 1e-2, 5.0, "reversed"),
        (-0.01, 5.0, "before_start"),
    ],
)
def test_more_than_dust_is_a_fault_and_an_interval_of_dust_is_of_zero_length(start, end, kind):
    assert faults(start, end, 10.0, 12.0)[1] == [kind]


@pytest.mark.parametrize("excess", [0.0011, 0.01, 0.1, math.nextafter(0.1, 1), 0.35, 0.4000000001, 1.0, 3.3])
@pytest.mark.parametrize(("duration_s", "clip_s"), [(70.28999999999999, 70.5), (71.0, 70.29), (None, 70.29)])
def test_the_allowance_that_is_advised_admits_the_annotation(excess, duration_s, clip_s):
    length = clip_s if duration_s is None else min(duration_s, clip_s + FRAME_S)
    end = length + excess + (FRAME_S if duration_s is None else 0.0)
    _, kinds, (reason,) = faults(57.64, end, duration_s, clip_s)
    advised = re.search(r"clamp_s=([\d.]+) or more", reason)
    assert kinds == ["beyond_duration"] and advised and float(advised[1]) > 0
    span, kinds, _ = faults(57.64, end, duration_s, clip_s, clamp_s=float(advised[1]))
    assert not kinds and span == (57.64, length)


def test_an_interval_that_lies_mostly_beyond_the_end_is_not_advised_to_be_cut():
    """As in Time-R1's training list: 14220 s in a clip of 158 s."""
    _, kinds, (reason,) = faults(120.0, 14220.0, 157.8, 157.8)
    assert kinds == ["beyond_duration"] and "correct it" in reason and "clamp_s" not in reason


@pytest.mark.parametrize(
    ("seconds", "tenths"), [(1e-3, 0.1), (0.1, 0.1), (0.3, 0.3), (0.30001, 0.4), (2.0, 2.0)]
)
def test_advised_seconds_are_rounded_up(seconds, tenths):
    assert round_up(seconds) == tenths
