"""TimeLens' files of predictions: JSON with the key `video>>>query>>>span` for each answer.

Layout: TencentARC/TimeLens, evaluation/eval_dataloader.py writes it (one key a line or list item), and
compute_metrics.py also reads one object with all keys. The value has `answers`, the text, or `timestamps`,
the intervals read in it; `duration` may be missing.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.scoring import Question
from video_opd.datasets import fields
from video_opd.datasets.source import as_record, read_source
from video_opd.datasets.videos import video_id
from video_opd.errors import DataError
from video_opd.types import Span

SEPARATOR, SUFFIXES = ">>>", (".json", ".jsonl")


@dataclass(frozen=True)
class Entry:
    """One prediction."""

    key: tuple[str, str, Span]  # of its question: video id, query, true span to the millisecond
    duration_s: float | None
    text: str


def read_entries(path: Path) -> list[Entry]:
    """In file order. Raises DataError."""
    found: dict[tuple[str, str, Span], Entry] = {}
    for line, value in read_source(path).values():
        for item in value if isinstance(value, list) else [value]:
            for name, prediction in as_record(item, f"{path}:{line}").items():
                entry = _entry(name, prediction, f"{path}: {name[:80]}")
                if found.setdefault(entry.key, entry) is not entry:
                    raise DataError(f"{path}: {name[:80]} appears twice: keep one")
    if not found:
        raise DataError(f"{path} has no predictions: there is nothing to score")
    return list(found.values())


def _entry(name: str, prediction: Any, where: str) -> Entry:
    video, _, rest = name.partition(SEPARATOR)
    query, _, written = rest.rpartition(SEPARATOR)
    try:
        start, end = map(float, ast.literal_eval(written))
    except (ValueError, TypeError, SyntaxError):
        raise fields.wrong("a key must be video>>>query>>>[start, end]", name, where) from None
    record = as_record(prediction, where)
    if "answers" in record:
        text = fields.text(record["answers"], "answers", where)
    else:
        spans = fields.pairs(fields.get(record, "timestamps", where), "timestamps", where)
        text = ", ".join(f"{first} - {last}" for first, last in spans)
    return Entry(_key(video, query, (start, end)), fields.duration(record, where), text)


def _key(video: str, query: str, span: Span) -> tuple[str, str, Span]:
    return video_id(video), query, (round(span[0], 3), round(span[1], 3))


def own_questions(path: Path) -> tuple[list[Question], dict[str, str | None]]:
    """The questions of a file whose predictions have a duration, and its texts by their ids."""
    questions, texts = [], {}
    for number, entry in enumerate(read_entries(path), 1):
        video, query, span = entry.key
        if entry.duration_s is None:
            raise DataError(f"{path}: prediction {number} has no duration: give --config, for the questions")
        prompt_id = f"{video}:{number}"
        names = {"prompt_id": prompt_id, "video": video, "query": query}
        questions.append(Question(**names, duration_s=entry.duration_s, answer_spans_s=(span,)))
        texts[prompt_id] = entry.text
    return questions, texts


def answers_to(questions: Sequence[Question], path: Path) -> Mapping[str, str | None]:
    """The texts by the ids of their questions, or by their own keys where they answer none of these.

    A question is known by its video, its query and its first true span. Raises DataError.
    """
    text_of = {entry.key: entry.text for entry in read_entries(path)}
    keys = {q.prompt_id: _key(q.video, q.query, q.answer_spans_s[0]) for q in questions}
    asked, known = set(keys.values()), {name: text_of[key] for name, key in keys.items() if key in text_of}
    return known | {SEPARATOR.join(map(str, key)): text for key, text in text_of.items() if key not in asked}
