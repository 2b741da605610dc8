"""Folders that survive a power cut, and are replaced with no moment in which there is none."""

import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def fsync_tree(folder: Path) -> None:
    """Flushes `folder` and all below. Other nodes flushed what they wrote to shared storage on close."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))


def fsync_path(path: Path) -> None:
    """Flushes a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, target: Path) -> None:
    """Renames the folder `new`, already flushed, to `target` beside it, and removes the folder of that name.

    A reader sees the old folder or the new one, whole. If the file system cannot exchange folders (NFS), the
    old one is `.NAME.old` between two renames; finish_interrupted_writes() restores it after a crash.
    """
    old = new
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(new, target)
    fsync_path(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders in one step. False: not possible here. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):  # not Linux, or an old C library
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def remove_folder(folder: Path) -> None:
    """Of its own name there is the whole folder, or none: a crash leaves a `.NAME.tmp`."""
    leftover = folder.with_name(f".{folder.name}.tmp")
    folder.rename(leftover)
    shutil.rmtree(leftover)


def finish_interrupted_writes(folder: Path) -> None:
    """Cleans up after a crash: undoes interrupted replacements in `folder`, removes leftovers `.*.tmp`."""
    for old in folder.glob(".*.old"):
        target = folder / old.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)
