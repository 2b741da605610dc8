"""Annotations of any format -> the manifest, and a list of what was left out."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from video_opd.config_data import DatasetConfig
from video_opd.datasets.check import Checked, check
from video_opd.datasets.formats import resolve
from video_opd.datasets.manifest import manifest_row, write_manifest
from video_opd.errors import DataError

LEFT_OUT = ("source", "prompt_id", "kind", "reason")  # columns of the list
MADE_BY = ("format", "cleaning", "round_s", "annotators", "cuts", "clamp_s")  # options kept in the manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written, and what was not."""

    num_prompts: int
    left_out: Counter[str]  # annotations by the kind of their first fault
    list_path: Path


def convert(dataset: DatasetConfig, output: Path, tolerance_s: float) -> Conversion:
    """Writes `output` (Parquet) and NAME.left_out.csv beside it: the annotations with faults, and the faults.

    Each file appears whole or not at all. Raises DataError, also if no annotation is left.
    """
    if output.resolve() == Path(dataset.annotations).resolve():
        raise DataError(f"{output} is the annotation file itself: name another output")
    dataset = resolve(dataset)
    checked = list(check(dataset, tolerance_s))
    rows = [manifest_row(c.annotation, _source(c, dataset)) for c in checked if not c.faults]
    left_out = [c for c in checked if c.faults]
    if not rows:
        why = ""
        if left_out:
            first = f"{left_out[0].annotation.where}: {left_out[0].faults[0].reason}"
            why = f": {len(left_out)} are left out, first {first}"
        raise DataError(f"{dataset.annotations} has no annotations to convert{why}")
    list_path = output.with_name(f"{output.stem}.left_out.csv")
    lines = [(_source(c, dataset), c.annotation.prompt_id, *f) for c in left_out for f in c.faults]
    made_by = dataset.model_dump(include=set(MADE_BY), exclude_none=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_list(lines, list_path)
        write_manifest(rows, output, {key: str(value) for key, value in made_by.items()})
    except OSError as error:
        raise DataError(f"{output} cannot be written ({error.strerror}): name another output") from error
    counts = Counter(c.faults[0].kind for c in left_out)
    return Conversion(num_prompts=len(rows), left_out=counts, list_path=list_path)


def _source(checked: Checked, dataset: DatasetConfig) -> str:
    """FILE:LINE or the like, without the folder: a manifest holds no path of a machine."""
    return Path(dataset.annotations).name + checked.annotation.where.removeprefix(dataset.annotations)


def _write_list(rows: list[tuple[str, ...]], path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([LEFT_OUT, *rows])
    temporary.rename(path)
