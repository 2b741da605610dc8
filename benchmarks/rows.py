"""Results of many runs: kept in a file, grouped by kind, shown with their spread over seeds."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; empty if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_row(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each `kind`, kinds in the order of their first row."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["kind"]].append(row)
    return dict(groups)


def spread(values: Sequence[float]) -> str:
    """mean (lowest to highest)"""
    digits = 3 if max(values) <= 1 else 2 if max(values) < 10 else 0
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
