"""Finds faults in annotations and their videos; writes the annotations without faults as a manifest."""

import csv
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets.annotation import Annotation, Fault, fit
from video_opd.datasets.formats import read_annotations, resolve
from video_opd.datasets.manifest import manifest_row, write_manifest
from video_opd.datasets.videos import find_video, video_id
from video_opd.errors import ClipError, DataError, FailureKind
from video_opd.types import Clip
from video_opd.video.clips import plan_clip

TOLERANCE_S = 1.0  # annotated durations are often whole seconds
FPS_TOLERANCE = 0.01  # as a share: 29.97 is written as 30
Checked = tuple[Annotation, list[Fault]]
LEFT_OUT = ("source", "prompt_id", "kind", "reason")  # columns of the list
MADE_BY = ("format", "cleaning", "round_s", "annotators", "cuts", "clamp_s")  # options kept in the manifest


def check(dataset: DatasetConfig, tolerance_s: float = TOLERANCE_S) -> Iterator[Checked]:
    """Every annotation as a manifest holds it, in file order, and its faults. Each video is opened once.

    `tolerance_s`: how much durations may differ from the file's. Raises DataError for an unreadable file.
    """
    if not Path(dataset.videos).is_dir():
        raise DataError(f"the folder of videos {dataset.videos} does not exist: check the path")
    dataset = resolve(dataset)
    files: dict[Path, Clip | Fault] = {}
    seen: dict[tuple, str] = {}
    for annotation in read_annotations(dataset):
        path = find_video(dataset.videos, annotation.video, annotation.where)
        if path not in files:
            try:  # frame rate and duration depend neither on the config nor on the multiple
                files[path] = plan_clip(path.stem, path, VideoConfig(), 32)
            except ClipError as error:
                missing = error.kind == FailureKind.MISSING
                files[path] = Fault("missing_video" if missing else "unreadable_video", str(error))
        annotation = replace(annotation, video=path.relative_to(dataset.videos).as_posix())
        annotation, faults = _compare(annotation, files[path], dataset.clamp_s, tolerance_s)
        key = (annotation.video, annotation.cut_s, annotation.query, annotation.spans_s)
        if key in seen:
            faults.append(Fault("duplicate", f"the same as {seen[key]}: remove one of them"))
        elif not faults:
            seen[key] = annotation.where
        yield annotation, faults


def _compare(annotation: Annotation, file: Clip | Fault, clamp_s: float, tolerance_s: float) -> Checked:
    """The annotation within the file's bounds, and all its faults except duplicates."""
    if isinstance(file, Fault):
        spans, faults = fit(annotation, math.inf, 0.0, clamp_s)
        return replace(annotation, spans_s=spans), [file, *faults]
    start, end = annotation.cut_s or (0.0, file.duration_s)
    if not 0 <= start < end <= file.duration_s + tolerance_s:
        reason = f"{start} to {end} s is not part of the file's {file.duration_s:.2f} s"
        advice = "correct it, or use cuts=ignore if the file is that part already"
        return annotation, [Fault("bad_cut", f"{reason}: {advice}")]
    end = min(end, file.duration_s)
    spans, faults = fit(annotation, end - start, 1.0 / file.video_fps, clamp_s)
    annotation = replace(annotation, spans_s=spans, cut_s=annotation.cut_s and (start, end))
    return annotation, _duration_faults(annotation, end - start, file.video_fps, tolerance_s) + faults


def _duration_faults(annotation: Annotation, clip_s: float, fps: float, tolerance_s: float) -> list[Fault]:
    """Frames counted at a wrong rate make all times wrong; otherwise the file is not the annotated one."""
    stated, name = annotation.duration_s, f"video {video_id(annotation.video)}"
    if stated is None or abs(stated - clip_s) <= tolerance_s:
        return []
    if annotation.fps is not None and abs(annotation.fps / fps - 1.0) > FPS_TOLERANCE:
        rates = f"frames are counted at {annotation.fps:g} a second, {name} has {fps:g}"
        differ = f"{stated:.2f} s are not its {clip_s:.2f} s"
        return [Fault("wrong_fps", f"{rates}, and {differ}: correct fps and num_frames")]
    lengths = f"the annotations say {stated:.2f} s, the file of {name} has {clip_s:.2f} s"
    return [Fault("duration_differs", f"{lengths}: find the right file, or allow a tolerance")]


def convert(dataset: DatasetConfig, output: Path, tolerance_s: float) -> tuple[int, Counter[str], Path]:
    """Writes `output` (Parquet) and NAME.left_out.csv beside it: the annotations with faults, and the faults.

    Returns the number of rows, the counts of left out annotations by their first fault's kind, and the list's
    path. Each file appears whole or not at all. Raises DataError, also if no annotation is left.
    """
    if output.resolve() == Path(dataset.annotations).resolve():
        raise DataError(f"{output} is the annotation file itself: name another output")
    dataset = resolve(dataset)
    rows, left_out, counts, first = [], [], Counter(), ""
    for annotation, faults in check(dataset, tolerance_s):
        place = annotation.where.removeprefix(dataset.annotations)
        source = Path(dataset.annotations).name + place  # no path of a machine
        left_out += [(source, annotation.prompt_id, *fault) for fault in faults]
        if not faults:
            rows.append(manifest_row(annotation, source))
            continue
        counts[faults[0].kind] += 1
        first = first or f"{annotation.where}: {faults[0].reason}"
    if not rows:
        why = f": {counts.total()} are left out, first {first}" if first else ""
        raise DataError(f"{dataset.annotations} has no annotations to convert{why}")
    list_path = output.with_name(f"{output.stem}.left_out.csv")
    temporary = list_path.with_name(list_path.name + ".tmp")
    made_by = dataset.model_dump(include=set(MADE_BY), exclude_none=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([LEFT_OUT, *left_out])
        temporary.rename(list_path)
        write_manifest(rows, output, {key: str(value) for key, value in made_by.items()})
    except OSError as error:
        raise DataError(f"{output} cannot be written ({error.strerror}): name another output") from error
    return len(rows), counts, list_path
