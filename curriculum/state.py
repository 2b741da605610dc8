"""The state of a pool's prompts: as a table, in words, and as a checkpoint must have it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from video_opd.config import Config
from video_opd.errors import CheckpointError
from video_opd.schemas import RECORDS

NAMED_IN_ERRORS = 3


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that must stay the same when a run resumes."""
    names, room = ("kind", "asks_teacher", "asks_student"), config.schedule_room
    schedule = {"scc.schedule": f"{room.num_steps} steps of {room.full}"} if room else {}
    weights = {"weights": config.data.weights} if config.data.weights else {}
    return {name: getattr(config.curriculum, name) for name in names} | schedule | weights


def check_state(state: Mapping[str, Any], prompt_ids: Sequence[str], config: Config) -> None:
    """Raises CheckpointError if a Scheduler's state_dict is of another pool or kind of curriculum."""
    if state["settings"] != settings_of(config):
        differ = f"the checkpoint's curriculum is {state['settings']}, the config's {settings_of(config)}"
        raise CheckpointError(f"{differ}: resume with the curriculum the run was started with")
    saved = state["records"]["prompt_id"].to_pylist()
    if saved != list(prompt_ids):
        other = sorted(set(saved) ^ set(prompt_ids))
        named = f"{len(other)} are in one of them only ({', '.join(other[:NAMED_IN_ERRORS])})"
        differ = f"the checkpoint's curriculum has {len(saved)} prompts, the data {len(prompt_ids)}"
        named = named if other else "their order differs"
        raise CheckpointError(f"{differ}; {named}: resume with the data the run was started with")


def records_table(
    prompt_ids: Iterable[str],
    teacher_iou: np.ndarray,
    student_iou: np.ndarray,
    disagreement: np.ndarray,
    **others: np.ndarray,
) -> pa.Table:
    """The state of P prompts; see schemas.RECORDS. NaN is null.

    teacher_iou and disagreement: float64[P]. student_iou: float64[P, rounds]. others: the other columns.
    """
    size, rounds = student_iou.shape
    offsets = pa.array(np.arange(size + 1) * rounds, pa.int32())
    columns = {
        "prompt_id": pa.array(list(prompt_ids)),
        "teacher_iou": _nullable(teacher_iou),
        "student_iou": pa.ListArray.from_arrays(offsets, _nullable(student_iou.ravel())),
        "disagreement": _nullable(disagreement),
    }
    columns |= {name: pa.array(values.copy()) for name, values in others.items()}  # Arrow shares memory
    return pa.table(columns, schema=RECORDS)


def student_ious_in(records: pa.Table) -> np.ndarray:
    """float64[P, rounds]: NaN where the student was not asked."""
    ious = records["student_iou"].combine_chunks().values.to_numpy(zero_copy_only=False)
    return ious.reshape(len(records), -1)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float64(), from_pandas=True)  # NaN: null


def describe_dropped(dropped: np.ndarray, prompt_ids: Sequence[str], num_rounds: int) -> str:
    """The number of dropped prompts for each of the most frequent reasons, with the first of them.

    dropped: object[P], of each prompt why it was dropped, or empty.
    """
    of_reason = defaultdict(list)
    for i in np.flatnonzero(dropped != ""):
        of_reason[dropped[i]].append(prompt_ids[i])
    parts = []
    reasons = sorted(of_reason, key=lambda reason: -len(of_reason[reason]))
    for reason in reasons[:NAMED_IN_ERRORS]:
        names = of_reason[reason]
        more = ", ..." if len(names) > NAMED_IN_ERRORS else ""
        parts.append(f"{len(names)} dropped, {reason} ({', '.join(names[:NAMED_IN_ERRORS])}{more})")
    if rest := reasons[NAMED_IN_ERRORS:]:
        number, file = sum(len(of_reason[r]) for r in rest), f"round-{num_rounds}.parquet"
        parts.append(f"{number} dropped for {len(rest)} other reasons (all are in curriculum/{file})")
    return "; ".join(parts) or "none was dropped"
