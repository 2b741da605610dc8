"""Finds faults in annotations and their videos; writes the annotations without faults as a manifest."""

import csv
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.datasets.annotation import DUST_S, Annotation, Fault, fit, round_up
from video_opd.datasets.formats import FORMATS, read_annotations, resolve
from video_opd.datasets.manifest import manifest_row, write_manifest
from video_opd.datasets.videos import VideoFolder, video_id
from video_opd.errors import ClipError, DataError, FailureKind
from video_opd.types import Clip, Span
from video_opd.video.clips import describe_video, plan_clip, read_frames
from video_opd.video.video_file import VideoInfo

TOLERANCE_S = 1.0  # annotated durations are often whole seconds
FPS_TOLERANCE = 0.01  # as a share: 29.97 is written as 30
NUM_PAIRS = 3  # of frames that Read "some" decodes: the first, the middle and the last two
LATE_S = 0.25  # as sound before the first picture is no more than the coding of sound
NOTES = {"hidden_pictures", "late_picture"}  # kinds that tell of a video and are no faults of annotations
Checked = tuple[Annotation, list[Fault]]
Read = Literal["some", "all", "none"]
LEFT_OUT = ("source", "prompt_id", "kind", "reason")  # columns of the list
# Options that the manifest keeps.
MADE_BY = ("format", "cleaning", "round_s", "annotators", "cuts", "query_pattern", "clamp_s")


class File(NamedTuple):
    """What a video's file says."""

    duration_s: float
    fps: float
    notes: list[Fault]


class Asked(NamedTuple):
    """How to check: what durations may differ by, how videos are decoded, and how many of their pictures."""

    tolerance_s: float = TOLERANCE_S
    video: VideoConfig = VideoConfig()
    read: Read = "some"


DEFAULT = Asked()


def check(dataset: DatasetConfig, asked: Asked = DEFAULT) -> Iterator[Checked]:
    """Every annotation as a manifest holds it, in file order, its faults and what is noted of its video.

    Each video is opened once and its pictures are decoded, several videos at once, with a progress bar on a
    terminal. Raises DataError for an unreadable file of annotations.
    """
    if not Path(dataset.videos).is_dir():
        raise DataError(f"the folder of videos {dataset.videos} does not exist: check the path")
    dataset = resolve(dataset)
    folder = VideoFolder(dataset.videos)
    found = [(a, folder.find(a.video, a.where)) for a in read_annotations(dataset)]
    files = _read_files(dict.fromkeys(path for _, path in found), asked)
    seen: dict[tuple, str] = {}
    for annotation, path in found:
        annotation = replace(annotation, video=path.relative_to(dataset.videos).as_posix())
        annotation, faults = _compare(annotation, files[path], dataset, asked.tolerance_s)
        cut = annotation.cut_s and _to_ms([annotation.cut_s])
        key = (annotation.video, cut, annotation.query, _to_ms(annotation.spans_s))
        if key in seen:
            faults.append(Fault("duplicate", f"the same as {seen[key]}: remove one of them"))
        elif not faults:
            seen[key] = annotation.where
        file = files[path]
        yield annotation, faults + (file.notes if isinstance(file, File) else [])


def _to_ms(spans: Iterable[Span] | None) -> tuple[Span, ...] | None:
    """Times to compare."""
    return None if spans is None else tuple((round(start, 3), round(end, 3)) for start, end in spans)


def _read_files(paths: Collection[Path], asked: Asked) -> dict[Path, File | Fault]:
    console = Console(stderr=True)
    with ThreadPoolExecutor(asked.video.decode_workers) as pool:
        files = pool.map(partial(_read_file, asked=asked), paths)
        shown = {"console": console, "transient": True, "disable": not console.is_terminal}
        return dict(zip(paths, track(files, "videos", len(paths), **shown), strict=True))


def _read_file(path: Path, asked: Asked) -> File | Fault:
    """Opens a video and decodes what is asked of the frames that a run with video's other defaults sees."""
    try:
        info = describe_video(path, asked.video)
        clip = plan_clip(path.stem, path, asked.video, 32, info=info)  # any multiple does
        if asked.read != "none":
            read_frames(clip if asked.read == "all" else _some_frames(clip), asked.video)
    except ClipError as error:
        missing = error.kind == FailureKind.MISSING
        return Fault("missing_video" if missing else "unreadable_video", str(error))
    return File(clip.duration_s, clip.video_fps, list(_notes(info, clip)))


def _notes(info: VideoInfo, clip: Clip) -> Iterator[Fault]:
    """Where annotators may have seen other pictures at a time."""
    name = f"video {Path(clip.video_path).name}"
    if info.num_hidden:
        hidden = f"{name} has {info.num_hidden} pictures before the first that is shown"
        yield Fault("hidden_pictures", f"{hidden}: times count from the one that is shown")
    if info.late_s > LATE_S:
        late = f"{name} shows its first picture {info.late_s:.2f} s after the file begins"
        yield Fault("late_picture", f"{late}: times count from the picture")


def _some_frames(clip: Clip) -> Clip:
    """The clip with the two frames at its start, middle and end."""
    pairs = np.linspace(0, len(clip.frame_indices) // 2 - 1, NUM_PAIRS).astype(int)
    chosen = np.unique([2 * pairs, 2 * pairs + 1])
    times = None if clip.frame_times_s is None else clip.frame_times_s[chosen]
    return replace(clip, frame_indices=clip.frame_indices[chosen], frame_times_s=times)


def _compare(annotation: Annotation, file: File | Fault, dataset: DatasetConfig, allowed_s: float) -> Checked:
    """The annotation within the file's bounds, and all its faults except duplicates."""
    if isinstance(file, Fault):
        spans, faults = fit(annotation, math.inf, 0.0, dataset.clamp_s)
        return replace(annotation, spans_s=spans), [file, *faults]
    form = FORMATS.get(dataset.format)
    start, end = annotation.cut_s or (0.0, file.duration_s)
    last = file.duration_s + max(allowed_s, form.clamp_s if form else 0.0) + DUST_S
    if not (0 <= start < end <= last and start < file.duration_s):
        reason = f"{start} to {end} s is not part of the file's {file.duration_s:.2f} s: correct it"
        also = ", or use cuts=ignore if the file is that part already" if form and form.cut else ""
        return annotation, [Fault("bad_cut", reason + also)]
    end = min(end, file.duration_s)
    spans, faults = fit(annotation, end - start, 1.0 / file.fps, dataset.clamp_s)
    annotation = replace(annotation, spans_s=spans, cut_s=annotation.cut_s and (start, end))
    return annotation, _duration_faults(annotation, end - start, file.fps, allowed_s) + faults


def _duration_faults(annotation: Annotation, clip_s: float, fps: float, tolerance_s: float) -> list[Fault]:
    """Frames counted at a wrong rate make all times wrong; otherwise the file is not the annotated one."""
    stated, name = annotation.duration_s, f"video {video_id(annotation.video)}"
    if stated is None or abs(stated - clip_s) <= tolerance_s + DUST_S:
        return []
    if annotation.fps is not None and abs(annotation.fps / fps - 1.0) > FPS_TOLERANCE:
        rates = f"frames are counted at {annotation.fps:g} a second, {name} has {fps:g}"
        differ = f"{stated:.2f} s are not its {clip_s:.2f} s"
        return [Fault("wrong_fps", f"{rates}, and {differ}: correct fps and num_frames")]
    lengths = f"the annotations say {stated:.2f} s, the file of {name} has {clip_s:.2f} s"
    advice = f"find the right file, or allow --tolerance-s {round_up(abs(stated - clip_s))} or more"
    return [Fault("duration_differs", f"{lengths}: {advice}")]


def convert(dataset: DatasetConfig, output: Path, asked: Asked = DEFAULT) -> tuple[int, Counter[str], Path]:
    """Writes `output` (Parquet) and NAME.left_out.csv beside it: the annotations with faults, and the faults.

    Returns the number of rows, the counts of left out annotations by their first fault's kind, and the list's
    path. Each file appears whole or not at all. Raises DataError, also if no annotation is left.
    """
    if output.resolve() == Path(dataset.annotations).resolve():
        raise DataError(f"{output} is the annotation file itself: name another output")
    dataset = resolve(dataset)
    rows, left_out, counts, first = [], [], Counter(), ""
    for annotation, found in check(dataset, asked):
        faults = [fault for fault in found if fault.kind not in NOTES]
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
