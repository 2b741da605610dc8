"""Annotation files -> prompts."""

import math
from dataclasses import dataclass
from typing import Any

from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets.annotation import fit
from video_opd.datasets.formats import read_annotations, resolve
from video_opd.datasets.videos import find_video, video_id
from video_opd.errors import ClipError, DataError
from video_opd.types import Clip, Prompt, Span
from video_opd.video.clips import plan_clip

NAMED_IN_ERRORS = 3


@dataclass(frozen=True)
class Split:
    """An annotated split as a run sees it."""

    prompts: list[Prompt]
    unreadable: dict[
        str, str
    ]  # prompt id: why its clip cannot be read; none where data.*.unreadable is `error`


def read_prompts(dataset: DatasetConfig, video: VideoConfig, multiple: int) -> list[Prompt]:
    """The prompts of read_split."""
    return read_split(dataset, video, multiple).prompts


def read_split(dataset: DatasetConfig, video: VideoConfig, multiple: int) -> Split:
    """Reads an annotated split of any format, in the order of its file.

    `multiple`: see clips.plan_clip. Each clip is opened once. Raises DataError on the first line that cannot be read, ClipError
    on the first video that cannot be (with unreadable=drop its prompts are left out), and DataError for all intervals and
    queries that cannot be, with their number and the first of them.
    """
    dataset = resolve(dataset)
    clips: dict[tuple[str, Span | None], Clip | ClipError] = {}
    prompts, unreadable, bad = [], {}, []
    for annotation in read_annotations(dataset):
        path = find_video(dataset.videos, annotation.video, annotation.where)
        key = (str(path), annotation.cut_s)
        if key not in clips:
            _check_cut(annotation.cut_s, annotation.where)
            try:
                clips[key] = _plan(annotation.video, str(path), annotation.cut_s, video, multiple)
            except ClipError as error:
                if dataset.unreadable == "error":
                    raise ClipError(f"{annotation.where}: {error}", error.kind) from error
                clips[key] = error
        clip = clips[key]
        if isinstance(clip, ClipError):
            unreadable[annotation.prompt_id] = str(clip)
            continue
        spans, faults = fit(annotation, clip.duration_s, 1.0 / clip.video_fps, dataset.clamp_s)
        bad += [f"{annotation.where}: {fault.reason}" for fault in faults]
        prompts.append(
            Prompt(prompt_id=annotation.prompt_id, clip=clip, query=annotation.query, answer_spans_s=spans)
        )
        if len(prompts) == dataset.max_prompts:
            break
    if not prompts:
        why = f": the videos of all {len(unreadable)} cannot be read" if unreadable else ""
        raise DataError(f"{dataset.annotations} has no annotations{why}")
    if bad:
        more = f" ({len(bad)} such lines in all, also {'; '.join(bad[1:NAMED_IN_ERRORS])})" if bad[1:] else ""
        raise DataError(f"{bad[0]}{more}")
    return Split(prompts, unreadable)


def _check_cut(cut_s: Span | None, where: str) -> None:
    if cut_s is not None and not 0 <= cut_s[0] < cut_s[1] < math.inf:
        raise DataError(
            f"{where}: the cut {cut_s[0]} to {cut_s[1]} is no part of a video in seconds: correct it"
        )


def _plan(name: str, path: str, cut_s: Span | None, video: VideoConfig, multiple: int) -> Clip:
    if cut_s is None:
        return plan_clip(video_id(name), path, video, multiple)
    cut: dict[str, Any] = {"cut_s": cut_s}
    return plan_clip(f"{video_id(name)}@{cut_s[0]:g}-{cut_s[1]:g}", path, video, multiple, **cut)
