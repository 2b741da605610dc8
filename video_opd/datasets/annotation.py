"""One annotation, whatever file it comes from, and the faults of its query and intervals."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from video_opd.types import Span

DUST_S = 1e-3  # less than a frame, more than the noise of decimals and of float32 in a video of hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """A query about a video. Times are in seconds from the start of the cut or, without one, of the file."""

    where: str  # FILE:LINE or the like, for errors
    prompt_id: str  # VIDEO_ID:NUMBER, the number of the line or the query: unique in its file
    video: str  # id or path, as in the file
    query: str
    spans_s: tuple[Span, ...] | None  # any floats; None: unlabelled
    duration_s: float | None = None  # of the cut or the file, as annotated; None: not annotated
    cut_s: Span | None = None  # the part of the file that is the clip; None: all of it
    fps: float | None = None  # of the file, if times were frames


ODD = ("zero_length", "reversed", "before_start", "beyond_duration")
"""Kinds of intervals that published sets contain, and that an evaluation scores as they are."""


class Fault(NamedTuple):
    kind: str  # one of the kinds in docs/data.md
    reason: str  # one line: what, and what to do


def fit(
    annotation: Annotation, clip_s: float, frame_s: float, clamp_s: float
) -> tuple[tuple[Span, ...] | None, list[Fault]]:
    """The spans, cut at the clip's end if they pass it by at most `clamp_s`; the faults of spans and query.

    The clip ends at the annotated duration, or at its file's `clip_s` seconds if that is more than a frame
    earlier. Without an annotated duration it ends with the file, and a span may pass that end by a frame.
    Differences up to DUST_S do not count, as a start at -1e-9 or an end at 70.29 in a clip of 70.28999999 s.
    """
    length, allowed = clip_s, clamp_s + frame_s
    if annotation.duration_s is not None:
        length, allowed = min(annotation.duration_s, clip_s + frame_s), clamp_s
    faults: list[Fault] = []
    if not annotation.query:
        faults.append(Fault("empty_query", "the query is empty: write one or remove the line"))
    if annotation.spans_s is None:
        return None, faults
    if not annotation.spans_s:
        faults.append(Fault("no_span", "there is no interval: write one or remove the line"))
    spans = tuple(_cut_at_ends(start, end, length, allowed) for start, end in annotation.spans_s)
    return spans, faults + [fault for span in spans for fault in _span_faults(*span, length)]


def _cut_at_ends(start: float, end: float, length: float, allowed: float) -> Span:
    if start < length - DUST_S and length < end <= length + allowed + DUST_S:
        end = length
    return 0.0 if -DUST_S <= start < 0 else start, end


def _span_faults(start: float, end: float, length: float) -> Iterator[Fault]:
    """Yields at most one."""
    reason = f"{start} to {end} is not an interval in seconds: correct it or remove the line"
    if not (math.isfinite(start) and math.isfinite(end)):
        yield Fault("not_a_number", reason)
    elif end - start <= DUST_S:
        yield Fault("zero_length" if end - start >= -DUST_S else "reversed", reason)
    elif start < 0:
        yield Fault("before_start", reason)
    elif start >= length - DUST_S:
        reason = f"the annotation starts at {start} s, its clip ends at {length} s: correct or remove it"
        yield Fault("beyond_duration", reason)
    elif end > length:
        mostly_inside = end - length < length - start
        also = f", or allow data.*.clamp_s={round_up(end - length)} or more" if mostly_inside else ""
        reason = f"the annotation ends at {end} s, its clip at {length} s: correct it{also}"
        yield Fault("beyond_duration", reason)


def round_up(seconds: float) -> float:
    """To the next tenth of a second, for advice: as an allowance it admits what was given."""
    return math.ceil(round(seconds * 10, 6)) / 10
