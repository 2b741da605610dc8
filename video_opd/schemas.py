"""Arrow schemas of the tables on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from video_opd.types import Prediction, Span

_SPANS = pa.list_(pa.list_(pa.float64()))  # [start, end] each, seconds from the start of the clip
_ANSWER = [("text", pa.string()), ("spans_s", _SPANS)]  # without any: unparsed

RECORDS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("teacher_iou", pa.float64()),  # mean over the teacher's answers; null: not asked, or clip unreadable
        ("student_iou", pa.list_(pa.float64())),  # one per round
        ("disagreement", pa.float64()),  # in the current round: of IoUs, or nats with reverse_kl
        ("selected", pa.bool_()),  # in the current round
        ("num_rollouts", pa.int64()),
        ("last_step", pa.int64()),  # -1: never sampled
        ("suspended", pa.bool_()),  # all rollouts of the last time
        ("dropped", pa.string()),  # reason; empty: in the pool
    ]
)
"""The curriculum's state of every prompt, in the order of the pool."""

MANIFEST = pa.schema(
    [
        ("prompt_id", pa.string()),  # VIDEO_ID:NUMBER, unique
        ("video", pa.string()),  # path below the folder of videos
        ("query", pa.string()),  # cleaned
        ("spans_s", _SPANS),  # ground truth; null: unlabelled
        ("duration_s", pa.float64()),  # of the clip, from the annotations; null: not given
        ("clip_start_s", pa.float64()),  # the part of the file that is the clip; null: the whole file
        ("clip_end_s", pa.float64()),
        ("fps", pa.float64()),  # of annotations in frames; null: annotations in seconds
        ("source", pa.string()),  # annotation file and place in it
    ]
)
"""Annotations of any format, one row per query (docs/data.md)."""

ANSWERS = pa.schema(
    [
        ("prompt_key", pa.string()),  # hash of the prompt, see curriculum/answers.py
        ("prompt_id", pa.string()),
        *_ANSWER,
        ("reverse_kl", pa.float64()),  # nats; null: no teacher scored the answer
    ]
)
"""Answers of teacher or student to the pool."""

PREDICTIONS = pa.schema([("evaluation", pa.string()), ("prompt_id", pa.string()), *_ANSWER])
"""Answers on the held-out split, in checkpoints. evaluation: teacher, student_before, step_N, ..."""

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
        *_ANSWER,
    ]
)
"""The log of all trajectories that were trained on."""

EVALUATION = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("video", pa.string()),  # clip id
        ("query", pa.string()),
        ("duration_s", pa.float64()),
        ("answer_spans_s", _SPANS),  # ground truth
        *_ANSWER,  # text null: missing; the spans as the protocol scored them
        ("iou", pa.float64()),
        ("unparsed", pa.bool_()),
        ("reversed", pa.bool_()),
        ("out_of_range", pa.bool_()),
        ("missing", pa.bool_()),
        ("failure", pa.string()),  # why the answer cannot be right, whatever the truth; null: it can
    ]
)
"""Every prompt of one evaluation under one protocol, in the order of the split; see docs/evaluation.md."""


DESCRIPTIONS = pa.schema(
    [
        ("path", pa.binary()),  # of the video
        ("stamp", pa.string()),  # of its file
        ("plain", pa.string()),  # the fields of a VideoInfo but times_s, as JSON
        ("times_s", pa.binary()),  # float64[num_frames]
    ]
)
"""What videos hold, in runs_dir/.videos; see video_opd/video/descriptions.py."""


def write_parquet(table: pa.Table, path: Path) -> None:
    """Writes atomically: the file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary)
    temporary.rename(path)


def answers_table(answers: Mapping[str, Sequence[Prediction]], schema: pa.Schema) -> pa.Table:
    """One row for each answer: its key, in the first column of `schema`, its prompt, text and span."""
    rows = [
        {schema.names[0]: key, "prompt_id": p.prompt_id, "text": p.text}
        | {"reverse_kl": p.reverse_kl, "spans_s": p.spans_s}
        for key, predictions in answers.items()
        for p in predictions
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def answers_in(table: pa.Table) -> dict[str, list[Prediction]]:
    """The answers of an answers_table, by key."""
    answers: dict[str, list[Prediction]] = {}
    for row in table.to_pylist():
        divergence = row.get("reverse_kl")  # files of earlier versions lack it
        answer = {"prompt_id": row["prompt_id"], "text": row["text"], "spans_s": spans_in(row)}
        answers.setdefault(row[table.column_names[0]], []).append(Prediction(**answer, reverse_kl=divergence))
    return answers


def spans_in(row: Mapping[str, Any]) -> tuple[Span, ...]:
    """The spans of an answer's row, also of files of earlier versions: start_s and end_s, null: unparsed."""
    if "start_s" in row:
        return () if row["start_s"] is None else ((row["start_s"], row["end_s"]),)
    return tuple((start, end) for start, end in row["spans_s"] or ())
