"""Every annotation format: how it is read, and what its codebase does to queries and times."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from video_opd.config_data import DatasetConfig
from video_opd.datasets import fields
from video_opd.datasets.annotation import Annotation
from video_opd.datasets.detect import detect
from video_opd.datasets.manifest import is_manifest, read_manifest
from video_opd.datasets.source import Source, read_source
from video_opd.datasets.videos import holds_cut, video_id
from video_opd.errors import ConfigError, DataError
from video_opd.types import Span

CHUNK_S = 5.0  # of DiDeMo
_LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>\S+)\s+(?P<end>\S+?)##(?P<sentence>.+)")


def _annotation(
    where: str, number: int | str, video: Any, query: Any, spans: tuple[Span, ...] | None, **more: Any
) -> Annotation:
    name = fields.text(video, "the video", where)
    return Annotation(
        where=where,
        prompt_id=f"{video_id(name)}:{number}",
        video=name,
        query=fields.text(query, "the query", where),
        spans_s=spans,
        **more,
    )


def _charades_sta(dataset: DatasetConfig) -> Iterator[Annotation]:
    if dataset.lengths is None:
        raise DataError(
            f"{dataset.annotations}: charades_sta needs the csv of the videos' lengths: name it in lengths"
        )
    lengths = _read_lengths(read_source(dataset.lengths))
    for number, line in read_source(dataset.annotations).lines():
        where = f"{dataset.annotations}:{number}"
        video, start, end, sentence = _parse_line(line, where)
        if video not in lengths:
            raise DataError(f"{where}: video {video} has no length in {dataset.lengths}: add it there")
        yield _annotation(where, number, video, sentence, ((start, end),), duration_s=lengths[video])


def _read_lengths(source: Source) -> dict[str, float]:
    try:
        rows = csv.DictReader(io.StringIO(source.text, newline=""))
        lengths = {row["id"]: float(row["length"]) for row in rows}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError(
            f"{source.path}: needs the columns id and length, length a number of seconds ({error!r})"
        ) from error
    bad = [
        f"{video}: {length}"
        for video, length in lengths.items()
        if not (math.isfinite(length) and length > 0)
    ]
    if bad:
        named = ", ".join(bad[:3])
        raise DataError(
            f"{source.path}: {len(bad)} lengths are not positive numbers of seconds ({named}): correct them"
        )
    return lengths


def _parse_line(line: str, where: str) -> tuple[str, float, float, str]:
    match = _LINE.fullmatch(line.strip())
    try:
        if match is None:
            raise ValueError
        return match["video"], float(match["start"]), float(match["end"]), match["sentence"]
    except ValueError:
        raise DataError(f"{where}: expected 'VIDEO_ID start end##sentence', found {line[:80]!r}") from None


def _by_video(
    spans_key: str, queries_key: str, in_frames: bool = False
) -> Callable[[DatasetConfig], Iterator[Annotation]]:
    """{video: {duration, spans, queries}}, one span a query, under the keys given. `in_frames`: {fps, num_frames, ...} instead."""

    def read(dataset: DatasetConfig) -> Iterator[Annotation]:
        number = 0
        for video, record in read_source(dataset.annotations).videos():
            place = f"{dataset.annotations}: video {video}"
            fps = fields.positive(fields.get(record, "fps", place), "fps", place) if in_frames else None
            duration = fields.duration(record, place)
            if fps is not None:
                duration = fields.positive(fields.get(record, "num_frames", place), "num_frames", place) / fps
            queries, spans = fields.get(record, queries_key, place), fields.get(record, spans_key, place)
            for query, span in fields.same_number(queries, spans, (queries_key, spans_key), place):
                number += 1
                where = f"{place}, query {number}"
                start, end = (t / (fps or 1.0) for t in fields.pair(span, spans_key, where))
                yield _annotation(where, number, video, query, ((start, end),), duration_s=duration, fps=fps)

    return read


def _qvhighlights(dataset: DatasetConfig) -> Iterator[Annotation]:
    for where, number, record in read_source(dataset.annotations).records():
        windows = record.get("relevant_windows")  # the test split has none
        spans = None if windows is None else fields.pairs(windows, "relevant_windows", where)
        video, query = fields.get(record, "vid", where), fields.get(record, "query", where)
        yield _annotation(where, number, video, query, spans, duration_s=fields.duration(record, where))


def _timelens_100k(dataset: DatasetConfig) -> Iterator[Annotation]:
    for where, number, record in read_source(dataset.annotations).records():
        video, events = fields.get(record, "video_path", where), fields.get(record, "events", where)
        duration = fields.duration(record, where)
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise DataError(
                f"{where}: events must be a list of objects with query and span, found {str(events)[:60]!r}"
            )
        for place, event in enumerate(events, 1):
            at = f"{where}, event {place}"
            spans = fields.pairs(fields.get(event, "span", at), "span", at)
            yield _annotation(
                at, f"{number}.{place}", video, fields.get(event, "query", at), spans, duration_s=duration
            )


def _videomind(dataset: DatasetConfig) -> Iterator[Annotation]:
    for where, number, record in read_source(dataset.annotations).records():
        video = record["video_path"] if "video_path" in record else fields.get(record, "vid", where)
        spans = fields.pairs(fields.get(record, "span", where), "span", where)
        query = fields.get(record, "query", where)
        yield _annotation(where, number, video, query, spans, duration_s=fields.duration(record, where))


def _time_r1(dataset: DatasetConfig) -> Iterator[Annotation]:
    for where, number, record in read_source(dataset.annotations).records():
        video, query = fields.get(record, "video", where), fields.get(record, "sentence", where)
        spans = (fields.pair(fields.get(record, "timestamp", where), "timestamp", where),)
        cut = _cut(record, "video_start", "video_end", video, dataset, where)
        yield _annotation(
            where, number, video, query, spans, duration_s=fields.duration(record, where), cut_s=cut
        )


def _tvgbench(dataset: DatasetConfig) -> Iterator[Annotation]:
    for where, number, record in read_source(dataset.annotations).records():
        video, query = fields.get(record, "path", where), fields.get(record, "question", where)
        answer = fields.text(fields.get(record, "answer", where), "answer", where)
        start, _, end = answer.rpartition("-")
        try:
            spans = ((float(start), float(end)),)
        except ValueError:
            raise DataError(
                f"{where}: answer must be like '13.4-28.1', in seconds, found {answer[:60]!r}"
            ) from None
        cut = _cut(record, "start", "end", video, dataset, where)
        yield _annotation(
            where, number, video, query, spans, duration_s=fields.duration(record, where), cut_s=cut
        )


def _cut(
    record: dict[str, Any], start: str, end: str, video: Any, dataset: DatasetConfig, where: str
) -> Span | None:
    """The part of the file that is the clip. A file whose name holds the cut's times is that part already."""
    bounds = record.get(start), record.get(end)
    if dataset.cuts == "ignore" or bounds == (None, None) or holds_cut(str(video)):
        return None
    return fields.number(bounds[0], start, where), fields.number(bounds[1], end, where)


def _didemo(dataset: DatasetConfig) -> Iterator[Annotation]:
    for where, number, record in read_source(dataset.annotations).records():
        times = fields.get(record, "times", where)
        chunks = fields.pairs(times, "times", where)
        if not chunks or not all(float(chunk).is_integer() for of_one in chunks for chunk in of_one):
            raise DataError(
                f"{where}: times must be pairs of chunk numbers, one pair an annotator, found {str(times)[:60]!r}"
            )
        spans = tuple((a * CHUNK_S, (b + 1) * CHUNK_S) for a, b in _agreed(chunks, dataset.annotators))
        video, query = fields.get(record, "video", where), fields.get(record, "description", where)
        yield _annotation(where, number, video, query, spans)


def _agreed(chunks: tuple[Span, ...], annotators: str | None) -> tuple[Span, ...]:
    """What several annotators' (first, last) chunks count as. `majority`: the most frequent pair, the earliest of equals."""
    if annotators == "mean":
        return (
            (sum(first for first, _ in chunks) / len(chunks), sum(last for _, last in chunks) / len(chunks)),
        )
    if annotators == "all":
        return tuple(dict.fromkeys(chunks))
    return (chunks[0] if annotators == "first" else Counter(chunks).most_common(1)[0][0],)


def _manifest(dataset: DatasetConfig) -> Iterator[Annotation]:
    yield from read_manifest(dataset.annotations)


@dataclass(frozen=True)
class Format:
    """How a layout is read. The defaults are those of the codebase it comes from."""

    read: Callable[[DatasetConfig], Iterator[Annotation]]
    cleaning: str = "parse_query"
    round_s: float = 0.0  # spans are rounded to multiples of it; 0: as they are
    clamp_s: float = 0.0  # a span may pass the clip's end by so much, by the format's own definition
    options: tuple[str, ...] = ("cleaning", "round_s")  # of DatasetConfig, beside those that all formats take


FORMATS = {
    "charades_sta": Format(_charades_sta, cleaning="strip", options=("cleaning", "round_s", "lengths")),
    "charades_json": Format(_by_video("timestamps", "sentences"), cleaning="strip"),
    "activitynet": Format(_by_video("timestamps", "sentences"), cleaning="strip"),
    "qvhighlights": Format(_qvhighlights, cleaning="as_written"),
    "timelens_bench": Format(_by_video("spans", "queries")),
    "timelens_100k": Format(_timelens_100k),
    "time_r1": Format(_time_r1, cleaning="time_r1", options=("cleaning", "round_s", "cuts")),
    "tvgbench": Format(_tvgbench, cleaning="as_written", options=("cleaning", "round_s", "cuts")),
    "didemo": Format(_didemo, round_s=1.0, clamp_s=CHUNK_S, options=("cleaning", "round_s", "annotators")),
    "tacos": Format(_by_video("timestamps", "sentences", in_frames=True), cleaning="strip"),
    "videomind": Format(_videomind),
    "manifest": Format(_manifest, cleaning="as_written", options=()),
}
"""The keys are config.AnnotationFormat's values, `auto` aside."""

DEFAULTS = {"annotators": "mean", "cuts": "apply"}


def resolve(dataset: DatasetConfig) -> DatasetConfig:
    """The same with the format detected and, for all that the format takes, its default where nothing is asked.

    Raises DataError for a file of no format, ConfigError for an option that does nothing for the format.
    """
    name = dataset.format
    if name == "auto":
        name = "manifest" if is_manifest(dataset.annotations) else detect(read_source(dataset.annotations))
    form = FORMATS[name]
    asked = [
        option
        for option in ("lengths", *DEFAULTS, "cleaning", "round_s")
        if getattr(dataset, option) is not None
    ]
    if unused := [option for option in asked if option not in form.options]:
        raise ConfigError(
            f"{dataset.annotations}: {', '.join(unused)} would do nothing for format {name}: leave it out"
        )
    defaults = {"cleaning": form.cleaning, "round_s": form.round_s, **DEFAULTS}
    chosen = {key: value for key, value in defaults.items() if key in form.options and key not in asked}
    return dataset.model_copy(
        update={"format": name, "clamp_s": max(dataset.clamp_s, form.clamp_s), **chosen}
    )


def read_annotations(dataset: DatasetConfig) -> Iterator[Annotation]:
    """The annotations of a resolved dataset in the order of the file: queries cleaned, times in seconds and rounded.

    Raises DataError at the first annotation that cannot be read.
    """
    clean, unit_s = fields.CLEANINGS[dataset.cleaning or "as_written"], dataset.round_s or 0.0
    for annotation in FORMATS[dataset.format].read(dataset):
        spans = annotation.spans_s
        rounded = None if spans is None else tuple(fields.rounded(span, unit_s) for span in spans)
        yield replace(annotation, query=clean(annotation.query), spans_s=rounded)
