"""What makes a checkpoint whole: a manifest, written last, of every file with its size and a digest."""

import json
import os
from pathlib import Path
from typing import Any

from video_opd.content import file_digest, is_inside
from video_opd.errors import CheckpointError, PartialCheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
"""Of checkpoints; raised with every change that an older version cannot read."""
_END = b"}\n"


def write_manifest(folder: Path, step: int) -> None:
    """Of all files below `folder`. Digests cover small files whole and blocks of large ones: seconds for any size."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "digest": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1) + "\n"
    with (folder / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def parse_manifest(content: bytes, folder: object) -> dict[str, Any]:
    """`folder` names it in errors. Raises PartialCheckpointError where it is cut off, CheckpointError if it cannot be used."""
    if not content.endswith(_END):
        raise PartialCheckpointError(f"checkpoint {folder} is partial: its {MANIFEST} is cut off")
    try:
        manifest = json.loads(content)
        if manifest["format"] > FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} was written by a newer version: format {manifest['format']}, this one reads up to {FORMAT}: "
                "update video-opd"
            )
        sizes = {name: (int(of["bytes"]), str(of["digest"])) for name, of in manifest["files"].items()}
        if outside := next((name for name in sizes if not is_inside(name)), None):
            raise damaged(folder, f"its {MANIFEST} names {outside!r}, which is not inside it")
        return {"step": int(manifest["step"]), "files": sizes}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(folder, f"its {MANIFEST} cannot be read ({error!r})") from error


def check_whole(folder: Path, digests: bool = True) -> int:
    """The step of the checkpoint, all of whose files are as they were written; without `digests` only their sizes are looked at.

    Raises PartialCheckpointError when the manifest or a part of a file is missing, CheckpointError when it is damaged, or
    written by a newer version.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise PartialCheckpointError(f"checkpoint {folder} is partial: it has no {MANIFEST}") from None
    except OSError as error:
        raise damaged(folder, f"its {MANIFEST} cannot be read ({error.strerror})") from error
    manifest = parse_manifest(content, folder)
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        try:
            there = path.stat().st_size
            if there < size:
                raise PartialCheckpointError(f"checkpoint {folder} is partial: {name} has {there} of {size} bytes")
            if there > size or (digests and file_digest(path) != digest):
                raise damaged(folder, f"{name} is not the file that was written")
        except FileNotFoundError:
            raise PartialCheckpointError(f"checkpoint {folder} is partial: {name} is missing") from None
        except OSError as error:
            raise damaged(folder, f"{name} cannot be read ({error.strerror})") from error
    return manifest["step"]


def damaged(folder: object, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is damaged: {why}: choose another with --step")
