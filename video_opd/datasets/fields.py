"""Single values of an annotation: numbers, texts, intervals; how queries are cleaned and times are rounded."""

import re
from typing import Any

from video_opd.errors import DataError
from video_opd.types import Span

CLEANINGS = {
    "as_written": lambda query: query,
    "strip": str.strip,
    "parse_query": lambda query: re.sub(r"\s+", " ", query).strip().strip(".").strip(),
    "time_r1": lambda query: query.strip().lower().removesuffix("."),
}
"""Named after the codebases that do so: parse_query is the function of VideoMind and TimeLens."""


def get(record: dict[str, Any], key: str, where: str) -> Any:
    """A value that must be there."""
    if key not in record:
        raise DataError(
            f"{where}: lacks {key!r}, has {', '.join(map(repr, record)) or 'nothing'}: add it, or use format auto"
        )
    return record[key]


def text(value: Any, key: str, where: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} must be text, found {str(value)[:60]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key} holds half of a surrogate pair at character {error.start}: correct it"
        ) from error
    return value


def number(value: Any, key: str, where: str) -> float:
    """A JSON number; NaN and infinity pass and are judged as intervals are."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        return float(value)
    except (TypeError, OverflowError):
        raise DataError(f"{where}: {key} must be a number, found {str(value)[:60]!r}") from None


def positive(value: Any, key: str, where: str) -> float:
    """A finite number above 0."""
    result = number(value, key, where)
    if not 0 < result < float("inf"):
        raise DataError(f"{where}: {key} must be a number above 0, found {result}: correct it")
    return result


def duration(record: dict[str, Any], where: str, key: str = "duration") -> float | None:
    """Seconds; None where the annotations do not say."""
    return None if record.get(key) is None else positive(record[key], key, where)


def pair(value: Any, key: str, where: str) -> Span:
    """[start, end]."""
    if not isinstance(value, list) or len(value) != 2:
        raise DataError(f"{where}: {key} must be [start, end], found {str(value)[:60]!r}")
    return number(value[0], key, where), number(value[1], key, where)


def pairs(value: Any, key: str, where: str) -> tuple[Span, ...]:
    """[start, end], or a list of such."""
    if isinstance(value, list) and all(isinstance(item, list) for item in value):
        return tuple(pair(item, key, where) for item in value)
    return (pair(value, key, where),)


def same_number(queries: Any, spans: Any, keys: tuple[str, str], where: str) -> list[tuple[Any, Any]]:
    """(query, span) of two lists, which must be equally long."""
    if not isinstance(queries, list) or not isinstance(spans, list) or len(queries) != len(spans):
        sizes = " and ".join(
            str(len(v)) if isinstance(v, list) else repr(str(v)[:40]) for v in (queries, spans)
        )
        raise DataError(
            f"{where}: {keys[0]} and {keys[1]} must be lists of one length, found {sizes}: correct them"
        )
    return list(zip(queries, spans, strict=True))


def rounded(span: Span, unit_s: float) -> Span:
    """To multiples of `unit_s`, halves to the even one; 0: as it is. What is not finite stays so."""
    start, end = (
        round(round(t / unit_s) * unit_s, 9) if unit_s and abs(t) < float("inf") else t for t in span
    )
    return start, end
