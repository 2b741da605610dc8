"""Named protocols: how a codebase reads an interval out of an answer, and when that interval counts.

docs/evaluation.md has their differences in one table. Every pattern starts at the start of a run of digits
and never backtracks into one, so an answer is read in time linear in its length.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from video_opd.answers import parse_span
from video_opd.errors import ConfigError
from video_opd.grounding import reaches, temporal_iou
from video_opd.types import Span

_DECIMAL = r"(\d++\.?+\d*+)"  # 12, 12., 12.5
_DOTTED = r"(\d++\.*+\d*+)"  # 12, 12.5, and 12..5 too
_WITH_DASH = re.compile(rf"(?<!\d){_DECIMAL}\s*+-\s*+{_DECIMAL}")
_WITH_TO = re.compile(rf"(?<!\d){_DECIMAL}\s++to\s++{_DECIMAL}")
_WITH_ONE_SPACE = re.compile(rf"(?<!\d){_DECIMAL} (?:to|and) {_DECIMAL}")
_DOTTED_WITH_DASH = re.compile(rf"(?<!\d){_DOTTED}\s*+-\s*+{_DOTTED}")
_TWO_DIGITS = re.compile(r"(\d{2}) (?:to|and) (\d{2})")
_LOOSE = re.compile(r"\b(?:\d++\.\d++|\d++)\b")  # a number with no letter at its end
_CLOCK = re.compile(r"\b(?:(\d{1,2}):(\d{2})|(\d{1,2})):(\d{2}(?:\.\d+)?)\b")  # HH:MM:SS or MM:SS
_LMMS_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"
_LMMS_SENTENCE_END = re.compile(r"[!?\n]")
_LMMS_KEYWORDS = ("start", "end", "happen")


def hull_iou(a: Span, b: Span) -> float:
    """The other codebases' IoU: intersection over the hull of both intervals; 0 if either is empty."""
    hull = max(a[1], b[1]) - min(a[0], b[0])
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0.0) / hull if hull > 0 else 0.0


def _pair(numbers: Sequence[str]) -> Span | None:
    """The first two numbers."""
    return (float(numbers[0]), float(numbers[1])) if len(numbers) >= 2 else None


def _first(pattern: re.Pattern[str], text: str) -> Span | None:
    match = pattern.search(text)
    return _pair(match.groups()) if match else None


def _clock_seconds(match: re.Match[str]) -> float:
    hours, minutes = match[1] or 0, match[2] or match[3]
    return int(hours) * 3600 + int(minutes) * 60 + float(match[4])


def read_timelens(text: str) -> Span | None:
    """The first two clock times; else the first pair with '-', else with 'to'; else the first two numbers."""
    text = text.lower()
    times = [_clock_seconds(match) for match in islice(_CLOCK.finditer(text), 2)]
    if len(times) == 2:
        return times[0], times[1]
    return _first(_WITH_DASH, text) or _first(_WITH_TO, text) or _pair(_LOOSE.findall(text))


def read_time_r1(text: str) -> Span | None:
    """The last pair joined by ' to ' or ' and ', lower case and one space each, inside <answer> or not."""
    pairs = _WITH_ONE_SPACE.findall(text)
    return _pair(pairs[-1]) if pairs else None


def read_vtimellm(text: str) -> Span | None:
    """The first two-digit pair joined by ' to ' or ' and ': hundredths of the video."""
    pair = _first(_TWO_DIGITS, text)
    return (pair[0] / 100, pair[1] / 100) if pair else None


def read_lmms_eval(text: str) -> Span | None:
    """The first pair with '-' or 'to', even a 'to' inside a word. Without a pair: the first numbers of the
    first two sentences (lines, or up to '!' or '?') with a word for a start, an end or a happening.

    None where the codebase's own script stops with an error: a number with several points. Its branch for
    HH:MM:SS can give no interval and is left out.
    """
    text = text.lower().replace(_LMMS_EXAMPLE, "").replace("to", "-")
    pairs = _DOTTED_WITH_DASH.findall(text)
    if pairs:
        return None if any(".." in number for pair in pairs for number in pair) else _pair(pairs[0])
    sentences = [s for s in _LMMS_SENTENCE_END.split(text) if any(word in s for word in _LMMS_KEYWORDS)]
    return _pair([match[0] for match in map(_LOOSE.search, sentences) if match])


class Reading(NamedTuple):
    """What a protocol reads in an answer."""

    span: Span  # what is scored: seconds, or shares of the clip's duration for a protocol with `shares`
    is_reversed: bool  # as it was written


@dataclass(frozen=True, slots=True)
class Protocol:
    """One codebase's rules. None of them clamps an interval to the clip."""

    name: str
    source: str  # repository and files
    read: Callable[[str], Span | None]  # the pair that counts, as written
    shares: bool = False  # `read` gives shares of the clip's duration, not seconds
    swaps: bool = False  # a reversed pair is put in order
    whole_seconds: bool = False  # both ends are rounded, halves to even
    iou: Callable[[Span, Span], float] = hull_iou
    iou_decimals: int | None = None  # to which each IoU is rounded
    # (float64[N] IoUs, threshold) -> bool[N]; ge compares to the last bit
    reaches: Callable[[np.ndarray, float], np.ndarray] = operator.ge

    def parse(self, text: str) -> Reading | None:
        """None: the answer holds no pair that counts."""
        pair = self.read(text)
        if pair is None:
            return None
        (start, end), is_reversed = pair, pair[1] < pair[0]
        if self.whole_seconds and math.isfinite(start) and math.isfinite(end):
            start, end = float(round(start)), float(round(end))
        return Reading((end, start) if self.swaps and is_reversed else (start, end), is_reversed)

    def seconds(self, span: Span, duration_s: float) -> Span:
        """A reading's span in seconds."""
        return (span[0] * duration_s, span[1] * duration_s) if self.shares else span

    def score(self, span: Span, answer_spans_s: Sequence[Span], duration_s: float) -> float:
        """IoU of a reading's span with the nearest true span."""
        scale = duration_s if self.shares else 1.0
        ious = [self.iou(span, (start / scale, end / scale)) for start, end in answer_spans_s]
        if self.iou_decimals is not None:
            ious = [round(iou, self.iou_decimals) for iou in ious]
        return max(ious, default=0.0)

    def score_seconds(self, span_s: Span, answer_spans_s: Sequence[Span], duration_s: float) -> float:
        """IoU of a baseline's interval, which was not read from an answer."""
        span = (span_s[0] / duration_s, span_s[1] / duration_s) if self.shares else span_s
        return self.score(span, answer_spans_s, duration_s)


_STRICT = "this project: video_opd/answers.py, video_opd/grounding.py"
_TIMELENS = "timelens/utils.py, evaluation/eval_dataloader.py, evaluation/compute_metrics.py"
_TIME_R1 = "xiaomi-research/time-r1: evaluate.py, src/vllm_inference/eval_all.py"
_VTIMELLM = "huangb23/VTimeLLM: vtimellm/eval/eval.py, vtimellm/eval/metric.py"
_LMMS_EVAL = "EvolvingLMMs-Lab/lmms-eval: lmms_eval/tasks/charades_sta/eval_tvg.py"
_ALL = (
    Protocol("strict", _STRICT, parse_span, iou=temporal_iou, reaches=reaches),
    Protocol("timelens", f"TencentARC/TimeLens: {_TIMELENS}", read_timelens, whole_seconds=True),
    Protocol("time_r1", _TIME_R1, read_time_r1, reaches=operator.gt),
    Protocol("vtimellm", _VTIMELLM, read_vtimellm, shares=True, iou_decimals=2),
    Protocol("lmms_eval", _LMMS_EVAL, read_lmms_eval, swaps=True),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def protocol_named(name: str) -> Protocol:
    """Raises ConfigError."""
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r} is not known: use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
