"""Annotation files -> prompts."""

import csv
import math
import re
from pathlib import Path

from video_opd.clips import plan_clip
from video_opd.config import DatasetConfig, VideoConfig
from video_opd.errors import ClipError, DataError
from video_opd.types import Clip, Prompt

NAMED_IN_ERRORS = 3
_LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>\S+)\s+(?P<end>\S+?)##(?P<sentence>.+)")


def read_prompts(dataset: DatasetConfig, video: VideoConfig, multiple: int) -> list[Prompt]:
    """Reads a Charades-STA split: annotation txt, length csv, folder of mp4 files.

    `multiple`: see clips.plan_clip. Each video is opened once. Raises DataError or ClipError on the first line or video
    that cannot be read, and DataError for all intervals that cannot be, with their number and the first of them.
    """
    lengths = _read_lengths(Path(dataset.lengths))
    clips: dict[str, Clip] = {}
    prompts, bad_spans = [], []
    for number, line in enumerate(_read_text(Path(dataset.annotations)).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{dataset.annotations}:{number}"
        video_id, start, end, sentence = _parse_line(line, where)
        if video_id not in lengths:
            raise DataError(f"{where}: video {video_id} has no length in {dataset.lengths}: add it there")
        if video_id not in clips:
            try:
                clips[video_id] = plan_clip(video_id, Path(dataset.videos) / f"{video_id}.mp4", video, multiple)
            except ClipError as error:
                raise ClipError(f"{where}: {error}") from error
        clip = clips[video_id]
        length = min(lengths[video_id], clip.duration_s + 1.0 / clip.video_fps)  # the csv may say more than the file holds
        if length < end <= length + dataset.clamp_s:
            end = length
        if problem := _span_problem(start, end, length):
            bad_spans.append(f"{where}: {problem}")
        prompts.append(Prompt(prompt_id=f"{video_id}:{number}", clip=clip, query=sentence, answer_spans_s=((start, end),)))
        if len(prompts) == dataset.max_prompts:
            break
    if not prompts:
        raise DataError(f"{dataset.annotations} has no annotations")
    if bad_spans:
        more = f" ({len(bad_spans)} such lines in all, also {'; '.join(bad_spans[1:NAMED_IN_ERRORS])})" if bad_spans[1:] else ""
        raise DataError(f"{bad_spans[0]}{more}")
    return prompts


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): check the path in the config's data section") from error


def _read_lengths(path: Path) -> dict[str, float]:
    rows = list(csv.DictReader(_read_text(path).splitlines()))
    try:
        lengths = {row["id"]: float(row["length"]) for row in rows}
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: needs the columns id and length, length a number of seconds ({error!r})") from error
    bad = [f"{video}: {length}" for video, length in lengths.items() if not (math.isfinite(length) and length > 0)]
    if bad:
        raise DataError(f"{path}: {len(bad)} lengths are not positive numbers of seconds ({', '.join(bad[:3])}): correct them")
    return lengths


def _parse_line(line: str, where: str) -> tuple[str, float, float, str]:
    match = _LINE.fullmatch(line.strip())
    try:
        if match is None:
            raise ValueError
        return match["video"], float(match["start"]), float(match["end"]), match["sentence"].strip()
    except ValueError:
        raise DataError(f"{where}: expected 'VIDEO_ID start end##sentence', found {line[:80]!r}") from None


def _span_problem(start: float, end: float, length: float) -> str | None:
    """What is wrong with an annotated interval, and what to do; None: nothing."""
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end):
        return f"{start} to {end} is not an interval in seconds: correct it or remove the line"
    if end > length:
        over = f"allow data.*.clamp_s={end - length:.1f} or more"
        return f"the annotation ends at {end} s, its clip at {length} s: correct it, or {over}"
    return None
