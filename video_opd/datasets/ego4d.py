"""Ego4D's natural language queries, nlq_{train,val}.json: videos, their clips, these clips' queries.

Layout: ego4d-data.org/docs/data/annotations-schemas. A query's clip_start_sec counts from its clip's start,
which is at video_start_sec of the video.
"""

from collections.abc import Iterator
from typing import Any

from video_opd.config_data import DatasetConfig
from video_opd.datasets import fields
from video_opd.datasets.source import Record, as_record, read_source
from video_opd.logs import log

SPAN = ("clip_start_sec", "clip_end_sec")
PART = ("video_start_sec", "video_end_sec")


def rows(dataset: DatasetConfig) -> Iterator[Record]:
    """One record per query that has a text; a query's number counts all of the file. Raises DataError.

    cuts=ignore: the video is the clip's file, CLIP_UID; apply: that part of the whole video's, VIDEO_UID.
    """
    path, number, empty = dataset.annotations, 0, 0
    for video, clip, where in _clips(path):
        start, end = (fields.number(fields.get(clip, key, where), key, where) for key in PART)
        owner, uid = (video, "video_uid") if dataset.cuts == "apply" else (clip, "clip_uid")
        same = {"video": fields.get(owner, uid, where), "duration": end - start, "start": start, "end": end}
        for annotation in _items(clip, "annotations", where):
            for query in _items(annotation, "language_queries", where):
                number += 1
                if not query.get("query"):
                    empty += 1
                    continue
                place = f"{where}, query {number}"
                times = None
                if any(query.get(key) is not None for key in SPAN):  # the test file has none
                    times = [fields.number(query.get(key), key, place) for key in SPAN]
                yield place, number, {**same, "query": query["query"], "span": times}
    if empty:
        log.warning(
            "%s: %d of %d queries have no text and are left out, as in Ego4D's code", path, empty, number
        )


def _clips(path: str) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """(video, clip, place for errors)"""
    for value in (value for _, value in read_source(path).values()):
        for video in _items(as_record(value, path), "videos", path):
            for number, clip in enumerate(_items(video, "clips", f"{path}: a video"), 1):
                yield video, clip, f"{path}: clip {clip.get('clip_uid', number)}"


def _items(record: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    items = fields.get(record, key, where)
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        return items
    raise fields.wrong(f"{key} must be a list of objects", items, where)
