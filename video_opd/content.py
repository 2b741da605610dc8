"""Keys of content: what tells whether a file or a model is the same, without reading all of it; and names that may be paths."""

import hashlib
import os
import re
from pathlib import Path

_BLOCK_BYTES = 64 << 10


_OF_WINDOWS = re.compile(r"[A-Za-z]:|.*\\", re.DOTALL)  # a drive, or a backslash


def is_of_windows(name: str) -> bool:
    """Whether a path is, or somewhere else could be taken for, one with a drive or with backslashes."""
    return _OF_WINDOWS.match(name) is not None


def is_inside(name: str) -> bool:
    """Whether a relative path, parts separated by /, stays below the folder that it is put after."""
    return "\0" not in name and not is_of_windows(name) and not {"", ".", ".."} & set(name.split("/"))


def file_digest(path: str | Path, num_blocks: int = 64) -> str:
    """Of the size and of `num_blocks` blocks of 64 KiB, evenly spaced from the first to the last byte; smaller files whole."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= _BLOCK_BYTES * num_blocks:
            digest.update(file.read())
        else:
            for i in range(num_blocks):
                file.seek(i * (size - _BLOCK_BYTES) // (num_blocks - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def file_stamp(path: str | Path) -> str:
    """Of sizes and times of change: another one when the file was replaced. A folder's is that of the files in it."""
    path = Path(path)
    if not path.is_dir():
        status = path.stat()
        return f"{status.st_size}:{status.st_mtime_ns}"
    files = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(path))
    return hashlib.blake2b(repr(files).encode(), digest_size=16).hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Of the names and digests of all files in a model folder: weights, tokenizer, processor and templates."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file()):
        digest.update(f"{path.name}:{file_digest(path)};".encode())
    return digest.hexdigest()
