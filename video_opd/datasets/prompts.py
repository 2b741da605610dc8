"""Annotation files -> prompts."""

import math
from dataclasses import dataclass

from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets.annotation import ODD, Annotation, fit
from video_opd.datasets.formats import read_annotations, resolve
from video_opd.datasets.videos import VideoFolder, video_id
from video_opd.errors import ClipError, DataError
from video_opd.types import Clip, Prompt, Span
from video_opd.video.clips import plan_clip


@dataclass(frozen=True)
class Split:
    """An annotated split as a run sees it."""

    prompts: list[Prompt]
    unreadable: dict[str, str]  # prompt id: why its clip cannot be read; only with data.train.unreadable=drop


def read_prompts(
    dataset: DatasetConfig, video: VideoConfig, multiple: int, as_published: bool = False
) -> list[Prompt]:
    """The prompts of read_split."""
    return read_split(dataset, video, multiple, as_published).prompts


def read_split(
    dataset: DatasetConfig, video: VideoConfig, multiple: int, as_published: bool = False
) -> Split:
    """Reads a split of any format in file order; opens each clip once. `multiple`: see clips.plan_clip.

    `as_published`, for evaluation: intervals stay as they are, whatever clamp_s says, and may be ODD.

    Raises DataError for the first unreadable line and, at the end, for all bad intervals and queries;
    ClipError for the first unreadable video, whose prompts are left out instead with unreadable=drop.
    """
    dataset = resolve(dataset.model_copy(update={"clamp_s": 0.0}) if as_published else dataset)
    clips: dict[tuple[str, Span | None], Clip | ClipError] = {}
    prompts, unreadable, bad, folder = [], {}, [], VideoFolder(dataset.videos)
    for annotation in read_annotations(dataset):
        path = folder.find(annotation.video, annotation.where)
        key = (str(path), annotation.cut_s)
        if key not in clips:
            try:
                clips[key] = plan_clip(_clip_id(annotation), path, video, multiple, annotation.cut_s)
            except ClipError as error:
                if dataset.unreadable == "error":
                    raise ClipError(f"{annotation.where}: {error}", error.kind) from error
                clips[key] = error
        clip = clips[key]
        if isinstance(clip, ClipError):
            unreadable[annotation.prompt_id] = str(clip)
            continue
        frame_s = 0.0 if as_published else 1.0 / clip.video_fps
        spans, faults = fit(annotation, clip.duration_s, frame_s, dataset.clamp_s)
        bad += [f"{annotation.where}: {f.reason}" for f in faults if not (as_published and f.kind in ODD)]
        about = {"prompt_id": annotation.prompt_id, "query": annotation.query}
        prompts.append(Prompt(**about, clip=clip, answer_spans_s=spans))
        if len(prompts) == dataset.max_prompts:
            break
    if not prompts:
        why = f": the videos of all {len(unreadable)} cannot be read" if unreadable else ""
        raise DataError(f"{dataset.annotations} has no annotations{why}")
    if bad:
        more = f" ({len(bad)} such lines in all, also {'; '.join(bad[1:3])})" if bad[1:] else ""
        raise DataError(f"{bad[0]}{more}")
    return Split(prompts, unreadable)


def _clip_id(annotation: Annotation) -> str:
    """Raises DataError if the cut is not an interval."""
    name = video_id(annotation.video)
    if annotation.cut_s is None:
        return name
    start, end = annotation.cut_s
    if not 0 <= start < end < math.inf:
        raise DataError(f"{annotation.where}: the cut {start} to {end} is not part of a video: correct it")
    return f"{name}@{start:g}-{end:g}"
