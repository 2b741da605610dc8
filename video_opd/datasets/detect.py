"""Which format an annotation file has."""

from typing import Any, get_args

from video_opd.config_data import AnnotationFormat
from video_opd.datasets.source import Source
from video_opd.errors import DataError

_RECORDS = {  # the keys by which a record of a list or a jsonl is known; the first that are all there decide
    "timelens_100k": {"video_path", "events"},
    "time_r1": {"video", "timestamp", "sentence"},
    "tvgbench": {"path", "question", "answer"},
    "didemo": {"video", "description", "times"},
    "videomind": {"query", "span"},
    "qvhighlights": {"vid", "query"},
}
_VIDEOS = {  # the same for the object of one video
    "tacos": {"timestamps", "sentences", "fps", "num_frames"},
    "charades_json": {"timestamps", "sentences"},
    "timelens_bench": {"spans", "queries"},
}


def detect(source: Source) -> str:
    """The format's name, from the first annotation. Raises DataError."""
    name = None
    start = source.text.lstrip()[:1]
    if start == "{" and (first := _first_video(source)):
        name = next((n for n, keys in _VIDEOS.items() if keys <= first[1].keys()), None)
        if name == "charades_json" and first[0].startswith("v_"):
            name = "activitynet"
    elif start in ("{", "["):
        record: dict[str, Any] = next((record for _, _, record in source.records()), {})
        name = next((n for n, keys in _RECORDS.items() if keys <= record.keys()), None)
    elif any("##" in line for _, line in source.lines()):
        name = "charades_sta"
    if name is None:
        if not source.text.strip():
            raise DataError(f"{source.path} has no annotations")
        known = ", ".join(get_args(AnnotationFormat)[1:])
        raise DataError(
            f"{source.path}: none of the known formats ({known}): see docs/data.md, or name its format"
        )
    return name


def _first_video(source: Source) -> tuple[str, dict[str, Any]] | None:
    """(video, its object), if the file is one JSON object of such; None: its lines are objects."""
    first_line = next(line for _, line in source.lines())
    try:
        tree = source.json()
    except DataError:
        if first_line.rstrip().endswith("}"):
            return None
        raise
    values = list(tree.items())
    return values[0] if values and all(isinstance(value, dict) for value in tree.values()) else None
