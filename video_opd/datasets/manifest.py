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
_FILLED = ("prompt_id", "video", "query")  # columns without nulls


def is_manifest(path: str | Path) -> bool:
    """Whether the file is Parquet. False for one that cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def manifest_row(annotation: Annotation, source: str) -> dict:
    """A row of schemas.MANIFEST. `source`: annotation file and place in it."""
    start, end = annotation.cut_s or (None, None)
    return {
        "prompt_id": annotation.prompt_id,
        "video": annotation.video,
        "query": annotation.query,
        "spans_s": None if annotation.spans_s is None else [list(span) for span in annotation.spans_s],
        "duration_s": annotation.duration_s,
        "clip_start_s": start,
        "clip_end_s": end,
        "fps": annotation.fps,
        "source": source,
    }


def write_manifest(rows: Sequence[dict], path: Path, about: Mapping[str, str]) -> None:
    """`about`: how the rows were made, kept as the file's metadata. Appears whole or not at all."""
    table = pa.Table.from_pylist(list(rows), schema=MANIFEST)
    write_parquet(
        table.replace_schema_metadata({f"video_opd.{key}": value for key, value in about.items()}), path
    )


def read_manifest(path: str) -> Iterator[Annotation]:
    """Raises DataError for a file that is no Parquet, lacks a column, or has one of another type, with nulls or repeated ids."""
    try:
        table = pq.read_table(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or str(error).splitlines()[0]}): check the path"
        ) from error
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a manifest ({str(error).splitlines()[0]}): write one with `convert`"
        ) from error
    missing = [name for name in MANIFEST.names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: lacks the columns {', '.join(missing)}: write it with `convert`, or name its format"
        )
    try:
        table = table.select(MANIFEST.names).cast(MANIFEST)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{path}: a column is of another type ({str(error).splitlines()[0]}): write it with `convert`"
        ) from error
    empty = [name for name in _FILLED if table[name].null_count]
    if empty:
        raise DataError(f"{path}: empty values in {', '.join(empty)}: write it with `convert`")
    seen: set[str] = set()
    for number, row in enumerate(table.to_pylist(), 1):
        where = f"{path}: row {number}"
        if row["prompt_id"] in seen:
            raise DataError(f"{where}: prompt_id {row['prompt_id']} stands there twice: rename or remove one")
        seen.add(row["prompt_id"])
        yield _annotation(row, where)


def _annotation(row: dict, where: str) -> Annotation:
    bounds = row["clip_start_s"], row["clip_end_s"]
    if None in bounds and bounds != (None, None):
        raise DataError(
            f"{where}: clip_start_s and clip_end_s are {bounds[0]} and {bounds[1]}: give both or none"
        )
    spans = row["spans_s"]
    if spans is not None and not all(
        span is not None and len(span) == 2 and None not in span for span in spans
    ):
        raise DataError(f"{where}: spans_s must be pairs [start, end], found {spans}: correct them")
    return Annotation(
        where=where,
        prompt_id=row["prompt_id"],
        video=row["video"],
        query=row["query"],
        spans_s=None if spans is None else tuple((start, end) for start, end in spans),
        duration_s=fields.duration(row, where, "duration_s"),
        cut_s=None if bounds[0] is None else bounds,
        fps=row["fps"],
    )
