"""The manifest: annotations of any format as one Parquet file (schemas.MANIFEST)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from video_opd.datasets import fields
from video_opd.datasets.annotation import Annotation
from video_opd.errors import DataError
from video_opd.schemas import MANIFEST, write_parquet

_MAGIC = b"PAR1"  # of every Parquet file
_SAME = ("prompt_id", "video", "query", "fps")  # columns that are fields of Annotation
_REMEDY = "write it with `convert`"


def is_parquet(path: str | Path) -> bool:
    """Whether the file is Parquet. False for one that cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def manifest_row(annotation: Annotation, source: str) -> dict:
    """A row of schemas.MANIFEST. `source`: annotation file and place in it."""
    start, end = annotation.cut_s or (None, None)
    spans = None if annotation.spans_s is None else [list(span) for span in annotation.spans_s]
    times = {"spans_s": spans, "duration_s": annotation.duration_s, "clip_start_s": start, "clip_end_s": end}
    return {**{column: getattr(annotation, column) for column in _SAME}, **times, "source": source}


def write_manifest(rows: Sequence[dict], path: Path, about: Mapping[str, str]) -> None:
    """`about`: how the rows were made, kept as the file's metadata. The file appears whole or not at all."""
    table = pa.Table.from_pylist(list(rows), schema=MANIFEST)
    metadata = {f"video_opd.{key}": value for key, value in about.items()}
    write_parquet(table.replace_schema_metadata(metadata), path)


def read_manifest(path: str) -> Iterator[Annotation]:
    """Raises DataError if it is not Parquet, lacks a column, or has wrong types, nulls or repeated ids."""
    table = read_columns(path, MANIFEST.names, "a manifest", f"{_REMEDY}, or name its format")
    try:
        table = table.cast(MANIFEST)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: a column is of another type ({_line(error)}): {_REMEDY}") from error
    if empty := [name for name in ("prompt_id", "video", "query") if table[name].null_count]:
        raise DataError(f"{path}: empty values in {', '.join(empty)}: {_REMEDY}")
    seen: set[str] = set()
    for number, row in enumerate(table.to_pylist(), 1):
        where = f"{path}: row {number}"
        if row["prompt_id"] in seen:
            raise DataError(f"{where}: prompt_id {row['prompt_id']} appears twice: rename or remove one")
        seen.add(row["prompt_id"])
        start, end, spans = row["clip_start_s"], row["clip_end_s"], row["spans_s"]
        if (start is None) != (end is None):
            raise DataError(f"{where}: clip_start_s and clip_end_s are {start} and {end}: give both or none")
        if any(span is None or len(span) != 2 or None in span for span in spans or ()):
            raise DataError(f"{where}: spans_s must be pairs [start, end], found {spans}: correct them")
        yield Annotation(
            where=where,
            spans_s=None if spans is None else tuple(tuple(span) for span in spans),
            cut_s=None if start is None else (start, end),
            duration_s=fields.duration(row, where, "duration_s"),
            **{column: row[column] for column in _SAME},
        )


def read_columns(path: str, names: Sequence[str], kind: str, remedy: str) -> pa.Table:
    """Columns of a Parquet file. Raises DataError if it cannot be read, is not Parquet, or lacks one."""
    try:
        table = pq.read_table(path)
    except OSError as error:
        why = error.strerror or _line(error)
        raise DataError(f"{path} cannot be read ({why}): check the path") from error
    except pa.ArrowException as error:
        raise DataError(f"{path} is not {kind} ({_line(error)}): {remedy}") from error
    if missing := [name for name in names if name not in table.column_names]:
        raise DataError(f"{path}: lacks the columns {', '.join(missing)}: {remedy}")
    return table.select(list(names))


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
