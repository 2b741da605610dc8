"""One annotation, whatever file it comes from, and what can be wrong with its query and intervals."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from video_opd.types import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """A query about a video. Times are in seconds from the start of the cut, or of the file where there is none."""

    where: str  # FILE:LINE or the like, for errors
    prompt_id: str  # VIDEO_ID:NUMBER, the number that of the line or the query: unique in its file
    video: str  # id or path, as the file names it
    query: str
    spans_s: tuple[Span, ...] | None  # any floats; None: unlabelled
    duration_s: float | None = None  # of the cut or the file, as the annotations say; None: they do not
    cut_s: Span | None = None  # the part of the file that is the clip; None: all of it
    fps: float | None = None  # of the file, where times were frames


class Fault(NamedTuple):
    """Something wrong with an annotation."""

    kind: str  # one of the kinds in docs/data.md
    reason: str  # one line: what, and what to do


def fit(
    annotation: Annotation, clip_s: float, frame_s: float, clamp_s: float
) -> tuple[tuple[Span, ...] | None, list[Fault]]:
    """The spans, cut at the clip's end where they pass it by at most `clamp_s`, and what is wrong with them or the query.

    The clip ends where the annotations say, or after its file's `clip_s` seconds if that is more than a frame earlier; for
    annotations that do not say, after its file's seconds, and a span may pass that by a frame.
    """
    length = clip_s if annotation.duration_s is None else min(annotation.duration_s, clip_s + frame_s)
    allowed = clamp_s + frame_s if annotation.duration_s is None else clamp_s
    faults = (
        [] if annotation.query else [Fault("empty_query", "the query is empty: write one or remove the line")]
    )
    if annotation.spans_s is None:
        return None, faults
    if not annotation.spans_s:
        faults.append(Fault("no_span", "there is no interval: write one or remove the line"))
    spans: list[Span] = []
    for start, end in annotation.spans_s:
        spans.append((start, length if start < length < end <= length + allowed else end))
        fault = _span_fault(*spans[-1], length)
        faults += [fault] if fault else []
    return tuple(spans), faults


def _span_fault(start: float, end: float, length: float) -> Fault | None:
    kind = None
    if not (math.isfinite(start) and math.isfinite(end)):
        kind = "not_a_number"
    elif end <= start:
        kind = "zero_length" if end == start else "reversed"
    elif start < 0:
        kind = "before_start"
    if kind:
        return Fault(kind, f"{start} to {end} is not an interval in seconds: correct it or remove the line")
    if start >= length:
        return Fault(
            "beyond_duration",
            f"the annotation starts at {start} s, its clip ends at {length} s: correct it or remove it",
        )
    if end > length:
        allowance = math.ceil(round((end - length) * 10, 6)) / 10
        over = f"allow data.*.clamp_s={allowance} or more"
        return Fault(
            "beyond_duration",
            f"the annotation ends at {end} s, its clip at {length} s: correct it, or {over}",
        )
    return None
