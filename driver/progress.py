"""Where a run stands, and how its checkpoints say so."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curriculum.scheduler import check_state
from learner.safe_load import find_code
from preflight.inputs import Plan
from video_opd.config import Config, LearnerConfig
from video_opd.errors import CheckpointError
from video_opd.files.checkpoint import MANIFEST, WholeCheckpoint, damaged, find_checkpoint
from video_opd.schemas import PREDICTIONS, span_columns, write_parquet
from video_opd.types import Prediction, Prompt

_STATE, _RECORDS, _PREDICTIONS = "state.json", "curriculum.parquet", "predictions.parquet"
_CURRICULUM_KEYS = {"queue", "in_flight", "round_end", "settings", "random_state"}


@dataclass(kw_only=True)
class Progress:
    """What a run has done so far; a checkpoint saves it as it is."""

    step: int = 0  # the next to do
    totals: Counter[str] = field(default_factory=Counter)  # what the summary counts
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # by name: teacher, step_N, ...
    examples: dict[str, list[Prediction]] = field(default_factory=dict)  # the answers, by the same names
    failed_eval: dict[str, str] = field(default_factory=dict)  # prompt id: why; each counts as IoU 0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run must share with the checkpoint that it resumes from."""

    shapes: dict[str, Any]  # of the student's architecture
    learner: dict[str, Any]  # see learner_settings
    eval_key: str  # of the held-out split


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A checkpoint that was verified and read: all but the learner's files."""

    folder: Path
    progress: Progress
    curriculum: dict[str, Any]  # the scheduler's state_dict
    world_size: int  # of the learner that wrote it


def setup_of(config: Config, plan: Plan) -> Setup:
    learner = learner_settings(config.learner)
    return Setup(shapes=plan.student.shapes, learner=learner, eval_key=eval_key(plan.eval))


def eval_key(prompts: Sequence[Prompt]) -> str:
    """The same for held-out splits on which results can be compared."""
    content = repr([(p.prompt_id, p.answer_spans_s) for p in prompts])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def learner_settings(config: LearnerConfig) -> dict[str, Any]:
    """What the learner's files depend on. All but world_size must be the same when they are read."""
    zero_files = {0: "0", 1: "1 or 2", 2: "1 or 2", 3: "3"}  # stages 1 and 2 write the same
    return {
        "world_size": config.world_size,
        "zero_files": zero_files[config.zero_stage],
        "dtype": config.dtype,
        "freeze_vision": config.freeze_vision,
        "lora_rank": config.lora_rank,
        "lora_targets": config.lora_targets if config.lora_rank else None,
    }


def write_progress(folder: Path, progress: Progress, curriculum: Mapping[str, Any], setup: Setup) -> None:
    """Writes into a folder of begin_checkpoint. curriculum: the scheduler's state_dict."""
    state = vars(setup) | {k: v for k, v in vars(progress).items() if k != "examples"}
    state["curriculum"] = {k: v for k, v in curriculum.items() if k != "records"}
    write_parquet(curriculum["records"], folder / _RECORDS)
    rows = [
        {"evaluation": name, "prompt_id": p.prompt_id, "text": p.text, **span_columns(p.span_s)}
        for name, predictions in progress.examples.items()
        for p in predictions
    ]
    write_parquet(pa.Table.from_pylist(rows, schema=PREDICTIONS), folder / _PREDICTIONS)
    (folder / _STATE).write_text(json.dumps(state))


def find_saved_run(run_dir: Path, config: Config, plan: Plan, step: int | None = None) -> SavedRun:
    """The newest whole checkpoint, or that of `step`, verified once.

    Raises CheckpointError if `config` cannot resume from it.
    """
    saved = read_progress(find_checkpoint(run_dir, step), setup_of(config, plan))
    check_state(saved.curriculum, [p.prompt_id for p in plan.train], config)
    return saved


def read_progress(checkpoint: WholeCheckpoint, setup: Setup) -> SavedRun:
    """Reads what write_progress wrote.

    Raises CheckpointError if it is unreadable, differs from `setup`, or has a file that would run code.
    """
    folder = checkpoint.folder
    if code := find_code(folder):
        raise CheckpointError(f"checkpoint {folder} is not safe to load: {code}: choose another with --step")
    try:
        state = json.loads((folder / _STATE).read_text())
        curriculum = state["curriculum"]
        if missing := _CURRICULUM_KEYS - curriculum.keys():
            raise KeyError(*sorted(missing))
        curriculum["records"] = pq.read_table(folder / _RECORDS)
        written = Setup(**{name: state[name] for name in vars(setup)})
        world_size = written.learner["world_size"]
        progress = Progress(
            **{name: state[name] for name in ("step", "evaluations", "failed_eval")},
            totals=Counter(state["totals"]),
            examples=_read_predictions(folder / _PREDICTIONS, state["evaluations"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"its state cannot be read ({error!r})") from error
    if progress.step != checkpoint.step:
        raise damaged(folder, f"its state is of step {progress.step}, its {MANIFEST} of {checkpoint.step}")
    _check_same(folder, "model", "the student", written.shapes, setup.shapes)
    fixed = {k: v for k, v in setup.learner.items() if k != "world_size"}
    _check_same(folder, "learner config", "the learner section", written.learner, fixed)
    if written.eval_key != setup.eval_key:
        raise CheckpointError(
            f"checkpoint {folder} has evaluations on another held-out split: "
            "resume with the data.eval that the run was started with"
        )
    return SavedRun(folder=folder, progress=progress, curriculum=curriculum, world_size=world_size)


def _read_predictions(path: Path, evaluations: Mapping[str, Any]) -> dict[str, list[Prediction]]:
    examples: dict[str, list[Prediction]] = {name: [] for name in evaluations}
    for row in pq.read_table(path).to_pylist():
        span = None if row["start_s"] is None else (row["start_s"], row["end_s"])
        prediction = Prediction(prompt_id=row["prompt_id"], text=row["text"], span_s=span)
        examples[row["evaluation"]].append(prediction)
    return examples


def _check_same(folder: Path, kind: str, what: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [f"{k} {saved.get(k)} / {v}" for k, v in wanted.items() if saved.get(k) != v]
    if different:
        raise CheckpointError(
            f"checkpoint {folder} is of another {kind} (checkpoint / now: {'; '.join(different)}): "
            f"resume with {what} that the run was started with"
        )
