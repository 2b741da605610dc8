"""Answers on disk: Parquet, one row per prompt, with all that is needed to score it again."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.scoring import Question, ScoredAnswer
from video_opd.errors import DataError
from video_opd.schemas import EVALUATION, write_parquet


def write_answers(path: Path, scored: Sequence[ScoredAnswer]) -> None:
    """Writes every prompt's question, truth, answer and score, as schemas.EVALUATION; whole or not at all."""
    rows = [
        {
            **asdict(a.question),
            "spans_s": a.spans_s,
            "text": a.text,
            "iou": a.iou,
            "unparsed": not a.spans_s,
            "reversed": a.is_reversed,
            "out_of_range": a.is_out_of_range,
            "missing": a.text is None,
            "failure": a.failure,
        }
        for a in scored
    ]
    write_parquet(pa.Table.from_pylist(rows, schema=EVALUATION), path)


def read_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a Parquet file with these columns, in EVALUATION's types. Raises DataError."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        why = f"cannot be read as Parquet ({_one_line(error)}): name a file of predictions"
        raise DataError(f"{path} {why}") from error
    if absent := [name for name in columns if name not in table.column_names]:
        theirs = {"prompt_id", "text"} & set(absent)
        hint = "columns prompt_id and text" if theirs else "--config, for the questions and their truth"
        raise DataError(f"{path} has no column {', '.join(absent)}: give it {hint}")
    names = [*columns, *(name for name in optional if name in table.column_names)]
    try:
        rows = table.select(names).cast(pa.schema([EVALUATION.field(name) for name in names])).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        why = f"does not have the columns' types ({_one_line(error)}): see docs/evaluation.md"
        raise DataError(f"{path} {why}") from error
    if not rows:
        raise DataError(f"{path} has no rows: there is nothing to score")
    ids = [row["prompt_id"] for row in rows]
    if None in ids:
        raise DataError(f"{path}: row {ids.index(None)} has no prompt_id")
    prompt_id, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise DataError(f"{path} has two rows of prompt {prompt_id}: keep one")
    return rows


def read_answers(path: Path) -> tuple[dict[str, str | None], dict[str, str]]:
    """(prompt id -> text, None: no answer; prompt id -> why there is none). Raises DataError."""
    rows = read_rows(path, ("prompt_id", "text"), optional=("failure",))
    absent = [row for row in rows if row["text"] is None and row.get("failure")]
    return {row["prompt_id"]: row["text"] for row in rows}, {r["prompt_id"]: r["failure"] for r in absent}


def read_questions(path: Path) -> list[Question]:
    """The questions of a file that `write_answers` wrote. Raises DataError."""
    questions = []
    for row in read_rows(path, ("prompt_id", "video", "query", "duration_s", "answer_spans_s")):
        spans = row.pop("answer_spans_s") or []
        if None in row.values() or any(span is None or len(span) != 2 or None in span for span in spans):
            prompt = f"{path}: prompt {row['prompt_id']}"
            raise DataError(f"{prompt} lacks its video, query, duration or true spans")
        questions.append(Question(**row, answer_spans_s=tuple((start, end) for start, end in spans)))
    return questions


def count_others(questions: Sequence[Question], texts: Mapping[str, str | None], path: Path) -> int:
    """How many of the texts answer none of the questions. Raises DataError if that is all of them."""
    others = len(texts.keys() - {q.prompt_id for q in questions})
    if others == len(texts):
        theirs, ours = next(iter(texts)), questions[0].prompt_id
        why = f"answers none of the {len(questions)} prompts (it has {theirs}, they are like {ours})"
        raise DataError(f"{path} {why}: give the config of the split it was made from")
    return others


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
