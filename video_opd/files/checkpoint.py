"""Checkpoints as folders of a run: how one is written, verified, found again and removed.

A checkpoint is whole when every file is as its manifest says. The manifest is written last.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from video_opd.content import file_digest, is_inside
from video_opd.errors import CheckpointError, PartialCheckpointError
from video_opd.files.durable import (
    finish_interrupted_writes,
    fsync_path,
    fsync_tree,
    remove_folder,
    replace_folder,
)

T = TypeVar("T")
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
FORMAT = 1  # of checkpoints; raised with every change that an older version cannot read


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of all checkpoints of a run, whole or not, in order."""
    return steps_in(f.name for f in (run_dir / CHECKPOINTS).glob("step-*") if f.is_dir())


def steps_in(names: Iterable[str]) -> list[int]:
    """N of every name `step-N`, in order."""
    numbers = (name.removeprefix("step-") for name in names if name.startswith("step-"))
    return sorted(int(number) for number in numbers if number.isdigit())


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """An empty folder to write into, for finish_checkpoint. Removes what earlier attempts left unfinished."""
    folder = checkpoint_folder(run_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    finish_interrupted_writes(folder.parent)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir()
    return temporary


def finish_checkpoint(temporary: Path, run_dir: Path, step: int) -> Path:
    """Makes the folder durable, then whole, then visible as `step-N`; replaces an older one."""
    folder = checkpoint_folder(run_dir, step)
    fsync_tree(temporary)
    write_manifest(temporary, step)
    fsync_path(temporary / MANIFEST)
    fsync_path(temporary)
    replace_folder(temporary, folder)
    return folder


def write_manifest(folder: Path, step: int) -> None:
    """Lists all files below `folder`. Digests cover large files in blocks: seconds for any size."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "digest": file_digest(path)}
        for path in files_below(folder)
    }
    content = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
    (folder / MANIFEST).write_text(content + "\n")


def parse_manifest(content: bytes, folder: object) -> dict[str, tuple[int, str]]:
    """The size and digest of every file, by name. `folder` names the checkpoint in errors.

    Raises PartialCheckpointError where the manifest is cut off, CheckpointError where it cannot be used.
    """
    if not content.endswith(b"}\n"):
        raise PartialCheckpointError(f"checkpoint {folder} is partial: its {MANIFEST} is cut off")
    try:
        manifest = json.loads(content)
        if (found := manifest["format"]) > FORMAT:
            newer = f"written by a newer version: format {found}, this one reads up to {FORMAT}"
            raise CheckpointError(f"checkpoint {folder} was {newer}: update video-opd")
        files = {name: (int(of["bytes"]), str(of["digest"])) for name, of in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"its {MANIFEST} cannot be read ({error!r})") from error
    if outside := [name for name in files if not is_inside(name)]:
        raise damaged(folder, f"its {MANIFEST} names {outside[0]!r}, which is not inside it")
    return files


def damaged(folder: object, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is damaged: {why}: choose another with --step")


def check_whole(folder: Path, digests: bool = True) -> Path:
    """Compares every file with the manifest: its size and, if `digests`, its digest. Returns `folder`.

    Raises PartialCheckpointError if a part is missing, CheckpointError if damaged or of a newer version.
    """
    name = MANIFEST
    try:
        for name, (size, digest) in parse_manifest((folder / MANIFEST).read_bytes(), folder).items():
            if (found := (folder / name).stat().st_size) < size:
                short = f"{name} has {found} of {size} bytes"
                raise PartialCheckpointError(f"checkpoint {folder} is partial: {short}")
            if found > size or (digests and file_digest(folder / name) != digest):
                raise damaged(folder, f"{name} is not the file that was written")
    except FileNotFoundError:
        raise PartialCheckpointError(f"checkpoint {folder} is partial: {name} is missing") from None
    except OSError as error:
        raise damaged(folder, f"{name} cannot be read ({error.strerror})") from error
    return folder


def is_partial(run_dir: Path, step: int) -> bool:
    """By sizes alone. A damaged one, or one of a newer version, is not partial: people should see it."""
    try:
        check_whole(checkpoint_folder(run_dir, step), digests=False)
    except CheckpointError as error:
        return isinstance(error, PartialCheckpointError)
    return False


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The folder of `step`, or of the newest checkpoint; see choose_checkpoint. Raises CheckpointError."""
    steps = checkpoint_steps(run_dir)
    return choose_checkpoint(steps, step, run_dir, lambda s: check_whole(checkpoint_folder(run_dir, s)))


def choose_checkpoint(steps: Sequence[int], step: int | None, where: object, check: Callable[[int], T]) -> T:
    """What `check` returns for `step`; without one, for the newest of `steps` that is not partial.

    A partial checkpoint is passed over with a printed line, a damaged one never is. Raises CheckpointError.
    """
    if step is not None:
        if step not in steps:
            there = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(f"{where} has no checkpoint of step {step}: {there}")
        return check(step)
    partial = ""
    for candidate in reversed(steps):
        try:
            chosen = check(candidate)
        except PartialCheckpointError as error:
            partial = partial or str(error)
            continue
        if partial:
            print(f"{partial}: using the whole one before it, of step {candidate}")
        return chosen
    because = f" ({partial})" if partial else ""
    raise CheckpointError(f"{where} has no whole checkpoint{because}: start a new run with checkpoint_every")


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def retain(run_dir: Path, last: int, best: int, miou: Mapping[int, float], spare: Collection[int]) -> None:
    """Removes partial checkpoints, and all but the `last` newest, `best` by `miou` of steps, and `spare`."""
    steps = checkpoint_steps(run_dir)
    whole = [s for s in steps if not is_partial(run_dir, s)]
    best_steps = sorted((s for s in whole if s in miou), key=lambda s: (-miou[s], s))[:best]
    for step in set(steps) - {*whole[-last:], *best_steps, *spare}:
        remove_folder(checkpoint_folder(run_dir, step))
