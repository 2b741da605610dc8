"""Answers that are sets of intervals, as TimeLens2 reads them and VUE-TR scores them."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from video_opd.grounding import duration_s, merge, shared_s
from video_opd.types import Span

_NUMBER = r"(-\d++(?:\.\d++)?+|(?<!\d)\d++(?:\.\d++)?+)"
_IN_BRACKETS = re.compile(rf"\[\s*+{_NUMBER}\s*+,\s*+{_NUMBER}\s*+\]")
_JOINED = re.compile(rf"{_NUMBER}\s*+(?:-|to)\s*+{_NUMBER}")
_ANY = re.compile(_NUMBER)
CUTS = np.linspace(0.0, 1.0, 101)  # the thresholds of VUE-TR


def read_timelens2(text: str) -> tuple[Span, ...]:
    """All [a, b]; without one all pairs with '-' or 'to'; without one all numbers in pairs."""
    pairs = _IN_BRACKETS.findall(text) or _JOINED.findall(text.lower())
    if not pairs:
        numbers = _ANY.findall(text)
        pairs = list(zip(numbers[::2], numbers[1::2], strict=False))
    return tuple((float(start), float(end)) for start, end in pairs)


def outward(span: Span) -> Span:
    """Whole seconds: the start down, the end up."""
    if not (math.isfinite(span[0]) and math.isfinite(span[1])):
        return span
    return float(math.floor(span[0])), float(math.ceil(span[1]))


def vue_iou(spans: Sequence[Span], truth: Sequence[Span]) -> float:
    """IoU of a set, merged, with true spans that count one by one: an overlap of theirs counts twice."""
    predicted = merge(spans)
    shared = sum(shared_s(predicted, [true]) for true in truth)
    union = duration_s(predicted) + duration_s(truth) - shared
    return float(min(max(shared / (union + 1e-16), 0.0), 1.0)) if predicted else 0.0


def _area(reached: np.ndarray) -> float:
    """Under a curve over CUTS: what one prompt adds to an area under the mean of all prompts."""
    return float(np.trapezoid(reached.astype(float), CUTS))


def success_area(spans: Sequence[Span], truth: Sequence[Span]) -> float:
    """The share of thresholds that the IoU exceeds."""
    return _area(vue_iou(spans, truth) > CUTS)


def precision_area(spans: Sequence[Span], truth: Sequence[Span]) -> float:
    """The share of thresholds that shared / predicted seconds reach; NaN for no predicted time."""
    return _share_area(spans, truth, of=spans)


def recall_area(spans: Sequence[Span], truth: Sequence[Span]) -> float:
    """The share of thresholds that shared / true seconds reach; NaN for no true time."""
    return _share_area(spans, truth, of=truth)


def _share_area(spans: Sequence[Span], truth: Sequence[Span], of: Sequence[Span]) -> float:
    """Intervals are put in order each, but neither sorted nor merged. An infinite one is none."""
    total = duration_s(_ordered(of))
    shared = shared_s(list(_ordered(truth)), list(_ordered(spans)))
    return _area(shared / total >= CUTS) if total else math.nan


def _ordered(spans: Sequence[Span]) -> Iterator[Span]:
    return ((min(span), max(span)) for span in spans if math.isfinite(span[0] + span[1]))


AREAS: Mapping = {"iou_auc": success_area, "precision_auc": precision_area, "recall_auc": recall_area}
