"""Annotation files -> prompts."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from video_opd.config_data import DataConfig, DatasetConfig, VideoConfig
from video_opd.datasets.annotation import ODD, Annotation, fit
from video_opd.datasets.formats import read_annotations, resolve
from video_opd.datasets.videos import VideoFolder, video_id
from video_opd.errors import ClipError, DataError
from video_opd.types import Clip, FailedPrompt, Prompt, Span
from video_opd.video.clips import plan_clip
from video_opd.video.descriptions import describe_all
from video_opd.video.video_file import VideoInfo


@dataclass(frozen=True)
class Split:
    """An annotated split. Its places and its key are those of the annotations, whatever can be used today."""

    pool: list[Prompt | FailedPrompt]  # one for each annotation, in file order
    key: str  # digest of prompt ids and true intervals

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, place: int) -> Prompt:
        """The prompt at a place of the pool that can be used."""
        prompt = self.pool[place]
        assert isinstance(prompt, Prompt), f"{prompt} cannot be used"
        return prompt

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Those that can be used."""
        return [p for p in self.pool if isinstance(p, Prompt)]

    @cached_property
    def failed(self) -> dict[str, str]:
        """Prompt id of every other: why it cannot."""
        return {p.prompt_id: p.reason for p in self.pool if isinstance(p, FailedPrompt)}

    def without(self, failed: Mapping[str, str]) -> "Split":
        """The same split, in which these prompts cannot be used: prompt id -> reason."""
        pool = [
            FailedPrompt(prompt_id=p.prompt_id, reason=failed[p.prompt_id]) if p.prompt_id in failed else p
            for p in self.pool
        ]
        return Split(pool, self.key)


def read_prompts(
    dataset: DatasetConfig,
    video: VideoConfig,
    multiple: int,
    as_published: bool = False,
    runs_dir: str | None = None,
) -> list[Prompt]:
    """The prompts of read_split that can be used."""
    return read_split(dataset, video, multiple, as_published, runs_dir).prompts


def read_sources(
    data: DataConfig, video: VideoConfig, multiple: int, runs_dir: str | None = None, drops: bool = False
) -> Split:
    """data.train: one split, or the union of its sources, in their order. Raises as read_split.

    Of several, an id is SOURCE/VIDEO_ID:NUMBER. drops: unreadable=drop, whatever the sources say.
    """
    choice = {"unreadable": "drop"} if drops else {}
    splits = {
        name: read_split(source.model_copy(update=choice), video, multiple, runs_dir=runs_dir)
        for name, source in data.sources.items()
    }
    if "" in splits:
        return splits[""]
    pool = [_of_source(p, name, data.styles[name]) for name, split in splits.items() for p in split.pool]
    key = repr([(name, split.key) for name, split in splits.items()])
    return Split(pool, hashlib.blake2b(key.encode(), digest_size=16).hexdigest())


def _of_source(prompt: Prompt | FailedPrompt, name: str, style: str | None) -> Prompt | FailedPrompt:
    prompt_id = f"{name}/{prompt.prompt_id}"
    if isinstance(prompt, FailedPrompt):
        return replace(prompt, prompt_id=prompt_id)
    return replace(prompt, prompt_id=prompt_id, source=name, style=style)


def read_split(
    dataset: DatasetConfig,
    video: VideoConfig,
    multiple: int,
    as_published: bool = False,
    runs_dir: str | None = None,
) -> Split:
    """Reads a split of any format in file order. `multiple`: see clips.plan_clip.

    as_published, for evaluation: true intervals are as annotated, whatever clamp_s says, and may be ODD.
    runs_dir: keeps what the videos hold, so that they are opened once.
    Raises DataError for an unreadable line or a fault, ClipError for an unreadable video. With faulty=drop,
    unreadable=drop they take the place of their prompts instead.
    """
    dataset = resolve(dataset.model_copy(update={"clamp_s": 0.0}) if as_published else dataset)
    annotations = list(islice(read_annotations(dataset), dataset.max_prompts))
    if not annotations:
        raise DataError(f"{dataset.annotations} has no annotations")
    path_of = {a.video: a.where for a in reversed(annotations)}  # the first line that names the video
    folder = VideoFolder(dataset.videos)
    path_of = {name: str(folder.find(name, where)) for name, where in path_of.items()}
    infos = describe_all(dict.fromkeys(path_of.values()), video, runs_dir)
    clips: dict[tuple[str, Span | None], Clip | ClipError] = {}
    pool, unreadable, faulty = [], [], []
    for annotation in annotations:
        where, name, path = annotation.where, annotation.prompt_id, path_of[annotation.video]
        key = path, annotation.cut_s
        if key not in clips:
            clips[key] = _plan(annotation, path, infos[path], video, multiple)
        clip = clips[key]
        if isinstance(clip, ClipError):
            unreadable.append((where, clip))
            pool.append(FailedPrompt(prompt_id=name, reason=str(clip), kind=clip.kind))
            continue
        spans, reason = _truth(annotation, clip, dataset, as_published)
        if reason:
            faulty.append(f"{where}: {reason}")
            pool.append(FailedPrompt(prompt_id=name, reason=reason))
        else:
            pool.append(Prompt(prompt_id=name, clip=clip, query=annotation.query, answer_spans_s=spans))
    if unreadable and dataset.unreadable == "error":
        where, error = unreadable[0]
        lines = [f"{where}: {error}" for where, error in unreadable]
        raise ClipError(_several(lines, "check` lists them"), error.kind)
    if faulty and (dataset.faulty == "error" or as_published):
        raise DataError(_several(faulty, "convert` leaves them out"))
    if len(failed := [p for p in pool if isinstance(p, FailedPrompt)]) == len(pool):
        why = f"{failed[0].prompt_id}: {failed[0].reason}"
        raise DataError(f"{dataset.annotations}: none of its {len(pool)} prompts can be used, first {why}")
    return Split(pool, _digest(annotations, dataset.clamp_s))


def _several(lines: list[str], advice: str) -> str:
    """The first of them, the number of all, and how to go on."""
    such = f"{len(lines)} such lines in all, also {'; '.join(lines[1:3])}; " if lines[1:] else ""
    return f"{lines[0]} ({such}`python -m video_opd.datasets {advice})"


def _plan(
    annotation: Annotation, path: str, info: VideoInfo | ClipError, video: VideoConfig, multiple: int
) -> Clip | ClipError:
    """Raises DataError if the cut is not an interval."""
    name, cut_s = video_id(annotation.video), annotation.cut_s
    if cut_s is not None:
        start, end = cut_s
        if not 0 <= start < end < math.inf:
            raise DataError(
                f"{annotation.where}: the cut {start} to {end} is not part of a video: correct it"
            )
        name = f"{name}@{start:g}-{end:g}"
    if isinstance(info, ClipError):
        return info
    try:
        return plan_clip(name, path, video, multiple, cut_s, info)
    except ClipError as error:
        return error


def _truth(
    annotation: Annotation, clip: Clip, dataset: DatasetConfig, as_published: bool
) -> tuple[tuple[Span, ...] | None, str]:
    """The true intervals, and the first fault of the annotation; empty: it has none."""
    frame_s = 0.0 if as_published else 1.0 / clip.video_fps
    spans, faults = fit(annotation, clip.duration_s, frame_s, dataset.clamp_s)
    bad = [fault.reason for fault in faults if not (as_published and fault.kind in ODD)]
    return spans, bad[0] if bad else ""


def _digest(annotations: list[Annotation], clamp_s: float) -> str:
    """Of what results on a split depend on beside its videos."""
    text = repr([(a.prompt_id, a.spans_s) for a in annotations]) + (f" {clamp_s}" if clamp_s else "")
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
