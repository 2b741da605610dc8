"""Measures one run of the comparison, in a process of its own; its output is in OUT/logs."""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import launch
from benchmarks.claims.case import EVAL_EVERY, GROUPS, SHARED, Case, data_folder
from benchmarks.command import WARM_UP_STEPS, Row
from curriculum.answers import FILE as TEACHER_ANSWERS
from demo import gaps
from driver.records.sinks import read_metrics
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.files.checkpoint import checkpoint_folder

REMOVED = ("checkpoints", "student", "trajectories")  # of a run folder, once it is measured


def measure(case: Case, out: Path) -> Row:
    """The row of a case: `run_s`, and for `start` second_task; for others see `result_of`."""
    began = time.monotonic()
    with printed_to(out / "logs" / f"{case.name}.txt"):
        config = config_of(case, out)
        if case.part == "start":
            row = {"second_task": gaps.second_task(Path(config.student), data_folder(out))}
        else:
            folder = out / "runs" / case.name
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
            summary = launch.launch(config, address="local")  # not a Ray that happens to be there
            row = result_of(summary, read_metrics(folder), config)
            if case.part == "learn":
                student = checkpoint_folder(folder, summary["steps"]) / "student"
                row["second_task"] = gaps.second_task(student, data_folder(out))
            for name in REMOVED:
                shutil.rmtree(folder / name, ignore_errors=True)
            if case.part != "time":  # one run keeps the teacher's answers: later ones read all that there are
                (folder / TEACHER_ANSWERS).unlink(missing_ok=True)
    return row | {"run_s": time.monotonic() - began}


def config_of(case: Case, out: Path) -> Config:
    """The demo's configuration, its start and splits, what all runs share, and the case's own."""
    held_out = "eval" if case.part == "learn" else "validation"
    values: dict[str, Any] = {"runs_dir": out / "runs", "run_name": case.name, "seed": case.seed}
    if case.part != "start":
        values |= {"num_steps": case.steps, "learner.lr": case.lr}
    texts = [f"{key}={value}" for key, value in values.items()]
    of_data = gaps.overrides(data_folder(out), case.labels, held_out)
    config = load_demo([*of_data, *SHARED, *texts, *case.overrides])
    return config.model_copy(update={"eval_every": EVAL_EVERY}) if case.part == "learn" else config


def result_of(summary: Mapping[str, Any], lines: Sequence[Mapping[str, float]], config: Config) -> Row:
    """Scores and costs of a run. `update_s`: median seconds from the end of an update to that of the next.

    `curve`: a point for each evaluation, the first before training. Raises RuntimeError if clips of the
    held-out split could not be read.
    """
    if summary["failed_eval"]:
        raise RuntimeError(f"held-out clips could not be read: {summary['failed_eval']}")
    curve = [point(None, summary["student_before"], config)]
    curve += [point(line, scores_in(line), config) for line in lines if "eval/miou" in line]
    if curve[-1]["step"] < summary["steps"]:
        curve.append(point(lines[-1], summary["student_after"], config))
    ends = [line["wall_s"] for line in lines[WARM_UP_STEPS:]]
    seconds, teacher = summary["seconds"], summary["teacher"]
    row: Row = {key: curve[-1][key] for key in ("miou", "r1_07")}
    row |= {"update_s": float(np.median(np.diff(ends))) if len(ends) > 1 else None}
    row |= {"select_s": seconds.get("select", 0.0), "train_s": seconds["train"] - seconds.get("evaluate", 0)}
    row |= {"teacher_miou": teacher["miou"] if teacher else None, "dropped": len(summary["dropped"])}
    row |= {"metrics": first_and_last(lines, "learner/", "actors/miou")}
    return row | {"suspended": summary["suspended_rollouts"], "curve": curve}


def first_and_last(lines: Sequence[Mapping[str, float]], *prefixes: str) -> dict[str, list[float]]:
    """Means over the first and the last quarter of the steps, of the metrics that all these steps have."""
    few = max(1, len(lines) // 4)
    parts = lines[:few], lines[-few:]
    names = [
        n for n in lines[0] if n.startswith(prefixes) and all(n in line for part in parts for line in part)
    ]
    return {name: [float(np.mean([line[name] for line in part])) for part in parts] for name in names}


def scores_in(line: Mapping[str, float]) -> dict[str, float]:
    return {name: line[f"eval/{name}"] for name in ("miou", "r1@0.7")}


def point(line: Mapping[str, float] | None, scores: Mapping[str, float], config: Config) -> dict[str, float]:
    """Scores after the step with these metrics, and what was spent until then; None: before the first."""
    line = line or {"step": -1.0}
    step = line["step"] + 1
    rollouts = line.get("actors/rollouts", 0.0)
    sampled = config.loss.needs.rollouts
    return {
        "step": step,
        "prompts": rollouts / config.rollout.rollouts_per_prompt if sampled else step * GROUPS,
        "rollouts": rollouts,
        "teacher_tokens": line.get("teacher/scored_tokens", 0.0),
        "miou": scores["miou"],
        "r1_07": scores["r1@0.7"],
    }


@contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """All output of this process and of those that it starts goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        sys.stdout.flush()
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            for number, copy in enumerate(saved, 1):
                os.dup2(copy, number)
                os.close(copy)
