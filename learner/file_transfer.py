"""Copies folders between processes without shared storage, in parts that fit into memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PART_BYTES = 64 << 20


class FilePart(NamedTuple):
    """A piece of a file."""

    path: str  # relative to the folder
    offset: int
    data: bytes


def read_parts(folder: Path) -> Iterator[FilePart]:
    """All files below the folder, empty ones included."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, offset = str(path.relative_to(folder)), 0
        with path.open("rb") as file:
            while (data := file.read(PART_BYTES)) or not offset:
                yield FilePart(name, offset, data)
                offset += max(1, len(data))


def write_part(folder: Path, part: FilePart) -> None:
    """Writes one part; those of a file must come in order."""
    path = folder / part.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if part.offset else "wb") as file:
        file.seek(part.offset)
        file.write(part.data)
