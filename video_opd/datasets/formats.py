"""Every annotation format: how it is read, and what its codebase does to queries and times."""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

from video_opd.config_data import AnnotationFormat, DatasetConfig
from video_opd.datasets import conversations, ego4d, fields, released, table
from video_opd.datasets.annotation import Annotation
from video_opd.datasets.manifest import is_parquet, read_manifest
from video_opd.datasets.source import Record, Source, as_record, describe, is_by_video, read_source
from video_opd.datasets.videos import holds_cut, video_id
from video_opd.errors import ConfigError, DataError
from video_opd.types import Span

CHUNK_S = 5.0  # of DiDeMo
_LINE = re.compile(r"(?P<video>\S+)\s+(?P<start>\S+)\s+(?P<end>\S+?)##(?P<sentence>.+)")
Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Format:
    """A layout: records with one query each, and their keys. Its codebase sets the defaults of options."""

    records: "Callable[[DatasetConfig, Format], Iterator[Record]]"
    video: str  # keys
    query: str
    spans: str
    read_spans: Callable[[Any, str, str], Spans] = fields.pairs  # (value, key, where)
    cut: Callable[[dict[str, Any], str, str], Span | None] | None = None  # (record, video, where)
    marks: str = ""  # keys by which the format is detected; empty: the keys of query and spans
    cleaning: str = "parse_query"
    round_s: float = 0.0  # spans are rounded to multiples of it; 0: as they are
    clamp_s: float = 0.0  # a span may pass the clip's end by so much, by the format's own definition
    options: Mapping[str, str | None] = field(default_factory=dict)  # that few formats take; their defaults
    labelled: bool = True  # whether every record has spans
    in_frames: bool = False  # times count frames; fps and num_frames stand for the duration


def _from_lines(dataset: DatasetConfig, _: Format) -> Iterator[Record]:
    """Charades-STA's lines, with durations from `lengths`."""
    path = dataset.annotations
    if dataset.lengths is None:
        needs = "format charades_sta needs the csv of the videos' lengths"
        raise DataError(f"{path}: {needs}: name it in lengths, or set another format, such as auto")
    lengths = _read_lengths(read_source(dataset.lengths))
    for number, line in read_source(path).lines():
        where, match = f"{path}:{number}", _LINE.fullmatch(line.strip())
        try:
            if match is None:
                raise ValueError
            span = [float(match["start"]), float(match["end"])]
        except ValueError:
            expected = "expected 'VIDEO_ID start end##sentence'"
            found = f"{line[:80]!r}: correct it, or name another format"
            raise DataError(f"{where}: {expected}, found {found}") from None
        video = match["video"]
        if video not in lengths:
            raise DataError(f"{where}: video {video} has no length in {dataset.lengths}: add it there")
        sentence, duration_s = match["sentence"], lengths[video]
        yield where, number, {"video": video, "sentence": sentence, "span": span, "duration": duration_s}


def _read_lengths(source: Source) -> dict[str, float]:
    try:
        lengths = {row["id"]: float(row["length"]) for row in csv.DictReader(source.text.split("\n"))}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        expected = "needs the columns id and length, length a number of seconds"
        raise DataError(f"{source.path}: {expected} ({error!r})") from error
    for video, length in lengths.items():
        fields.positive(length, f"the length of video {video}", source.path)
    return lengths


def _from_records(dataset: DatasetConfig, _: Format) -> Iterator[Record]:
    yield from read_source(dataset.annotations).records()


def _by(rows: Callable[[DatasetConfig], Iterator[Record]]) -> Callable[..., Iterator[Record]]:
    """A layout that has a file of its own."""
    return lambda dataset, _: rows(dataset)


def _from_events(key: str, dataset: DatasetConfig, form: Format) -> Iterator[Record]:
    """One record per event of a video's record, which has a list of them."""
    for where, number, record in read_source(dataset.annotations).records():
        events = fields.get(record, key, where)
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            expected = f"{key} must be a list of objects with {form.query} and {form.spans}"
            raise fields.wrong(expected, events, where)
        for place, event in enumerate(events, 1):
            yield f"{where}, event {place}", f"{number}.{place}", record | event


def _from_videos(dataset: DatasetConfig, form: Format) -> Iterator[Record]:
    """One record per query of a JSON object {video: {duration, spans, queries}}, one span per query."""
    number = 0
    for video, record in read_source(dataset.annotations).videos().items():
        place = f"{dataset.annotations}: video {video}"
        queries, spans = (fields.get(record, key, place) for key in (form.query, form.spans))
        sizes = [len(values) if isinstance(values, list) else "no list" for values in (queries, spans)]
        if sizes[0] != sizes[1] or "no list" in sizes:
            expected = f"{form.query} and {form.spans} must be lists of one length"
            raise DataError(f"{place}: {expected}, found {sizes[0]} and {sizes[1]}: correct them")
        for query, span in zip(queries, spans, strict=True):
            number += 1
            of_query = {form.video: video, form.query: query, form.spans: span}
            yield f"{place}, query {number}", number, record | of_query


def _answer(value: Any, key: str, where: str) -> Spans:
    answer = fields.text(value, key, where)
    try:
        start, end = answer.rsplit("-", 1)
        return ((float(start), float(end)),)
    except ValueError:
        raise fields.wrong(f"{key} must be like '13.4-28.1', in seconds", answer, where) from None


def _chunks(value: Any, key: str, where: str) -> Spans:
    chunks = fields.pairs(value, key, where)
    if not chunks or not all(float(chunk).is_integer() for of_one in chunks for chunk in of_one):
        raise fields.wrong(f"{key} must be pairs of chunk numbers, one pair an annotator", value, where)
    return chunks


def _agreed(chunks: Spans, annotators: str) -> Spans:
    """Seconds from several annotators' (first, last) chunks. `majority`: the first of the most frequent."""
    agreed = {
        "mean": [[sum(values) / len(chunks) for values in zip(*chunks, strict=True)]],
        "majority": [max(chunks, key=chunks.count)],
        "first": chunks[:1],
        "all": dict.fromkeys(chunks),
    }
    return tuple((first * CHUNK_S, (last + 1) * CHUNK_S) for first, last in agreed[annotators])


def _part(start_key: str, end_key: str, record: dict[str, Any], video: str, where: str) -> Span | None:
    """The part of the file that is the clip. A file whose name ends with the part's times is cut already."""
    keys = (start_key, end_key)
    if all(record.get(key) is None for key in keys) or holds_cut(video):
        return None
    start, end = (fields.number(record.get(key), key, where) for key in keys)
    return start, end


def _first_chunks(record: dict[str, Any], _: str, where: str) -> Span | None:
    """The part of the file that DiDeMo's annotators saw: its first num_segments chunks."""
    if record.get("num_segments") is None:
        return None
    return 0.0, CHUNK_S * fields.positive(record["num_segments"], "num_segments", where)


CUTS, ANNOTATORS = {"cuts": "apply"}, {"annotators": "mean"}
_SENTENCES = Format(_from_videos, "video", "sentences", "timestamps", fields.one_pair, cleaning="strip")
_LINES = Format(_from_lines, "video", "sentence", "span", fields.one_pair, cleaning="strip")
_TIME_R1 = Format(_from_records, "video", "sentence", "timestamp", fields.one_pair, cleaning="time_r1")
_TVGBENCH = Format(_from_records, "path", "question", "answer", _answer, cleaning="as_written")
_DIDEMO = Format(_from_records, "video", "description", "times", _chunks, round_s=1.0, clamp_s=CHUNK_S)
_RELEASED = Format(_by(released.rows), *released.COLUMNS, released.interval, cleaning="as_written")
_QVHIGHLIGHTS = Format(_from_records, "vid", "query", "relevant_windows", cleaning="as_written")
_EVENTS = Format(partial(_from_events, "events"), "video_path", "query", "span", marks="video_path events")
_TEXTS = Format(partial(_from_events, "annotations"), "video_id", "text", "timestamps")
_TURNS = Format(_by(conversations.rows), "video", "query", "answer", conversations.intervals)
_VUE_TR = Format(_from_records, "video_id", "query", "gt", cleaning="as_written")
_SEEKER = Format(
    _from_records, "src_video_path", "qry_text", "answering_time_interval", cleaning="as_written"
)
_CLIPS = Format(_by(ego4d.rows), "video", "query", "span", labelled=False, cut=partial(_part, "start", "end"))
FORMATS = {  # the first whose marks are all there is detected
    "timelens_100k": _EVENTS,
    "timelens2": replace(_TEXTS, marks="video_id annotations", cleaning="as_written"),
    "timelens2_chat": replace(_TURNS, marks="messages", cleaning="strip", options={"query_pattern": None}),
    "vue_tr": replace(_VUE_TR, marks="video_id query gt"),
    "moment_seeker": _SEEKER,
    "ego4d_nlq": replace(_CLIPS, marks="videos", cleaning="strip", options={"cuts": "ignore"}),
    "time_r1": replace(_TIME_R1, cut=partial(_part, "video_start", "video_end"), options=CUTS),
    "tvgbench": replace(_TVGBENCH, cut=partial(_part, "start", "end"), options=CUTS),
    "didemo": replace(_DIDEMO, cut=_first_chunks, options=ANNOTATORS | CUTS),
    "videomind": Format(_from_records, "video_path vid", "query", "span"),
    "qvhighlights": replace(_QVHIGHLIGHTS, marks="vid query", labelled=False),
    "tacos": replace(_SENTENCES, marks="timestamps sentences fps num_frames", in_frames=True),
    "charades_json": _SENTENCES,
    "activitynet": _SENTENCES,  # known by its videos' ids
    "timelens_bench": Format(_from_videos, "video", "queries", "spans", fields.one_pair),
    "charades_sta": replace(_LINES, marks="##", options={"lengths": None}),
    "csv": Format(_by(table.rows), "video", "query", "spans", marks="header", cleaning="strip"),
    "video_opd": replace(_RELEASED, options={"query_pattern": None}),  # Parquet: detected by its columns
}
"""The names are those of config_data.AnnotationFormat, except `auto` and `manifest`."""


def detect(source: Source) -> str:
    """The format's name, from the first annotation. Raises DataError."""
    if not source.text.strip():
        raise DataError(f"{source.path} has no annotations")
    video, record, found = _first_annotation(source)
    for name, form in FORMATS.items():
        if {*(form.marks or f"{form.query} {form.spans}").split()} <= record.keys():
            return "activitynet" if name == "charades_json" and video.startswith("v_") else name
    known = f"none of the known formats ({', '.join(get_args(AnnotationFormat)[1:])})"
    raise DataError(f"{source.path}: {found} is {known}: write it as one of those in docs/data.md")


def _first_annotation(source: Source) -> tuple[str, dict[str, Any], str]:
    """(its video in an object of objects, otherwise empty; its object; what the file holds, for errors)."""
    if source.text.lstrip()[0] not in "{[":
        _, line = next(source.lines())
        if table.header(source)[0]:
            return "", {"header": None}, ""
        return "", {"##": None} if "##" in source.text else {}, f"text that begins with {line[:60]!r}"
    values = source.values()
    _, first = next(values)
    if isinstance(first, list):
        return "", as_record(first[0], f"{source.path}: item 1") if first else {}, describe(first)
    if first and is_by_video(first) and next(values, None) is None:
        video, record = next(iter(first.items()))
        return video, record, describe(first)
    return "", first, describe(first)


OPTIONS = ("lengths", "annotators", "cuts", "cleaning", "round_s", "query_pattern")  # not of every format


def resolve(dataset: DatasetConfig) -> DatasetConfig:
    """The same with the format detected, and the format's defaults for the options that are not set.

    Raises DataError for a file of no format, ConfigError for an option that does nothing for the format.
    """
    name = dataset.format
    if name == "auto" and is_parquet(dataset.annotations):
        name = "video_opd" if released.is_released(dataset.annotations) else "manifest"
    elif name == "auto":
        name = detect(read_source(dataset.annotations))
    form = FORMATS.get(name)
    defaults = {"cleaning": form.cleaning, "round_s": form.round_s, **form.options} if form else {}
    asked = [option for option in OPTIONS if getattr(dataset, option) is not None]
    if unused := [option for option in asked if option not in defaults]:
        what = f"{', '.join(unused)} would do nothing for format {name}"
        raise ConfigError(f"{dataset.annotations}: {what}: leave it out")
    chosen = {option: value for option, value in defaults.items() if option not in asked}
    rounding_s = (dataset.round_s or chosen.get("round_s") or 0.0) / 2  # may pass the clip's end
    clamp_s = max(dataset.clamp_s, form.clamp_s if form else 0.0, rounding_s)
    return dataset.model_copy(update={"format": name, "clamp_s": clamp_s, **chosen})


def read_annotations(dataset: DatasetConfig) -> Iterator[Annotation]:
    """The annotations of a resolved dataset in file order: queries cleaned, times in seconds and rounded.

    Raises DataError at the first annotation that cannot be read.
    """
    if dataset.format == "manifest":
        yield from read_manifest(dataset.annotations)
        return
    form = FORMATS[dataset.format]
    clean = fields.CLEANINGS[dataset.cleaning or form.cleaning]
    for where, number, record in form.records(dataset, form):
        video_key = next((key for key in form.video.split() if key in record), form.video.split()[-1])
        video = fields.identifier(fields.get(record, video_key, where), "the video", where)
        query = clean(fields.text(fields.get(record, form.query, where), "the query", where))
        fps, duration_s, spans, cut_s = None, fields.duration(record, where), None, None
        if form.in_frames:
            keys = ("fps", "num_frames")
            fps, frames = (fields.positive(fields.get(record, key, where), key, where) for key in keys)
            duration_s = frames / fps
        if form.labelled or record.get(form.spans) is not None:
            read = form.read_spans(fields.get(record, form.spans, where), form.spans, where)
            if dataset.annotators is not None:
                read = _agreed(read, dataset.annotators)
            spans = tuple(fields.seconds(span, fps or 1.0, dataset.round_s or 0.0) for span in read)
        if form.cut and dataset.cuts != "ignore":
            cut_s = form.cut(record, video, where)
        same = {"where": where, "prompt_id": f"{video_id(video)}:{number}", "video": video, "query": query}
        yield Annotation(**same, spans_s=spans, duration_s=duration_s, cut_s=cut_s, fps=fps)
