"""Where a run stands, and how its checkpoints say so."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from curriculum.state import check_state
from learner.safe_load import find_code
from preflight.inputs import Plan
from video_opd.config import Config
from video_opd.config_learner import LearnerConfig
from video_opd.content import folder_digest
from video_opd.errors import CheckpointError
from video_opd.files.checkpoint import damaged, find_checkpoint
from video_opd.schemas import PREDICTIONS, answers_in, answers_table, write_parquet
from video_opd.types import Prediction

_STATE, _RECORDS, _PREDICTIONS = "state.json", "curriculum.parquet", "predictions.parquet"
_CURRICULUM_KEYS = {"queue", "in_flight", "round_end", "settings", "random_state"}
_ZERO_FILES = {0: "0", 1: "1 or 2", 2: "1 or 2", 3: "3"}  # stages 1 and 2 write the same


@dataclass(kw_only=True)
class Progress:
    """What a run has done so far; a checkpoint saves it as it is."""

    step: int = 0  # the next to do
    baseline: float | None = None  # running mean of the rewards of past steps; None: of none
    totals: Counter[str] = field(default_factory=Counter)  # what the summary counts
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # by name: teacher, step_N, ...
    examples: dict[str, list[Prediction]] = field(default_factory=dict)  # answers, by the same names, of some
    failed_eval: dict[str, str] = field(default_factory=dict)  # prompt id: why; each counts as IoU 0


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A checkpoint that was verified and read: all but the learner's files."""

    folder: Path
    progress: Progress
    curriculum: dict[str, Any]  # the scheduler's state_dict
    world_size: int  # of the learner that wrote it


def setup_of(config: Config, plan: Plan) -> dict[str, Any]:
    """What a run must share with the checkpoint that it resumes from, as state.json has it."""
    return {
        "shapes": plan.student.shapes,
        "learner": learner_settings(config.learner),
        "student": folder_digest(config.student) if config.learner.lora_rank else None,  # adapters' base
        "eval_key": plan.eval.key,  # the same for held-out splits on which results can be compared
    }


def learner_settings(config: LearnerConfig) -> dict[str, Any]:
    """What the learner's files depend on. All but world_size must be the same when they are read."""
    same = {name: getattr(config, name) for name in ("world_size", "dtype", "freeze_vision", "lora_rank")}
    targets = config.lora_targets if config.lora_rank else None
    return same | {"zero_files": _ZERO_FILES[config.zero_stage], "lora_targets": targets}


def write_progress(
    folder: Path, progress: Progress, curriculum: Mapping[str, Any], setup: dict[str, Any]
) -> None:
    """Writes into a folder of begin_checkpoint. curriculum: the scheduler's state_dict."""
    state = setup | {k: v for k, v in vars(progress).items() if k != "examples"}
    state["curriculum"] = {k: v for k, v in curriculum.items() if k != "records"}
    write_parquet(curriculum["records"], folder / _RECORDS)
    write_parquet(answers_table(progress.examples, PREDICTIONS), folder / _PREDICTIONS)
    (folder / _STATE).write_text(json.dumps(state))


def find_saved_run(run_dir: Path, config: Config, plan: Plan, step: int | None = None) -> SavedRun:
    """The newest whole checkpoint, or that of `step`. Raises CheckpointError if `config` cannot resume it."""
    saved = read_progress(find_checkpoint(run_dir, step), setup_of(config, plan))
    check_state(saved.curriculum, [p.prompt_id for p in plan.train.pool], config)
    return saved


def read_progress(folder: Path, setup: dict[str, Any]) -> SavedRun:
    """Reads a whole checkpoint. Raises CheckpointError if unreadable, not of `setup`, or with code to run."""
    if code := find_code(folder):
        raise CheckpointError(f"checkpoint {folder} is not safe to load: {code}: choose another with --step")
    try:
        state = json.loads((folder / _STATE).read_text())
        curriculum = state["curriculum"]
        if missing := _CURRICULUM_KEYS - curriculum.keys():
            raise KeyError(*sorted(missing))
        curriculum["records"] = pq.read_table(folder / _RECORDS)
        shapes, learner, eval_key = (state[name] for name in ("shapes", "learner", "eval_key"))
        world_size = learner["world_size"]
        progress = Progress(
            **{name: state[name] for name in ("step", "evaluations", "failed_eval")},
            baseline=state.get("baseline"),  # checkpoints of earlier versions lack it
            totals=Counter(state["totals"]),
            examples=answers_in(pq.read_table(folder / _PREDICTIONS)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"its state cannot be read ({error!r})") from error
    _check_same(folder, "model", "the student", shapes, setup["shapes"])
    _check_same(folder, "learner config", "the learner section", learner, setup["learner"])
    if state.get("student", setup["student"]) != setup["student"]:
        how = "has adapters of another student: resume with the student of the run's start"
        raise CheckpointError(f"checkpoint {folder} {how}")
    if eval_key != setup["eval_key"]:
        split = "has evaluations on another held-out split"
        raise CheckpointError(f"checkpoint {folder} {split}: resume with the data.eval of the run's start")
    return SavedRun(folder=folder, progress=progress, curriculum=curriculum, world_size=world_size)


def _check_same(folder: Path, kind: str, what: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [
        f"{k} {saved.get(k)} / {v}" for k, v in wanted.items() if saved.get(k) != v and k != "world_size"
    ]
    if different:
        how = f"(checkpoint / now: {'; '.join(different)}): resume with {what} of the run's start"
        raise CheckpointError(f"checkpoint {folder} is of another {kind} {how}")
