"""Arrow schemas of what is kept on disk, and the way there and back."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

RECORDS = pa.schema(
    [
        ("prompt_id", pa.string()),
        (
            "teacher_iou",
            pa.float64(),
        ),  # tau, mean over the teacher's answers; null: not asked, or its clip cannot be read
        ("student_iou", pa.list_(pa.float64())),  # sigma, one a round
        ("disagreement", pa.float64()),  # delta of the current round
        ("selected", pa.bool_()),  # in the current round
        ("num_rollouts", pa.int64()),
        ("last_step", pa.int64()),  # -1: never sampled
        ("suspended", pa.bool_()),  # every rollout was, the last time
        ("dropped", pa.string()),  # why; empty: in the pool
    ]
)
"""What the curriculum knows of every prompt, in the order of the pool."""

MANIFEST = pa.schema(
    [
        ("prompt_id", pa.string()),  # VIDEO_ID:NUMBER, unique
        ("video", pa.string()),  # path below the folder of videos
        ("query", pa.string()),  # cleaned
        (
            "spans_s",
            pa.list_(pa.list_(pa.float64())),
        ),  # [start, end] of each true interval, from the clip's start; null: unlabelled
        ("duration_s", pa.float64()),  # of the clip, as the annotations say; null: they do not
        ("clip_start_s", pa.float64()),  # the part of the file that is the clip; null: all of it
        ("clip_end_s", pa.float64()),
        ("fps", pa.float64()),  # by which the annotations counted frames; null: they count seconds
        ("source", pa.string()),  # annotation file and place in it
    ]
)
"""Annotations of any format, one row a query (docs/data.md)."""

TEACHER_ANSWERS = pa.schema(
    [
        ("prompt_key", pa.string()),  # of the prompt's content, see curriculum/teacher_answers.py
        ("prompt_id", pa.string()),
        ("text", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
    ]
)
PREDICTIONS = pa.schema(
    [
        ("evaluation", pa.string()),  # teacher, student_before, step_N, ...
        ("prompt_id", pa.string()),
        ("text", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
    ]
)
"""The answers of a run's evaluations on the held-out split, in its checkpoints."""
TRAJECTORIES = pa.schema(
    [
        ("step", pa.int64()),
        ("trajectory_id", pa.string()),
        ("prompt_id", pa.string()),
        ("policy_version", pa.int64()),
        ("prompt_fingerprint", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("response_token_ids", pa.list_(pa.int32())),
        ("actor_logprobs", pa.list_(pa.float32())),
        ("teacher_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
    ]
)
EVALUATION = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("video", pa.string()),  # clip id
        ("query", pa.string()),
        ("duration_s", pa.float64()),
        ("answer_spans_s", pa.list_(pa.list_(pa.float64()))),  # the truth: [start, end] each
        ("text", pa.string()),  # null: missing
        ("start_s", pa.float64()),  # as the protocol scored it; null: unparsed
        ("end_s", pa.float64()),
        ("iou", pa.float64()),
        ("unparsed", pa.bool_()),
        ("reversed", pa.bool_()),
        ("out_of_range", pa.bool_()),
        ("missing", pa.bool_()),
        ("failure", pa.string()),  # why the answer could not be right; null: it could
    ]
)
"""Every prompt of one evaluation under one protocol, in the order of the split; see docs/evaluation.md."""


def write_parquet(table: pa.Table, path: Path) -> None:
    """Appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary)
    temporary.rename(path)


def span_columns(span: tuple[float, float] | None) -> dict[str, float | None]:
    return {"start_s": span[0] if span else None, "end_s": span[1] if span else None}


def read_trajectories(path: Path) -> pa.Table:
    """The whole batches of one file of the log; a last batch cut off by a crash is left out."""
    batches = []
    with pa.OSFile(str(path)) as source:
        try:
            for batch in pa.ipc.open_stream(source):
                batches.append(batch)
        except pa.ArrowInvalid:  # the writer was stopped in the middle of a batch, or before the first
            pass
    return pa.Table.from_batches(batches, schema=TRAJECTORIES)


def _keep_steps_before(path: Path, step: int) -> None:
    kept = read_trajectories(path).filter(pc.field("step") < step)
    temporary = path.with_suffix(".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, TRAJECTORIES) as writer:
        writer.write_table(kept)
    temporary.rename(path)
