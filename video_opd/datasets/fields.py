"""Single values of an annotation: numbers, texts, intervals; cleaning of queries, rounding of times."""

import math
import re
from contextlib import suppress
from typing import Any

from video_opd.datasets.source import describe
from video_opd.errors import DataError
from video_opd.types import Span

CLEANINGS = {
    "as_written": lambda query: query,
    "strip": str.strip,
    "parse_query": lambda query: re.sub(r"\s+", " ", query).strip().strip(".").strip(),
    "time_r1": lambda query: query.strip().lower().removesuffix("."),
}
"""Named after the codebases that do so: parse_query is the function of VideoMind and TimeLens."""


_NUMBER = re.compile(r"-?\d+(?:\.\d*)?", re.ASCII)
_CLOCK = re.compile(r"(?:(\d+):([0-5]\d)|(\d+)):([0-5]\d(?:\.\d*)?)", re.ASCII)  # H:MM or M, then :SS


def get(record: dict[str, Any], key: str, where: str) -> Any:
    """A value that must be there."""
    if key not in record:
        raise DataError(f"{where}: lacks {key!r}, is {describe(record)}: add it, or name another format")
    return record[key]


def wrong(expected: str, value: Any, where: str) -> DataError:
    """The error for a value that is not as expected."""
    return DataError(f"{where}: {expected}, found {str(value)[:60]!r}")


def text(value: Any, key: str, where: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(f"{key} must be text", value, where)
    if re.search("[\ud800-\udfff]", value):
        raise wrong(f"{key} must be text without half of a surrogate pair", value, where)
    return value


def identifier(value: Any, key: str, where: str) -> str:
    """A text, or a whole number as it is written."""
    return text(str(value) if type(value) is int else value, key, where)


def number(value: Any, key: str, where: str) -> float:
    """A JSON number. NaN and infinity pass: intervals are judged later."""
    with suppress(OverflowError):
        if type(value) in (int, float):
            return float(value)
    raise wrong(f"{key} must be a number", value, where)


def clock_seconds(value: Any, key: str, where: str) -> float:
    """Seconds from a text: a number, or a clock time M:SS or H:MM:SS, each with decimals or without."""
    written = text(value, key, where).strip()
    if _NUMBER.fullmatch(written):
        return float(written)
    if (match := _CLOCK.fullmatch(written)) is None:
        raise wrong(f"{key} must be seconds (62.5) or a clock time (1:02.5, 0:01:02.5)", value, where)
    hours, of_hour, minutes, rest = match.groups(default="0")
    return float(int(hours) * 3600 + int(of_hour) * 60 + int(minutes) * 60) + float(rest)


def positive(value: Any, key: str, where: str) -> float:
    """A finite number above 0."""
    if 0 < (result := number(value, key, where)) < math.inf:
        return result
    raise wrong(f"{key} must be a number above 0", value, where)


def duration(record: dict[str, Any], where: str, key: str = "duration") -> float | None:
    """Seconds; None if the annotations do not say."""
    return None if record.get(key) is None else positive(record[key], key, where)


def pair(value: Any, key: str, where: str) -> Span:
    """[start, end]."""
    if not isinstance(value, list) or len(value) != 2:
        raise wrong(f"{key} must be [start, end]", value, where)
    return number(value[0], key, where), number(value[1], key, where)


def one_pair(value: Any, key: str, where: str) -> tuple[Span, ...]:
    """[start, end] as a tuple of one interval."""
    return (pair(value, key, where),)


def pairs(value: Any, key: str, where: str) -> tuple[Span, ...]:
    """[start, end], or a list of such."""
    many = isinstance(value, list) and all(isinstance(item, list) for item in value)
    return tuple(pair(item, key, where) for item in (value if many else [value]))


def seconds(span: Span, fps: float, unit_s: float) -> Span:
    """A span whose times count `fps` a second. Rounds to multiples of `unit_s`, halves to even; 0: not."""

    def convert(count: float) -> float:
        time = count / fps
        return round(round(time / unit_s) * unit_s, 9) if unit_s and math.isfinite(time) else time

    return convert(span[0]), convert(span[1])
