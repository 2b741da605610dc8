"""metrics.jsonl, which trackers follow, and the log of every trajectory that was trained on."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from driver.records.trackers import Trackers
from video_opd.files.run_folder import write_atomically
from video_opd.schemas import TRAJECTORIES
from video_opd.types import ScoredGroup, StepReport


class MetricSinks:
    """Writes metrics.jsonl, one line per step, finite values only, and feeds trackers. A resume appends."""

    def __init__(self, run_dir: Path, start_step: int, trackers: Trackers | None = None):
        path, kept = run_dir / "metrics.jsonl", []
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < start_step]
            write_atomically(path, "".join(line + "\n" for line in kept))
        self._file, self._trackers = path.open("a"), trackers
        if trackers:
            trackers.begin([json.loads(line) for line in kept])

    def write(self, report: StepReport, wall_s: float) -> None:
        """`wall_s`: seconds since the epoch."""
        known = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
        line = {"step": report.step, "policy_version": report.policy_version, "wall_s": wall_s, **known}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._trackers:
            self._trackers.write(line)

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without a last line cut off by a crash."""
    return [json.loads(line) for line in _whole_lines(run_dir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


class TrajectoryLog:
    """Arrow IPC streams, schema TRAJECTORIES: everything written before a crash stays readable.

    Each start of the run writes its own file and removes the steps that it will repeat from older ones.
    """

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        for older in folder.glob("from-step-*.arrows"):
            _keep_steps_before(older, start_step)
        self._sink = pa.OSFile(str(folder / f"from-step-{start_step:06d}.arrows"), "wb")
        self._writer = pa.ipc.new_stream(self._sink, TRAJECTORIES)

    def write(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """Appends one batch, without suspended trajectories."""
        rows = [
            {
                "step": step,
                "trajectory_id": t.trajectory_id,
                "prompt_id": t.prompt_id,
                "policy_version": t.policy_version,
                "prompt_fingerprint": t.prompt_fingerprint,
                "num_prompt_tokens": len(t.prompt_token_ids),
                "response_token_ids": t.response_token_ids,
                "actor_logprobs": t.actor_logprobs,
                "teacher_logprobs": None if s is None else s.teacher_logprobs,
                "finish_reason": str(t.finish_reason),
                "text": t.text,
                "spans_s": t.predicted_spans_s,
            }
            for g in groups
            for t, s in zip(g.group.trajectories, g.scores or [None] * len(g.group.trajectories), strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=TRAJECTORIES))
        self._sink.flush()

    def close(self) -> None:
        self._writer.close()
        self._sink.close()


def _keep_steps_before(path: Path, step: int) -> None:
    """Removes later steps from a file, and a last batch cut off by a crash."""
    kept, temporary, schema = [], path.with_suffix(".tmp"), TRAJECTORIES
    with pa.OSFile(str(path)) as source, suppress(pa.ArrowInvalid):
        stream = pa.ipc.open_stream(source)
        schema = stream.schema  # an earlier version's may differ
        for batch in stream:
            kept.append(batch.filter(pc.field("step") < step))
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.Table.from_batches(kept, schema=schema))
    temporary.rename(path)
