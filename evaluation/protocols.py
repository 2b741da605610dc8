"""Named protocols: how a codebase reads intervals out of an answer, and when they count.

docs/evaluation.md has their differences in one table. Every pattern starts at the start of a run of digits
and never backtracks into one, so an answer is read in time linear in its length.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from evaluation.sets import AREAS, outward, read_timelens2, vue_iou
from video_opd.answers import parse_spans
from video_opd.errors import ConfigError
from video_opd.grounding import merged_iou, reaches, temporal_iou
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


def _whole(span: Span) -> Span:
    """Both ends rounded to whole seconds, halves to even."""
    if not (math.isfinite(span[0]) and math.isfinite(span[1])):
        return span
    return float(round(span[0])), float(round(span[1]))


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


def _one(read: Callable[[str], Span | None]) -> Callable[[str], tuple[Span, ...]]:
    return lambda text: () if (pair := read(text)) is None else (pair,)


def _parse(as_set: bool) -> Callable[[str], tuple[Span, ...]]:
    return partial(parse_spans, as_set=as_set)


class Reading(NamedTuple):
    """What a protocol reads in an answer."""

    spans: tuple[Span, ...]  # what is scored: seconds, or shares of the duration for a protocol with `shares`
    is_reversed: bool  # one of them, as it was written

    @property
    def span(self) -> Span:
        """The first; the only one, unless the protocol scores sets."""
        return self.spans[0]


@dataclass(frozen=True, slots=True)
class Protocol:
    """One codebase's rules. None of them clamps an interval to the clip."""

    name: str
    source: str  # repository and files
    read: Callable[[str], tuple[Span, ...]]  # the pairs that count, as written: one, unless answers are sets
    shares: bool = False  # `read` gives shares of the clip's duration, not seconds
    swaps: bool = False  # a reversed pair is put in order
    rounded: Callable[[Span], Span] | None = None  # to whole seconds
    iou: Callable[[Span, Span], float] = hull_iou
    set_iou: Callable[[Sequence[Span], Sequence[Span]], float] | None = (
        None  # of an answer with all true spans
    )
    iou_decimals: int | None = None  # to which each IoU is rounded
    # (float64[N] IoUs, threshold) -> bool[N]; ge compares to the last bit
    reaches: Callable[[np.ndarray, float], np.ndarray] = operator.ge
    # by name: (spans as scored, true spans) -> what a prompt adds to the mean, NaN: it does not count
    areas: Mapping[str, Callable[[Sequence[Span], Sequence[Span]], float]] = field(default_factory=dict)

    def parse(self, text: str) -> Reading | None:
        """None: the answer holds no pair that counts."""
        if not (pairs := self.read(text)):
            return None
        is_reversed = any(end < start for start, end in pairs)
        if self.swaps:
            pairs = tuple((min(pair), max(pair)) for pair in pairs)
        return Reading(tuple(map(self.rounded, pairs)) if self.rounded else pairs, is_reversed)

    def seconds(self, span: Span, duration_s: float) -> Span:
        """A reading's span in seconds."""
        return (span[0] * duration_s, span[1] * duration_s) if self.shares else span

    def score_set(self, spans: Sequence[Span], answer_spans_s: Sequence[Span], duration_s: float) -> float:
        """IoU of a reading's spans with the true ones."""
        if self.set_iou:
            return self.set_iou(spans, answer_spans_s)
        return self.score(spans[0], answer_spans_s, duration_s)

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
        return self.score_set([span], answer_spans_s, duration_s)


_STRICT = "this project: video_opd/answers.py, video_opd/grounding.py"
_TIMELENS = "timelens/utils.py, evaluation/eval_dataloader.py, evaluation/compute_metrics.py"
_TIME_R1 = "xiaomi-research/time-r1: evaluate.py, src/vllm_inference/eval_all.py"
_VTIMELLM = "huangb23/VTimeLLM: vtimellm/eval/eval.py, vtimellm/eval/metric.py"
_TIMELENS_STRICT = f"TencentARC/TimeLens: {_TIMELENS}, with > for >="
_VUE = "evaluation/vlmeval/dataset/vidi_vue_tr.py"
_TIMELENS2 = f"MCG-NJU/TimeLens2: {_VUE}, moment_seeker.py, ego4d_nlq_v2.py"
_VUE_TR = f"bytedance/vidi: VUE_TR/qa_eval.py; read as MCG-NJU/TimeLens2: {_VUE}"
_LMMS_EVAL = "EvolvingLMMs-Lab/lmms-eval: lmms_eval/tasks/charades_sta/eval_tvg.py"
_ALL = (
    Protocol("strict", _STRICT, _parse(as_set=False), iou=temporal_iou, reaches=reaches),
    Protocol("timelens", f"TencentARC/TimeLens: {_TIMELENS}", _one(read_timelens), rounded=_whole),
    Protocol("time_r1", _TIME_R1, _one(read_time_r1), reaches=operator.gt),
    Protocol("vtimellm", _VTIMELLM, _one(read_vtimellm), shares=True, iou_decimals=2),
    Protocol("lmms_eval", _LMMS_EVAL, _one(read_lmms_eval), swaps=True),
    Protocol("timelens_strict", _TIMELENS_STRICT, _one(read_timelens), rounded=_whole, reaches=operator.gt),
    Protocol("strict_sets", _STRICT, _parse(as_set=True), set_iou=merged_iou, reaches=reaches),
    Protocol("timelens2", _TIMELENS2, read_timelens2, rounded=outward, set_iou=vue_iou),
    Protocol("vue_tr", _VUE_TR, read_timelens2, rounded=outward, set_iou=vue_iou, areas=AREAS),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def protocol_named(name: str) -> Protocol:
    """Raises ConfigError."""
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r} is not known: use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
