"""The files of a run beside its checkpoints, copied to a URL so that each upload sends only what is new.

Object stores cannot append: a file there is a list of parts, each named by its digest and never changed.
`files.json` lists them and is written after them.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from video_opd.content import head_digest, is_inside
from video_opd.errors import CheckpointError

LIST, PARTS = "files.json", "parts"
PART_BYTES = 64 << 20
Listed = dict[str, dict[str, Any]]  # by name: bytes, digest (see head_digest), parts (digests, in order)


def send_new(remote: Any, run_dir: Path, files: Iterable[Path]) -> None:
    """Sends the bytes of `files` that are not at `remote`, then the list; removes parts that it leaves out.

    A file may grow meanwhile, or be gone. One whose first bytes changed, or that lacks a part there, is sent
    whole.
    """
    there, listed = _parts_at(remote), Listed()  # an upload that was given up may end later and remove some
    known = {n: of for n, of in read_list(remote, "the copy").items() if there.issuperset(of["parts"])}
    remote.makedirs(PARTS, exist_ok=True)
    for path in files:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        with file:
            name = str(path.relative_to(run_dir))
            listed[name] = _send(remote, file, known.get(name))
    remote.pipe_file(f"{LIST}.part", json.dumps(listed).encode())
    remote.mv(f"{LIST}.part", LIST)
    for part in _parts_at(remote) - _parts(listed):
        remote.rm_file(f"{PARTS}/{part}")


def _send(remote: Any, file: BinaryIO, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """The file's entry in the list, once its new bytes are at `remote`."""
    size, sent, parts = os.fstat(file.fileno()).st_size, 0, []
    if known and known["bytes"] <= size and head_digest(file, known["bytes"]) == known["digest"]:
        sent, parts = known["bytes"], [*known["parts"]]
    file.seek(sent)
    while content := file.read(min(PART_BYTES, size - sent)):
        parts.append(_digest(content))
        remote.pipe_file(f"{PARTS}/{parts[-1]}", content)
        sent += len(content)
    return {"bytes": sent, "digest": head_digest(file, sent), "parts": parts}


def read_list(remote: Any, url: str) -> Listed:
    """What the list at `remote` says; empty without one. Raises CheckpointError if it cannot be used."""
    try:
        listed: Listed = json.loads(remote.cat_file(LIST))
        for name, entry in listed.items():
            parts = all(re.fullmatch("[0-9a-f]{32}", part) for part in entry["parts"])
            if not (parts and is_inside(name) and {"bytes", "digest"} <= entry.keys()):
                raise ValueError(f"{name!r} is no file of a run")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "remove that file there; without it a copy has no metrics and trajectories"
        raise CheckpointError(f"{url} is damaged: its {LIST} cannot be used ({error!r}): {advice}") from error
    return listed


def put_together(remote: Any, url: str, listed: Listed, only: Collection[str], folder: Path) -> None:
    """Writes the files of the list whose first folder is in `only` into `folder`. Raises CheckpointError."""
    names = sorted(name for name in listed if name.partition("/")[0] in only)
    own, parts = folder / f".{PARTS}", sorted(_parts({name: listed[name] for name in names}))
    own.mkdir(parents=True)
    remote.get([f"{PARTS}/{part}" for part in parts], [str(own / part) for part in parts])
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            for part in listed[name]["parts"]:
                content = (own / part).read_bytes()
                if _digest(content) != part:
                    raise CheckpointError(f"{url} is damaged: {PARTS}/{part} of {name} is not what was sent")
                file.write(content)
    shutil.rmtree(own)


def _parts_at(remote: Any) -> set[str]:
    remote.invalidate_cache()
    return {p.rpartition("/")[2] for p in (remote.ls(PARTS, detail=False) if remote.exists(PARTS) else ())}


def _parts(listed: Listed) -> set[str]:
    return {part for entry in listed.values() for part in entry["parts"]}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
