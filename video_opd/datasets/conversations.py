"""Conversations about videos, a question and its intervals a turn: TimeLens2's lists for supervised training.

Layouts: MCG-NJU/TimeLens2, sft/tools/prepare_timelens2_93k.py, which makes XTuner's (the video in the first
message) of the published one (video_id beside the messages).
"""

import re
from collections.abc import Iterator
from typing import Any

from video_opd.config_data import DatasetConfig
from video_opd.datasets import fields
from video_opd.datasets.source import Record, read_source
from video_opd.types import Span

MARK = "<VIDEO_CONTEXT>"  # stands for the video in a message
QUESTION = r"\s*(\S.*)"  # the first line; those below say how to write the answer
_TIME = re.compile(r"(?:\d+:)?(?:\d+:)?\d+(?:\.\d+)?")


def rows(dataset: DatasetConfig) -> Iterator[Record]:
    """One record per turn: its question by query_pattern, and its answer. Raises DataError."""
    pattern = re.compile(dataset.query_pattern or QUESTION)
    for where, number, record in read_source(dataset.annotations).records():
        messages = fields.get(record, "messages", where)
        roles = [message.get("role") for message in messages] if _is_objects(messages) else []
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise fields.wrong("messages must be turns of user and assistant", roles or messages, where)
        texts = [_text(message.get("content"), where) for message in messages]
        video = record["video_id"] if "video_id" in record else _video(messages[0].get("content"), where)
        for turn in range(len(messages) // 2):
            place = f"{where}, turn {turn + 1}"
            if (found := pattern.search(texts[2 * turn].replace(MARK, ""))) is None:
                raise fields.wrong("the question does not match query_pattern", texts[2 * turn], place)
            of_turn = {"video": video, "query": found[1] or "", "answer": texts[2 * turn + 1]}
            yield place, f"{number}.{turn + 1}", of_turn


def intervals(value: Any, key: str, where: str) -> tuple[Span, ...]:
    """All times that an answer names, by twos: numbers, or clock times."""
    times = [fields.clock_seconds(time, key, where) for time in _TIME.findall(fields.text(value, key, where))]
    if len(times) % 2:
        raise fields.wrong(f"{key} must name an even number of times", value, where)
    return tuple(zip(times[::2], times[1::2], strict=True))


def _is_objects(items: Any) -> bool:
    return isinstance(items, list) and all(isinstance(item, dict) for item in items)


def _text(content: Any, where: str) -> str:
    if _is_objects(content):
        content = "\n".join(fields.text(part["text"], "text", where) for part in content if "text" in part)
    return fields.text(content, "content", where)


def _video(content: Any, where: str) -> Any:
    """The file that the first message names."""
    parts = content if _is_objects(content) else []
    urls = [url for part in parts if isinstance(url := part.get("video_url"), dict)]
    if not urls:
        raise fields.wrong("there must be a video_id, or a video_url in the first message", content, where)
    return fields.get(urls[0], "url", where)
