"""Text, lines and JSON of an annotation file, each error with the place it comes from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import DataError

Record = tuple[str, int, dict[str, Any]]
"""(where, for errors; its number from 1: the line, or the place in a JSON list; the object itself)."""


@dataclass(frozen=True)
class Source:
    """An annotation file, its byte order mark gone and its line ends those of Unix."""

    path: str
    text: str

    def lines(self) -> Iterator[tuple[int, str]]:
        """(line number from 1, line) of every line that is not blank. Only line ends separate lines: a query may hold U+2028."""
        for number, line in enumerate(self.text.split("\n"), 1):
            if line.strip():
                yield number, line

    def json(self) -> Any:
        """The whole file as one JSON value. Raises DataError."""
        return _parse(self.text, self.path)

    def videos(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(video, its object) of a JSON object with an object for each video. Raises DataError."""
        tree = self.json()
        if not isinstance(tree, dict) or not all(isinstance(value, dict) for value in tree.values()):
            raise DataError(
                f"{self.path}: expected one JSON object with an object for each video: use format auto"
            )
        yield from tree.items()

    def records(self) -> Iterator[Record]:
        """The objects of a JSON list, or of lines with one JSON object each. Raises DataError when it gets to what is neither."""
        if self.text.lstrip().startswith("["):
            items = [
                (f"{self.path}: item {number}", number, item) for number, item in enumerate(self.json(), 1)
            ]
        else:
            items = (
                (f"{self.path}:{n}", n, _parse(line, self.path, line_number=n)) for n, line in self.lines()
            )
        for where, number, item in items:
            if not isinstance(item, dict):
                raise DataError(
                    f"{where}: expected a JSON object with an annotation, found {str(item)[:60]!r}"
                )
            yield where, number, item


def read_source(path: str | Path) -> Source:
    """Raises DataError for a file that cannot be read or is not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    return Source(str(path), text.replace("\r\n", "\n").replace("\r", "\n"))


def _parse(text: str, path: str, line_number: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{path}:{line_number + error.lineno - 1}"
        raise DataError(
            f"{place}: not JSON ({error.msg} at column {error.colno}): correct the file, or name its format"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}:{line_number}: cannot be read as JSON ({error}): correct the file"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that stands there twice would lose its first value."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return tree
