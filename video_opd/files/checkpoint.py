"""What makes a checkpoint whole: a manifest, written last, of every file with its size and a digest."""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from video_opd.content import file_digest, is_inside
from video_opd.errors import CheckpointError, PartialCheckpointError
from video_opd.files.durable import finish_interrupted_writes, fsync_path, fsync_tree, replace_folder

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
        if outside := [name for name in sizes if not is_inside(name)]:
            raise damaged(folder, f"its {MANIFEST} names {outside[0]!r}, which is not inside it")
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
                raise PartialCheckpointError(
                    f"checkpoint {folder} is partial: {name} has {there} of {size} bytes"
                )
            if there > size or (digests and file_digest(path) != digest):
                raise damaged(folder, f"{name} is not the file that was written")
        except FileNotFoundError:
            raise PartialCheckpointError(f"checkpoint {folder} is partial: {name} is missing") from None
        except OSError as error:
            raise damaged(folder, f"{name} cannot be read ({error.strerror})") from error
    return manifest["step"]


def damaged(folder: object, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is damaged: {why}: choose another with --step")


CHECKPOINTS = "checkpoints"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Of all checkpoints that a run has, whole or not, in order."""
    names = [f.name.removeprefix("step-") for f in (run_dir / CHECKPOINTS).glob("step-*") if f.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The whole checkpoint of `step`, or the newest.

    Where the newest is provably partial it is the whole one before it, which is said in a printed line; never where it is
    damaged. Raises CheckpointError.
    """
    steps = checkpoint_steps(run_dir)
    if step is not None:
        if step not in steps:
            there = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(f"{run_dir} has no checkpoint of step {step}: {there}")
        check_whole(checkpoint_folder(run_dir, step))
        return checkpoint_folder(run_dir, step)
    partial: PartialCheckpointError | None = None
    for candidate in reversed(steps):
        folder = checkpoint_folder(run_dir, candidate)
        try:
            check_whole(folder)
        except PartialCheckpointError as error:
            partial = partial or error
            continue
        if partial:
            print(f"{partial}: going on with the whole one before it, {folder}")
        return folder
    because = f" ({partial})" if partial else ""
    raise CheckpointError(
        f"{run_dir} has no whole checkpoint{because}: start a new run, with checkpoint_every set"
    )


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """An empty folder to write into, for finish_checkpoint. What earlier ones left behind unfinished is removed."""
    folder = checkpoint_folder(run_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    finish_interrupted_writes(folder.parent)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir()
    return temporary


def finish_checkpoint(temporary: Path, run_dir: Path, step: int) -> Path:
    """Makes what was written durable, then whole, then visible as `step-N`, in place of one of the same name."""
    folder = checkpoint_folder(run_dir, step)
    fsync_tree(temporary)
    write_manifest(temporary, step)
    fsync_path(temporary)
    replace_folder(temporary, folder)
    return folder


def retain(
    run_dir: Path,
    newest: int,
    keep_last: int,
    keep_best: int,
    miou: Mapping[int, float],
    spare: Collection[int] = (),
):
    """Removes checkpoints but the last and the best ones (the earlier of equals), `newest` and those to `spare`; and partial ones.

    miou: by step, of the steps that were evaluated.
    """
    steps = checkpoint_steps(run_dir)
    whole = [s for s in steps if not is_partial(checkpoint_folder(run_dir, s))]
    best = sorted((s for s in whole if s in miou), key=lambda s: (-miou[s], s))[:keep_best]
    for step in set(steps) - {newest, *whole[-keep_last:], *best, *spare}:
        folder = checkpoint_folder(run_dir, step)
        going = folder.with_name(
            f".{folder.name}.tmp"
        )  # a crash on the way leaves a leftover, and no partial checkpoint
        folder.rename(going)
        shutil.rmtree(going)


def is_partial(folder: Path) -> bool:
    try:
        check_whole(folder, digests=False)
    except PartialCheckpointError:
        return True
    except ValueError:  # damaged, or of a newer version: for people to look at
        return False
    return False
