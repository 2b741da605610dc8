"""Text, lines and JSON of an annotation file, each error with the place it comes from."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import DataError

Record = tuple[str, int | str, dict[str, Any]]
"""(where, for errors; number from 1 of the line, or of the item in a JSON list; the object)."""


PACKED = {  # first bytes of files that are not text
    b"\x1f\x8b": "gzip: unpack it",
    b"BZh": "bzip2: unpack it",
    b"\xfd7zXZ": "xz: unpack it",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it",
    b"PK\x03\x04": "zip: unpack it",
    b"PAR1": "Parquet: use format auto",
}
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks; Excel writes them
NUM_KEYS = 5  # of an object that an error names
_TEXT = re.compile(r"\S")


@dataclass(frozen=True)
class Source:
    """An annotation file without byte order mark, with Unix line ends."""

    path: str
    text: str

    def lines(self) -> Iterator[tuple[int, str]]:
        """(number from 1, line) of lines that are not blank. Not str.splitlines: a query may hold U+2028."""
        yield from ((n, line) for n, line in enumerate(self.text.split("\n"), 1) if line.strip())

    def values(self) -> Iterator[tuple[int, Any]]:
        """(line that it begins in, JSON value) of the file's values, each on lines of its own.

        Raises DataError where a value is not JSON.
        """
        decoder = json.JSONDecoder(object_pairs_hook=_object)
        line, end = 1, 0
        while match := _TEXT.search(self.text, end):
            start = match.start()
            skipped = self.text.count("\n", end, start)
            if end and not skipped:
                found = f"{self.text[start : start + 40]!r} follows a whole value in the same line"
                raise DataError(f"{self.path}:{line}: not JSON ({found}): correct it, or name another format")
            line += skipped
            try:
                value, end = decoder.raw_decode(self.text, start)
            except json.JSONDecodeError as error:
                why = f"{error.msg} at column {error.colno}"
                why += f"; the value begins in line {line}" if error.lineno != line else ""
                advice = "correct it, or name another format"
                raise DataError(f"{self.path}:{error.lineno}: not JSON ({why}): {advice}") from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.path}:{line}: cannot be read as JSON ({error}): correct it"
                ) from error
            yield line, value
            line += self.text.count("\n", start, end)

    def videos(self) -> dict[str, dict[str, Any]]:
        """A JSON object with an object for each video. Raises DataError."""
        values = [value for _, value in itertools.islice(self.values(), 2)]
        if len(values) != 1 or not is_by_video(values[0]):
            found = " and ".join(map(describe, values)) or "nothing"
            expected = "expected a JSON object with an object for each video"
            raise DataError(f"{self.path}: {expected}, found {found}: name another format")
        return values[0]

    def records(self) -> Iterator[Record]:
        """The objects of a JSON list, or of lines with one object each. Raises DataError at anything else."""
        values = self.values()
        first = next(values, None)
        if first is None:
            return
        more = list(itertools.islice(values, 1))
        if isinstance(first[1], list) and not more:
            items = ((f"{self.path}: item {n}", n, item) for n, item in enumerate(first[1], 1))
        else:
            items = ((f"{self.path}:{n}", n, value) for n, value in itertools.chain([first], more, values))
        for where, number, item in items:
            yield where, number, as_record(item, where)


def is_by_video(value: Any) -> bool:
    """Whether it is an object that holds nothing but objects."""
    return isinstance(value, dict) and all(isinstance(of_video, dict) for of_video in value.values())


def as_record(item: Any, where: str) -> dict[str, Any]:
    """Raises DataError if the item is not an object."""
    if isinstance(item, dict):
        return item
    raise DataError(f"{where}: expected a JSON object of an annotation, found {describe(item)}")


def describe(value: Any, depth: int = 2) -> str:
    """What a JSON value is, for errors: a few of its keys, down to `depth` objects and lists."""
    if not isinstance(value, dict | list):
        return json.dumps(value)[:40]
    kind = "an object" if isinstance(value, dict) else "a list"
    if not value or not depth:
        return kind if value else f"{kind} without content"
    if isinstance(value, list):
        return f"{kind} of {len(value)}, the first {describe(value[0], depth - isinstance(value[0], list))}"
    keys = [
        f"{key[:30]!r}" + (f" ({describe(of_key, depth - 1)})" if isinstance(of_key, dict | list) else "")
        for key, of_key in itertools.islice(value.items(), NUM_KEYS)
    ]
    more = f" and {len(value) - NUM_KEYS} more keys" if len(value) > NUM_KEYS else ""
    return f"{kind} with {', '.join(keys)}{more}"


def read_source(path: str | Path) -> Source:
    """Raises DataError for a file that cannot be read or is neither UTF-8 nor UTF-16 with its mark."""
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-16" if content.startswith(UTF16) else "utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise _not_text(path, content, f"{error.reason} at byte {error.start}") from error
    if "\0" in text or content.startswith(tuple(PACKED)):
        raise _not_text(path, content, f"a zero at byte {content.find(0)}")
    return Source(str(path), text.replace("\r\n", "\n").replace("\r", "\n"))


def _not_text(path: str | Path, content: bytes, why: str) -> DataError:
    kind = next((kind for start, kind in PACKED.items() if content.startswith(start)), None)
    return DataError(f"{path} is not UTF-8 text " + (f"but {kind}" if kind else f"({why}): save it as UTF-8"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a repeated key, which would lose its first value."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} appears twice")
    return tree
