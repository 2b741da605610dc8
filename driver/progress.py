"""A checkpoint is one folder that appears whole or not at all: learner, student folder, curriculum, progress."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from learner.safe_load import find_code
from video_opd.config import LearnerConfig
from video_opd.errors import CheckpointError
from video_opd.files.checkpoint import MANIFEST, check_whole, damaged
from video_opd.schemas import PREDICTIONS, span_columns, write_parquet
from video_opd.types import Prediction

_STATE, _RECORDS, _PREDICTIONS = "state.json", "curriculum.parquet", "predictions.parquet"
_CURRICULUM_KEYS = {"queue", "in_flight", "round_end", "settings", "random_state"}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: all of its state but the learner's."""

    step: int  # the next to do
    shapes: dict[str, Any]  # of the student's architecture
    learner: dict[str, Any]  # see learner_settings
    curriculum: dict[str, Any]  # the scheduler's state_dict
    totals: dict[str, float]  # what the summary counts
    eval_key: str = ""  # of the held-out split
    evaluations: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # teacher, student_before, step_N, ...
    examples: dict[str, list[Prediction]] = field(default_factory=dict)  # the answers, by the same names
    failed_eval: dict[str, str] = field(default_factory=dict)  # prompt id: why


def learner_settings(config: LearnerConfig) -> dict[str, Any]:
    """What the learner's files depend on. All but world_size must be the same when they are read."""
    return {
        "world_size": config.world_size,
        "zero_files": {0: "0", 1: "1 or 2", 2: "1 or 2", 3: "3"}[
            config.zero_stage
        ],  # stages 1 and 2 write the same
        "dtype": config.dtype,
        "freeze_vision": config.freeze_vision,
        "lora_rank": config.lora_rank,
        "lora_targets": config.lora_targets if config.lora_rank else None,
    }


def write_progress(folder: Path, progress: Progress) -> None:
    """Into a folder of begin_checkpoint."""
    state = {k: v for k, v in vars(progress).items() if k != "examples"}
    state["curriculum"] = {k: v for k, v in progress.curriculum.items() if k != "records"}
    write_parquet(progress.curriculum["records"], folder / _RECORDS)
    rows = [
        {"evaluation": name, "prompt_id": p.prompt_id, "text": p.text, **span_columns(p.span_s)}
        for name, predictions in progress.examples.items()
        for p in predictions
    ]
    write_parquet(pa.Table.from_pylist(rows, schema=PREDICTIONS), folder / _PREDICTIONS)
    (folder / _STATE).write_text(json.dumps(state))


def read_progress(
    folder: Path, shapes: Mapping[str, Any], learner: Mapping[str, Any], eval_key: str
) -> Progress:
    """Where the checkpoint's run stood.

    Raises PartialCheckpointError, or CheckpointError when it is damaged, written by a newer version, of another model, learner
    or held-out split than the arguments say, or with a file that would run code.
    """
    step = check_whole(folder)
    if code := find_code(folder):
        raise CheckpointError(f"checkpoint {folder} is not one to load: {code}: choose another with --step")
    try:
        state = json.loads((folder / _STATE).read_text())
        if missing := _CURRICULUM_KEYS - state["curriculum"].keys():
            raise KeyError(*sorted(missing))
        state["curriculum"]["records"] = pq.read_table(folder / _RECORDS)
        examples: dict[str, list[Prediction]] = {name: [] for name in state["evaluations"]}
        for row in pq.read_table(folder / _PREDICTIONS).to_pylist():
            span = None if row["start_s"] is None else (row["start_s"], row["end_s"])
            examples[row["evaluation"]].append(
                Prediction(prompt_id=row["prompt_id"], text=row["text"], span_s=span)
            )
        progress = Progress(**state, examples=examples)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"its state cannot be read ({error!r})") from error
    if progress.step != step:
        raise damaged(folder, f"its state is of step {progress.step}, its {MANIFEST} of step {step}")
    _check_same(folder, "model than the student", "the student", progress.shapes, shapes)
    fixed = {k: v for k, v in learner.items() if k != "world_size"}
    _check_same(folder, "config than the learner's", "the learner section", progress.learner, fixed)
    if progress.eval_key != eval_key:
        raise CheckpointError(
            f"checkpoint {folder} has evaluations on another held-out split than data.eval: resume with the data.eval the run was "
            "started with"
        )
    return progress


def _check_same(
    folder: Path, other: str, what: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    different = [f"{k} {saved.get(k)} / {v}" for k, v in wanted.items() if saved.get(k) != v]
    if different:
        raise CheckpointError(
            f"checkpoint {folder} is of another {other} (checkpoint / now: {'; '.join(different)}): resume with {what} that "
            "the run was started with"
        )
