"""Text, lines and JSON of an annotation file, each error with the place it comes from."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import DataError

Record = tuple[str, int | str, dict[str, Any]]
"""(where, for errors; number from 1 of the line, or of the item in a JSON list; the object)."""


@dataclass(frozen=True)
class Source:
    """An annotation file without byte order mark, with Unix line ends."""

    path: str
    text: str

    def lines(self) -> Iterator[tuple[int, str]]:
        """(number from 1, line) of lines that are not blank. Not str.splitlines: a query may hold U+2028."""
        yield from ((n, line) for n, line in enumerate(self.text.split("\n"), 1) if line.strip())

    def json(self) -> Any:
        """The whole file as one JSON value. Raises DataError."""
        return _parse(self.text, self.path)

    def videos(self) -> dict[str, dict[str, Any]]:
        """A JSON object with an object for each video. Raises DataError."""
        tree = self.json()
        if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
            raise DataError(f"{self.path}: not a JSON object with an object for each video: use format auto")
        return tree

    def records(self) -> Iterator[Record]:
        """The objects of a JSON list, or of lines with one object each. Raises DataError at anything else."""
        if self.text.lstrip().startswith("["):
            items = ((f"{self.path}: item {n}", n, item) for n, item in enumerate(self.json(), 1))
        else:
            items = ((f"{self.path}:{n}", n, _parse(line, self.path, n)) for n, line in self.lines())
        for where, number, item in items:
            if not isinstance(item, dict):
                raise DataError(f"{where}: expected a JSON object of an annotation, found {str(item)[:60]!r}")
            yield where, number, item


def read_source(path: str | Path) -> Source:
    """Raises DataError for a file that cannot be read or is not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start}"
        raise DataError(f"{path} is not UTF-8 text ({why}): save it as UTF-8") from error
    return Source(str(path), text.replace("\r\n", "\n").replace("\r", "\n"))


def _parse(text: str, path: str, line_number: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line, why = line_number + error.lineno - 1, f"{error.msg} at column {error.colno}"
        raise DataError(f"{path}:{line}: not JSON ({why}): correct it, or name the file's format") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{line_number}: cannot be read as JSON ({error}): correct it") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a repeated key, which would lose its first value."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} appears twice")
    return tree
