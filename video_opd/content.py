"""Digests and stamps of files and model folders, and checks of names that become paths."""

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO

from video_opd.hub import commit_of, model_name

_BLOCK_BYTES = 64 << 10
_WINDOWS_PATH = re.compile(r"[A-Za-z]:|.*\\", re.DOTALL)  # a drive, or a backslash


def is_of_windows(name: str) -> bool:
    """Whether a system could read the name as a path with a drive or with backslashes."""
    return _WINDOWS_PATH.match(name) is not None


def is_inside(name: str) -> bool:
    """Whether a relative path, parts separated by /, stays below the folder that it is joined to."""
    return "\0" not in name and not is_of_windows(name) and not {"", ".", ".."} & set(name.split("/"))


def file_digest(path: str | Path, num_blocks: int = 64) -> str:
    """Digest of the size and of `num_blocks` evenly spaced blocks of 64 KiB; small files are read whole."""
    with open(path, "rb") as file:
        return head_digest(file, os.fstat(file.fileno()).st_size, num_blocks)


def head_digest(file: BinaryIO, size: int, num_blocks: int = 64) -> str:
    """What file_digest would be if the file ended after `size` bytes."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    if size <= _BLOCK_BYTES * num_blocks:
        file.seek(0)
        digest.update(file.read(size))
    else:
        for i in range(num_blocks):
            file.seek(i * (size - _BLOCK_BYTES) // (num_blocks - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def file_stamp(path: str | Path) -> str:
    """Size and modification time, which change when a file is replaced; of a folder, those of its files."""
    if not os.path.isdir(path):
        status = os.stat(path)
        return f"{status.st_size}:{status.st_mtime_ns}"
    files = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(path))
    return hashlib.blake2b(repr(files).encode(), digest_size=16).hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Digest of the names and digests of all files in a model folder, or of its commit on the hub."""
    if commit := commit_of(folder):  # its cache may have more or fewer of the files
        return f"{model_name(folder)}@{commit}"
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file()):
        digest.update(f"{path.name}:{file_digest(path)};".encode())
    return digest.hexdigest()
