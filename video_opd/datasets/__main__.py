"""Checks annotation files of any format against their videos, and converts them to the manifest. Formats: docs/data.md."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from video_opd.config_data import AnnotationFormat, DatasetConfig
from video_opd.config_file import parse_section
from video_opd.datasets.check import TOLERANCE_S, check
from video_opd.datasets.convert import convert
from video_opd.datasets.fields import CLEANINGS
from video_opd.errors import DataError, InputError

SHOWN = 20
DATASET_OPTIONS = (
    "format",
    "annotations",
    "lengths",
    "videos",
    "cleaning",
    "round_s",
    "annotators",
    "cuts",
    "clamp_s",
)


def show_findings(dataset: DatasetConfig, tolerance_s: float, limit: int) -> int:
    """Prints what check finds, the same finding of several annotations once. Returns the number of annotations with any."""
    num_annotations = num_bad = 0
    findings: dict[str, dict[str, list[str]]] = defaultdict(
        lambda: defaultdict(list)
    )  # kind -> reason -> places
    for checked in check(dataset, tolerance_s):
        num_annotations += 1
        num_bad += bool(checked.faults)
        for fault in checked.faults:
            findings[fault.kind][fault.reason].append(checked.annotation.where)
    if not num_annotations:
        raise DataError(f"{dataset.annotations} has no annotations")
    for kind, reasons in findings.items():
        for reason, places in list(reasons.items())[:limit]:
            more = f" (and {len(places) - 1} more annotations)" if places[1:] else ""
            print(f"{kind}: {places[0]}: {reason}{more}")
        if len(reasons) > limit:
            print(f"{kind}: {len(reasons) - limit} more; see them with --limit")
    counts = ", ".join(f"{kind} {sum(map(len, reasons.values()))}" for kind, reasons in findings.items())
    print(f"{num_annotations} annotations, {num_bad} with findings{f': {counts}' if counts else ''}")
    return num_bad


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("annotations", help="annotation file, or a manifest")
    shared.add_argument(
        "--format", choices=get_args(AnnotationFormat), default="auto", help="default: auto, by content"
    )
    shared.add_argument("--videos", required=True, metavar="DIR", help="folder of the video files")
    shared.add_argument(
        "--lengths", metavar="CSV", help="charades_sta: csv with the columns id and length (seconds)"
    )
    shared.add_argument("--cleaning", choices=tuple(CLEANINGS), help="of queries; default: the format's")
    shared.add_argument(
        "--round-s",
        type=_seconds,
        metavar="S",
        help="round times to multiples of it, 0: not; default: the format's",
    )
    shared.add_argument(
        "--annotators",
        choices=("mean", "majority", "first", "all"),
        help="didemo: whose intervals; default mean",
    )
    shared.add_argument(
        "--cuts",
        choices=("apply", "ignore"),
        help="time_r1, tvgbench: ignore if files are cut; default apply",
    )
    shared.add_argument(
        "--clamp-s",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="cut ends that pass the clip's by at most S (default 0)",
    )
    shared.add_argument(
        "--tolerance-s",
        type=_seconds,
        default=TOLERANCE_S,
        metavar="S",
        help=f"between annotated and true durations ({TOLERANCE_S})",
    )
    parser = argparse.ArgumentParser(prog="python -m video_opd.datasets", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check", parents=[shared], help="report findings; exit code 1 if there are any"
    )
    checking.add_argument(
        "--limit", type=int, default=SHOWN, help=f"findings of a kind to print (default {SHOWN})"
    )
    converting = commands.add_parser(
        "convert", parents=[shared], help="write the manifest without what check finds"
    )
    converting.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="PARQUET",
        help="the manifest; NAME.left_out.csv beside it",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if check has findings; 2 for bad input."""
    parsed = _parse(arguments)
    try:
        dataset = parse_section(
            DatasetConfig, {key: getattr(parsed, key) for key in DATASET_OPTIONS}, "command line"
        )
        if parsed.command == "check":
            return 1 if show_findings(dataset, parsed.tolerance_s, parsed.limit) else 0
        done = convert(dataset, parsed.output, parsed.tolerance_s)
        counts = ", ".join(f"{kind} {count}" for kind, count in done.left_out.items())
        print(
            f"{parsed.output}: {done.num_prompts} prompts; left out {done.left_out.total()}{f' ({counts})' if counts else ''}"
        )
        print(f"{done.list_path}: what was left out, and why")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
