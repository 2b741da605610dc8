"""Finds faults in annotations and their videos."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets.annotation import Annotation, Fault, fit
from video_opd.datasets.formats import read_annotations, resolve
from video_opd.datasets.videos import find_video, video_id
from video_opd.errors import ClipError, DataError
from video_opd.video.clips import plan_clip

TOLERANCE_S = 1.0  # annotated durations are often whole seconds
FPS_TOLERANCE = 0.01  # as a share: 29.97 is written as 30


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFile:
    """Facts of a video's file."""

    duration_s: float
    fps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """An annotation as a manifest holds it, with all its faults."""

    annotation: Annotation  # video: a path below the folder; spans and cut are clamped within the allowances
    faults: tuple[Fault, ...]


def check(dataset: DatasetConfig, tolerance_s: float = TOLERANCE_S) -> Iterator[Checked]:
    """Every annotation in the order of its file; each video is opened once.

    `tolerance_s`: how much durations may differ from the file's. Raises DataError for an unreadable file.
    """
    if not Path(dataset.videos).is_dir():
        raise DataError(f"the folder of videos {dataset.videos} does not exist: check the path")
    dataset = resolve(dataset)
    files: dict[Path, VideoFile | Fault] = {}
    seen: dict[tuple, str] = {}
    for annotation in read_annotations(dataset):
        path = find_video(dataset.videos, annotation.video, annotation.where)
        if path not in files:
            files[path] = _open(path)
        annotation = replace(annotation, video=path.relative_to(dataset.videos).as_posix())
        annotation, faults = _compare(annotation, files[path], dataset.clamp_s, tolerance_s)
        key = (annotation.video, annotation.cut_s, annotation.query, annotation.spans_s)
        if key in seen:
            faults.append(Fault("duplicate", f"the same as {seen[key]}: remove one of them"))
        elif not faults:
            seen[key] = annotation.where
        yield Checked(annotation=annotation, faults=tuple(faults))


def _open(path: Path) -> VideoFile | Fault:
    if not path.exists():
        return Fault("missing_video", f"video {path} is missing: put it there, or leave its annotations out")
    try:
        clip = plan_clip(path.stem, path, VideoConfig(), 32)  # rate and number of frames depend on neither
    except ClipError as error:
        return Fault("unreadable_video", str(error))
    return VideoFile(duration_s=clip.num_video_frames / clip.video_fps, fps=clip.video_fps)


def _compare(
    annotation: Annotation, file: VideoFile | Fault, clamp_s: float, tolerance_s: float
) -> tuple[Annotation, list[Fault]]:
    """The annotation within the file's bounds, and all its faults except duplicates."""
    if isinstance(file, Fault):
        spans, faults = fit(annotation, math.inf, 0.0, clamp_s)
        return replace(annotation, spans_s=spans), [file, *faults]
    faults, clip_s = [], file.duration_s
    if annotation.cut_s is not None:
        start, end = annotation.cut_s
        if not 0 <= start < end <= file.duration_s + tolerance_s:
            reason = f"no part {start} to {end} s in {file.duration_s:.2f} s"
            advice = "correct it, or use cuts=ignore if the file is that part already"
            return annotation, [Fault("bad_cut", f"{reason}: {advice}")]
        annotation = replace(annotation, cut_s=(start, min(end, file.duration_s)))
        clip_s = min(end, file.duration_s) - start
    if annotation.duration_s is not None and abs(annotation.duration_s - clip_s) > tolerance_s:
        faults.append(_duration_fault(annotation, annotation.duration_s, clip_s, file))
    spans, of_spans = fit(annotation, clip_s, 1.0 / file.fps, clamp_s)
    return replace(annotation, spans_s=spans), faults + of_spans


def _duration_fault(annotation: Annotation, stated: float, clip_s: float, file: VideoFile) -> Fault:
    """Frames counted at a wrong rate make all times wrong; otherwise the file is not the annotated one."""
    name = f"video {video_id(annotation.video)}"
    if annotation.fps is not None and abs(annotation.fps / file.fps - 1.0) > FPS_TOLERANCE:
        rates = f"frames are counted at {annotation.fps:g} a second, {name} has {file.fps:g}"
        differ = f"{stated:.2f} s are not its {clip_s:.2f} s"
        return Fault("wrong_fps", f"{rates}, and {differ}: correct fps and num_frames")
    lengths = f"the annotations say {stated:.2f} s, the file of {name} has {clip_s:.2f} s"
    return Fault("duration_differs", f"{lengths}: find the right file, or allow a tolerance")
