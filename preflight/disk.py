"""The disk that a run fills: checkpoints, snapshots, the best student, decoded frames; and what is free."""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

from preflight.inputs import Draft, Plan
from preflight.memory import DTYPE_BYTES, GIB, trained
from preflight.model_shapes import ModelShapes, count, parameters
from video_opd.config import Config
from video_opd.errors import ConfigError
from video_opd.files.checkpoint import CHECKPOINTS
from video_opd.video.clips import frames_key
from video_opd.video.frame_cache import cache_folder


@dataclass(frozen=True)
class DiskPlan:
    """The most that the run has on the file system of runs_dir, in bytes and numbers."""

    config: Config
    checkpoint_bytes: int  # of one
    num_checkpoints: int  # at a time, with the one that is being written
    student_bytes: int  # of one snapshot, or of RUN/student
    num_students: int  # as num_checkpoints
    frame_bytes: int  # decoded frames, if their cache is on that file system too
    free_bytes: int | None  # with what the resumed run has there already; None: unknown

    @property
    def needed_bytes(self) -> int:
        checkpoints = self.num_checkpoints * self.checkpoint_bytes
        return checkpoints + self.num_students * self.student_bytes + self.frame_bytes


def checkpoint_bytes(config: Config, student: ModelShapes) -> int:
    """The student eP, its adapters eT, and what DeepSpeed writes of T trained and F frozen parameters:

    moments and masters 12T (8T in float32 without ZeRO); weights e(P + adapters), with ZeRO-3 eF alone; with
    ZeRO-2 on GPUs the frozen ones a second time, eF.
    """
    learner, of = config.learner, parameters(student)
    of_trained, e = trained(student, learner), DTYPE_BYTES[learner.dtype]
    frozen = {n: s for n, s in of.items() if n not in of_trained}
    has_masters = learner.zero_stage or learner.dtype == "bfloat16"
    written = count(frozen) if learner.zero_stage == 3 else count(of | of_trained)
    if learner.zero_stage == 2 and learner.num_gpus:
        written += count(frozen)
    student_bytes = e * count(of) + (e * count(of_trained) if learner.lora_rank else 0)
    return student_bytes + e * written + count(of_trained) * (12 if has_masters else 8)


def disk_plan(config: Config, student: ModelShapes, draft: Plan | Draft, resumed: Path | None) -> DiskPlan:
    """For the run folder `resumed`, or a new one."""
    kept = config.checkpoint_keep_last + (config.checkpoint_keep_best if config.eval_every else 0)
    kept += 1 if config.checkpoint_url else 0  # the one that is being copied
    num_checkpoints = kept + 1
    if config.curriculum.kind == "uniform":  # the others also write one at each selection
        before_end = config.num_steps // config.checkpoint_every if config.checkpoint_every else 0
        num_checkpoints = min(num_checkpoints, before_end + 1)
    snapshots = config.snapshot_keep_last + 1 if config.snapshot_every else 0
    runs = _existing(resumed or Path(config.runs_dir))
    total, _, free = shutil.disk_usage(runs)
    cache = _existing(cache_folder(config.video))
    own = [resumed / name for name in (CHECKPOINTS, "snapshots", "student")] if resumed else []
    return DiskPlan(
        config=config,
        checkpoint_bytes=checkpoint_bytes(config, student),
        num_checkpoints=num_checkpoints,
        student_bytes=DTYPE_BYTES[config.learner.dtype] * count(parameters(student)),
        num_students=snapshots + (2 if config.eval_every else 1),
        frame_bytes=_frame_bytes(config, draft) if os.stat(cache).st_dev == os.stat(runs).st_dev else 0,
        free_bytes=free + sum(map(_bytes_below, own)) if total else None,
    )


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _frame_bytes(config: Config, draft: Plan | Draft) -> int:
    """By which the cache of decoded frames may grow: all clips', up to its bound."""
    splits = (draft.train, draft.eval)
    room = max(0, config.video.cache_bytes - _bytes_below(cache_folder(config.video)))
    if not all(splits):
        return room
    clips = {frames_key(p.clip): p.clip for split in splits if split for p in split.prompts}.values()
    return min(room, sum(3 * len(c.frame_indices) * prod(c.frame_size) for c in clips))


def _bytes_below(folder: Path) -> int:
    """Of all files below it, once where one has several names; 0: it is not there."""
    sizes: dict[int, int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another run may take it out of the cache of frames meanwhile
                status = os.lstat(Path(parent, name))
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def describe_disk(plan: DiskPlan) -> str:
    """One line for people."""
    free = "unknown" if plan.free_bytes is None else f"{plan.free_bytes / GIB:.0f}"
    remedy = remedy_of(plan)
    refused = f" (a launch is refused: {remedy})" if remedy else ""
    parts = [f"{plan.num_checkpoints} x {plan.checkpoint_bytes / GIB:.2f} checkpoints"]
    parts.append(f"{plan.num_students} x {plan.student_bytes / GIB:.2f} students")
    parts.append(f"{plan.frame_bytes / GIB:.2f} decoded frames")
    return (
        f"disk      {plan.needed_bytes / GIB:.2f} GiB in runs_dir, {free} free{refused}: {', '.join(parts)}"
    )


def remedy_of(plan: DiskPlan) -> str | None:
    """What would make the run fit; None: it fits, or nobody knows."""
    if plan.free_bytes is None or plan.needed_bytes <= plan.free_bytes:
        return None
    beyond = -(-(plan.needed_bytes - plan.free_bytes) // plan.checkpoint_bytes)
    fewer = min(plan.config.checkpoint_keep_last, plan.num_checkpoints - 1) - beyond
    fits = f"set checkpoint_keep_last={fewer}, or " if fewer > 0 else ""
    return f"{fits}choose a runs_dir with more room"


def check_disk(plan: DiskPlan) -> None:
    """Raises ConfigError: better now than at the checkpoint that no longer fits."""
    if plan.free_bytes is not None and (remedy := remedy_of(plan)):
        found = f"{plan.free_bytes / GIB:.1f} GiB are free, the run fills {plan.needed_bytes / GIB:.1f} GiB"
        raise ConfigError(f"runs_dir={plan.config.runs_dir}: {found}: {remedy}")
