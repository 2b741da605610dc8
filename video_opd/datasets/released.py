"""The data set that the authors of Video-OPD released: Parquet, a row for each prompt with its texts.

Layout: scripts/upload_opd_to_huggingface.py of SeerRay-Lab/REVISOR, which wrote it. `user_query` is the whole
text of the user's message, `assistant_response` that of the answer.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from video_opd.answers import parse_span
from video_opd.config_data import STYLES, DatasetConfig
from video_opd.datasets import fields
from video_opd.datasets.manifest import read_columns
from video_opd.datasets.source import Record
from video_opd.errors import DataError
from video_opd.types import Span

VIDEO, QUERY, ANSWER = COLUMNS = ("video", "user_query", "assistant_response")
NEAR = 15  # characters of a prompt on each side of its query, by which it is known


def is_released(path: str | Path) -> bool:
    """Whether the file is Parquet with these columns. False for one that cannot be read."""
    try:
        return {*COLUMNS} <= {*pq.read_schema(path).names}
    except (OSError, pa.ArrowException):
        return False


def rows(dataset: DatasetConfig) -> Iterator[Record]:
    """The rows in file order, `user_query` cut down to the query. Raises DataError."""
    path = dataset.annotations
    patterns = [dataset.query_pattern] if dataset.query_pattern else _published()
    table = read_columns(path, COLUMNS, "Parquet", "name another format")
    for number, row in enumerate(table.to_pylist(), 1):
        where = f"{path}: row {number}"
        text = fields.text(row[QUERY], QUERY, where)
        found = next((match for p in patterns if (match := re.search(p, text, re.DOTALL))), None)
        if found is None:
            known = f"{QUERY} must hold one of the prompts {', '.join(STYLES)} or match query_pattern"
            raise DataError(f"{where}: {known}, found {text[:120]!r}: set data.*.query_pattern")
        yield where, number, row | {QUERY: found[1] or ""}


def _published() -> list[str]:
    """A pattern for each of the published prompts, its group the query."""
    sides = [style["template"].split("{query}") for style in STYLES.values()]
    return [f"{re.escape(before[-NEAR:])}(.*?){re.escape(after[:NEAR])}" for before, after in sides]


def interval(value: str | None, key: str, where: str) -> tuple[Span, ...]:
    """The interval that an answer names, as a tuple; an empty one, a fault of the annotation, without any."""
    span = parse_span(fields.text(value or "", key, where))
    return (span,) if span else ()
