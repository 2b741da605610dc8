"""The log of every scored trajectory."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from video_opd.schemas import TRAJECTORIES, _keep_steps_before, span_columns
from video_opd.types import ScoredGroup


class TrajectoryLog:
    """Every scored trajectory that was trained on, as an Arrow IPC stream: what was written before a crash is readable.

    Each start of the run writes a file of its own, named for its first step; steps that it does again leave older files.
    """

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        for older in folder.glob("from-step-*.arrows"):
            _keep_steps_before(older, start_step)
        self._sink = pa.OSFile(str(folder / f"from-step-{start_step:06d}.arrows"), "wb")
        self._writer = pa.ipc.new_stream(self._sink, TRAJECTORIES)

    def write(self, groups: Sequence[ScoredGroup], step: int) -> None:
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
                **span_columns(t.predicted_span_s),
            }
            for g in groups
            for t, s in zip(g.group.trajectories, g.scores or [None] * len(g.group.trajectories), strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=TRAJECTORIES))
        self._sink.flush()

    def close(self) -> None:
        self._writer.close()
        self._sink.close()
