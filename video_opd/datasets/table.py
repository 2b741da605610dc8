"""A user's own table (format csv): a header with video, start, end and query, one interval a row."""

import csv
import io
from collections.abc import Iterator
from contextlib import suppress

from video_opd.config_data import DatasetConfig
from video_opd.datasets import fields
from video_opd.datasets.source import Record, Source, read_source
from video_opd.errors import DataError
from video_opd.types import Span

COLUMNS = ("video", "start", "end", "query")
SEPARATORS = ",;\t"


def header(source: Source) -> tuple[str, list[str]]:
    """(separator, names of columns in lower case), by the one separator that gives all of COLUMNS.

    ("", []) if there is none.
    """
    first = source.text.lstrip("\n").partition("\n")[0]
    with suppress(csv.Error):  # a line that is too long for a table
        for separator in SEPARATORS:
            names = [name.strip().lower() for name in next(csv.reader([first], delimiter=separator), [])]
            if all(names.count(column) == 1 for column in COLUMNS):
                return separator, names
    return "", []


def rows(dataset: DatasetConfig) -> Iterator[Record]:
    """One record per video and query, in the order of their first rows, with all their intervals.

    A row's number is that of a spreadsheet, whose first row is the header. Raises DataError.
    """
    source = read_source(dataset.annotations)
    separator, names = header(source)
    if source.text.strip() and not separator:
        found = f"found {source.text.lstrip()[:60]!r}"
        needs = f"the first row must name the columns {', '.join(COLUMNS)} once each, separated by , ; or tab"
        raise DataError(f"{source.path}: {needs}, {found}: correct it, or name another format")
    spans: dict[tuple[str, str], dict[Span, None]] = {}  # by video and query: a set in the order of rows
    numbers: dict[tuple[str, str], list[int]] = {}
    for number, row in _cells(source, separator):
        where = f"{source.path}: row {number}"
        if len(row) != len(names):
            advice = "put a text that holds the separator in quotes"
            raise DataError(f"{where}: {len(row)} cells, the first row has {len(names)}: {advice}")
        video, start, end, query = (row[names.index(column)].strip() for column in COLUMNS)
        if not video:
            raise DataError(f"{where}: the video is empty: write its file's name or remove the row")
        span = fields.clock_seconds(start, "start", where), fields.clock_seconds(end, "end", where)
        spans.setdefault((video, query), {})[span] = None
        numbers.setdefault((video, query), []).append(number)
    for (video, query), of_prompt in spans.items():
        first, *others = numbers[video, query]
        where = f"{source.path}: row {first}" + "".join(f" and {number}" for number in others)
        record = {"video": video, "query": query, "spans": [list(span) for span in of_prompt]}
        yield where, first, record


def _cells(source: Source, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of the rows below the header that are not empty."""
    text = source.text.lstrip("\n")
    skipped = len(source.text) - len(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator or ",", strict=True)
    number = skipped
    try:
        for row in reader:
            number += 1
            if number > skipped + 1 and any(cell.strip() for cell in row):
                yield number, row
    except csv.Error as error:
        raise DataError(
            f"{source.path}: row {number + 1}: {error}: close the quotes, or double them"
        ) from error
