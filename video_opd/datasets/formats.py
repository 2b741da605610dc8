"""Every annotation format: how it is read, and what its codebase does to queries and times."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from video_opd.config_data import AnnotationFormat, DatasetConfig
from video_opd.datasets import fields
from video_opd.datasets.annotation import Annotation
from video_opd.datasets.manifest import is_manifest, read_manifest
from video_opd.datasets.source import Source, read_source
from video_opd.datasets.videos import holds_cut, video_id
from video_opd.errors import ConfigError, DataError
from video_opd.types import Span

CHUNK_S = 5.0  # of DiDeMo
_LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>\S+)\s+(?P<end>\S+?)##(?P<sentence>.+)")

Spans = tuple[Span, ...]
Reader = Callable[[DatasetConfig], Iterator[Annotation]]
SpanReader = Callable[[dict[str, Any], str, DatasetConfig], Spans | None]


def _annotation(
    where: str, number: int | str, video: Any, query: Any, spans: Spans | None, **more: Any
) -> Annotation:
    name, query = fields.text(video, "the video", where), fields.text(query, "the query", where)
    prompt_id = f"{video_id(name)}:{number}"
    return Annotation(where=where, prompt_id=prompt_id, video=name, query=query, spans_s=spans, **more)


def _charades_sta(dataset: DatasetConfig) -> Iterator[Annotation]:
    if dataset.lengths is None:
        needs = "charades_sta needs the csv of the videos' lengths"
        raise DataError(f"{dataset.annotations}: {needs}: name it in lengths")
    lengths = _read_lengths(read_source(dataset.lengths))
    for number, line in read_source(dataset.annotations).lines():
        where = f"{dataset.annotations}:{number}"
        video, span, sentence = _parse_line(line, where)
        if video not in lengths:
            raise DataError(f"{where}: video {video} has no length in {dataset.lengths}: add it there")
        yield _annotation(where, number, video, sentence, (span,), duration_s=lengths[video])


def _read_lengths(source: Source) -> dict[str, float]:
    try:
        rows = csv.DictReader(io.StringIO(source.text, newline=""))
        lengths = {row["id"]: float(row["length"]) for row in rows}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        expected = "needs the columns id and length, length a number of seconds"
        raise DataError(f"{source.path}: {expected} ({error!r})") from error
    bad = [f"{video}: {length}" for video, length in lengths.items() if not 0 < length < math.inf]
    if bad:
        found = f"{len(bad)} lengths are not positive numbers of seconds ({', '.join(bad[:3])})"
        raise DataError(f"{source.path}: {found}: correct them")
    return lengths


def _parse_line(line: str, where: str) -> tuple[str, Span, str]:
    match = _LINE.fullmatch(line.strip())
    try:
        if match is None:
            raise ValueError
        return match["video"], (float(match["start"]), float(match["end"])), match["sentence"]
    except ValueError:
        raise DataError(f"{where}: expected 'VIDEO_ID start end##sentence', found {line[:80]!r}") from None


def _by_video(spans_key: str, queries_key: str, in_frames: bool = False) -> Reader:
    """{video: {duration, spans, queries}}, one span a query. `in_frames`: fps and num_frames for duration."""

    def read(dataset: DatasetConfig) -> Iterator[Annotation]:
        number = 0
        for video, record in read_source(dataset.annotations).videos():
            place = f"{dataset.annotations}: video {video}"
            fps, duration = None, fields.duration(record, place)
            if in_frames:
                fps = fields.positive(fields.get(record, "fps", place), "fps", place)
                duration = fields.positive(fields.get(record, "num_frames", place), "num_frames", place) / fps
            queries, spans = fields.get(record, queries_key, place), fields.get(record, spans_key, place)
            sizes = [len(v) if isinstance(v, list) else repr(str(v)[:40]) for v in (queries, spans)]
            if not isinstance(sizes[0], int) or sizes[0] != sizes[1]:
                expected = f"{queries_key} and {spans_key} must be lists of one length"
                raise DataError(f"{place}: {expected}, found {sizes[0]} and {sizes[1]}: correct them")
            for query, span in zip(queries, spans, strict=True):
                number += 1
                where = f"{place}, query {number}"
                start, end = (t / (fps or 1.0) for t in fields.pair(span, spans_key, where))
                yield _annotation(where, number, video, query, ((start, end),), duration_s=duration, fps=fps)

    return read


def _by_record(
    videos: tuple[str, ...], query_key: str, read_spans: SpanReader, cut_keys: tuple[str, str] | None = None
) -> Reader:
    """Objects with a query each. The first of the keys `videos` that is there names the video."""

    def read(dataset: DatasetConfig) -> Iterator[Annotation]:
        for where, number, record in read_source(dataset.annotations).records():
            video_key = next((key for key in videos if key in record), videos[-1])
            video, query = fields.get(record, video_key, where), fields.get(record, query_key, where)
            spans, duration_s = read_spans(record, where, dataset), fields.duration(record, where)
            cut_s = _cut(record, cut_keys, video, where) if cut_keys and dataset.cuts != "ignore" else None
            yield _annotation(where, number, video, query, spans, duration_s=duration_s, cut_s=cut_s)

    return read


def _cut(record: dict[str, Any], keys: tuple[str, str], video: Any, where: str) -> Span | None:
    """The part of the file that is the clip. A file whose name ends with the cut's times is cut already."""
    if all(record.get(key) is None for key in keys) or holds_cut(str(video)):
        return None
    start, end = (fields.number(record.get(key), key, where) for key in keys)
    return start, end


def _windows(record: dict[str, Any], where: str, _: DatasetConfig) -> Spans | None:
    windows = record.get("relevant_windows")  # the test split has none
    return None if windows is None else fields.pairs(windows, "relevant_windows", where)


def _span(record: dict[str, Any], where: str, _: DatasetConfig) -> Spans:
    return fields.pairs(fields.get(record, "span", where), "span", where)


def _timestamp(record: dict[str, Any], where: str, _: DatasetConfig) -> Spans:
    return (fields.pair(fields.get(record, "timestamp", where), "timestamp", where),)


def _answer(record: dict[str, Any], where: str, _: DatasetConfig) -> Spans:
    answer = fields.text(fields.get(record, "answer", where), "answer", where)
    try:
        start, end = answer.rsplit("-", 1)
        return ((float(start), float(end)),)
    except ValueError:
        raise fields.wrong("answer must be like '13.4-28.1', in seconds", answer, where) from None


def _chunks(record: dict[str, Any], where: str, dataset: DatasetConfig) -> Spans:
    times = fields.get(record, "times", where)
    chunks = fields.pairs(times, "times", where)
    if not chunks or not all(float(chunk).is_integer() for of_one in chunks for chunk in of_one):
        raise fields.wrong("times must be pairs of chunk numbers, one pair an annotator", times, where)
    return tuple((a * CHUNK_S, (b + 1) * CHUNK_S) for a, b in _agreed(chunks, dataset.annotators))


def _agreed(chunks: Spans, annotators: str | None) -> Spans:
    """Several annotators' (first, last) chunks as one. `majority`: the most frequent, the first of equals."""
    if annotators == "mean":
        first, last = (sum(values) / len(chunks) for values in zip(*chunks, strict=True))
        return ((first, last),)
    if annotators == "all":
        return tuple(dict.fromkeys(chunks))
    return (chunks[0] if annotators == "first" else Counter(chunks).most_common(1)[0][0],)


def _timelens_100k(dataset: DatasetConfig) -> Iterator[Annotation]:
    for where, number, record in read_source(dataset.annotations).records():
        video, events = fields.get(record, "video_path", where), fields.get(record, "events", where)
        duration_s = fields.duration(record, where)
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise fields.wrong("events must be a list of objects with query and span", events, where)
        for place, event in enumerate(events, 1):
            at = f"{where}, event {place}"
            spans, query = _span(event, at, dataset), fields.get(event, "query", at)
            yield _annotation(at, f"{number}.{place}", video, query, spans, duration_s=duration_s)


def _manifest(dataset: DatasetConfig) -> Iterator[Annotation]:
    yield from read_manifest(dataset.annotations)


@dataclass(frozen=True)
class Format:
    """How a layout is read. The defaults are those of the codebase it comes from."""

    read: Reader
    keys: str = ""  # of the first annotation's JSON object, by which the format is detected
    cleaning: str = "parse_query"
    round_s: float = 0.0  # spans are rounded to multiples of it; 0: as they are
    clamp_s: float = 0.0  # a span may pass the clip's end by so much, by the format's own definition
    option: str | None = None  # of DatasetConfig, beside those that all annotations take


_BY_SENTENCE = _by_video("timestamps", "sentences")
_TACOS = _by_video("timestamps", "sentences", in_frames=True)
_TIME_R1 = _by_record(("video",), "sentence", _timestamp, ("video_start", "video_end"))
_TVGBENCH = _by_record(("path",), "question", _answer, ("start", "end"))
_DIDEMO = _by_record(("video",), "description", _chunks)
_VIDEOMIND = _by_record(("video_path", "vid"), "query", _span)
_QVHIGHLIGHTS = _by_record(("vid",), "query", _windows)
FORMATS = {  # the first whose keys are all there is detected
    "timelens_100k": Format(_timelens_100k, "video_path events"),
    "time_r1": Format(_TIME_R1, "video timestamp sentence", cleaning="time_r1", option="cuts"),
    "tvgbench": Format(_TVGBENCH, "path question answer", cleaning="as_written", option="cuts"),
    "didemo": Format(_DIDEMO, "video description times", round_s=1.0, clamp_s=CHUNK_S, option="annotators"),
    "videomind": Format(_VIDEOMIND, "query span"),
    "qvhighlights": Format(_QVHIGHLIGHTS, "vid query", cleaning="as_written"),
    "tacos": Format(_TACOS, "timestamps sentences fps num_frames", cleaning="strip"),
    "charades_json": Format(_BY_SENTENCE, "timestamps sentences", cleaning="strip"),
    "activitynet": Format(_BY_SENTENCE, cleaning="strip"),  # known by its videos' ids
    "timelens_bench": Format(_by_video("spans", "queries"), "spans queries"),
    "charades_sta": Format(_charades_sta, cleaning="strip", option="lengths"),  # known by "##"
    "manifest": Format(_manifest),
}
"""The keys are config.AnnotationFormat's values, `auto` aside."""


def detect(source: Source) -> str:
    """The format's name, from the first annotation. Raises DataError."""
    if not source.text.strip():
        raise DataError(f"{source.path} has no annotations")
    video, record = _first_annotation(source)
    of_keys = (name for name, form in FORMATS.items() if form.keys and {*form.keys.split()} <= record.keys())
    name = next(of_keys, None)
    if name == "charades_json" and video.startswith("v_"):
        return "activitynet"
    if name is None and source.text.lstrip()[0] not in "{[" and "##" in source.text:
        return "charades_sta"
    if name is None:
        known = f"none of the known formats ({', '.join(get_args(AnnotationFormat)[1:])})"
        raise DataError(f"{source.path}: {known}: see docs/data.md, or name its format")
    return name


def _first_annotation(source: Source) -> tuple[str, dict[str, Any]]:
    """(its video, its object) in one JSON object of objects; ("", its object) in a list or jsonl."""
    start = source.text.lstrip()[0]
    if start == "{":
        try:
            tree = source.json()
            if tree and all(isinstance(value, dict) for value in tree.values()):
                return next(iter(tree.items()))
        except DataError:
            _, first_line = next(source.lines())
            if not first_line.rstrip().endswith("}"):
                raise
    records = source.records() if start in "{[" else iter(())
    return "", next((record for _, _, record in records), {})


DEFAULTS = {"annotators": "mean", "cuts": "apply"}


def resolve(dataset: DatasetConfig) -> DatasetConfig:
    """The same with the format detected, and the format's defaults for the options that are not set.

    Raises DataError for a file of no format, ConfigError for an option that does nothing for the format.
    """
    name = dataset.format
    if name == "auto":
        name = "manifest" if is_manifest(dataset.annotations) else detect(read_source(dataset.annotations))
    form = FORMATS[name]
    options = () if name == "manifest" else ("cleaning", "round_s", form.option)
    defaults = {**DEFAULTS, "cleaning": form.cleaning, "round_s": form.round_s}
    asked = [option for option in ("lengths", *defaults) if getattr(dataset, option) is not None]
    if unused := [option for option in asked if option not in options]:
        what = f"{', '.join(unused)} would do nothing for format {name}"
        raise ConfigError(f"{dataset.annotations}: {what}: leave it out")
    chosen = {key: value for key, value in defaults.items() if key in options and key not in asked}
    clamp_s = max(dataset.clamp_s, form.clamp_s)
    return dataset.model_copy(update={"format": name, "clamp_s": clamp_s, **chosen})


def read_annotations(dataset: DatasetConfig) -> Iterator[Annotation]:
    """The annotations of a resolved dataset in file order: queries cleaned, times in seconds and rounded.

    Raises DataError at the first annotation that cannot be read.
    """
    clean, unit_s = fields.CLEANINGS[dataset.cleaning or "as_written"], dataset.round_s or 0.0
    for annotation in FORMATS[dataset.format].read(dataset):
        spans = annotation.spans_s
        rounded = None if spans is None else tuple(fields.rounded(span, unit_s) for span in spans)
        yield replace(annotation, query=clean(annotation.query), spans_s=rounded)
