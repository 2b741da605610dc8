"""A checkpoint is one folder that appears whole or not at all: learner, student folder, curriculum, progress."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from video_opd.errors import CheckpointError
from video_opd.run_folder import CHECKPOINT_STATE
from video_opd.schemas import write_parquet

_RECORDS = "curriculum.parquet"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step}"


@contextmanager
def new_checkpoint(run_dir: Path, step: int):
    """A temporary folder to write into; renamed to `step-N` when the block ends without an error."""
    folder = checkpoint_folder(run_dir, step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)


def write_state(
    folder: Path, step: int, shapes: Mapping[str, Any], curriculum: Mapping[str, Any], totals: Mapping[str, float]
) -> None:
    """`shapes`: of the student's architecture; `curriculum`: the scheduler's state_dict; `totals`: what the summary counts."""
    write_parquet(curriculum["records"], folder / _RECORDS)
    rest = {k: v for k, v in curriculum.items() if k != "records"}
    state = {"step": step, "shapes": dict(shapes), "curriculum": rest, "totals": dict(totals)}
    (folder / CHECKPOINT_STATE).write_text(json.dumps(state))


def read_state(folder: Path, shapes: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict[str, float]]:
    """(step, the scheduler's state, totals). Raises CheckpointError if the checkpoint is of another model than `shapes` say."""
    try:
        state = json.loads((folder / CHECKPOINT_STATE).read_text())
        step, saved, curriculum, totals = (state[k] for k in ("step", "shapes", "curriculum", "totals"))
        if missing := {"queue", "in_flight", "round_end", "settings", "random_state"} - curriculum.keys():
            raise KeyError(*sorted(missing))
        records = pq.read_table(folder / _RECORDS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read ({error!r}): remove it and resume again") from error
    different = [f"{k} {saved.get(k)} / {v}" for k, v in shapes.items() if saved.get(k) != v]
    if different:
        raise CheckpointError(
            f"checkpoint {folder} is of another model than the student (checkpoint / student: {'; '.join(different)}): "
            "resume with the student the run was started with"
        )
    return step, curriculum | {"records": records}, totals
