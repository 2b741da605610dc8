"""Checks annotation files against their videos, or converts them to the manifest. Formats: docs/data.md."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from video_opd.config_data import AnnotationFormat, DatasetConfig
from video_opd.config_file import parse_section
from video_opd.datasets.check import TOLERANCE_S, check, convert
from video_opd.datasets.fields import CLEANINGS
from video_opd.errors import DataError, InputError

SHOWN = 20


def show_findings(dataset: DatasetConfig, tolerance_s: float, limit: int) -> int:
    """Prints what check finds, grouped by reason. Returns the number of annotations with findings."""
    num_annotations = num_bad = 0
    findings: dict[str, dict[str, list[str]]] = {}  # kind -> reason -> places
    for annotation, faults in check(dataset, tolerance_s):
        num_annotations += 1
        num_bad += bool(faults)
        for kind, reason in faults:
            findings.setdefault(kind, defaultdict(list))[reason].append(annotation.where)
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
    add = shared.add_argument
    seconds: dict[str, Any] = {"type": _seconds, "metavar": "S"}
    formats, annotators = get_args(AnnotationFormat), ("mean", "majority", "first", "all")
    add("annotations", help="annotation file, or a manifest")
    add("--format", choices=formats, default="auto", help="default: auto, by content")
    add("--videos", required=True, metavar="DIR", help="folder of the video files")
    add("--lengths", metavar="CSV", help="charades_sta: csv with the columns id and length (seconds)")
    add("--cleaning", choices=tuple(CLEANINGS), help="of queries; default: the format's")
    add("--round-s", **seconds, help="round times to multiples of it, 0: not; default: the format's")
    add("--annotators", choices=annotators, help="didemo: whose intervals; default mean")
    add(
        "--cuts",
        choices=("apply", "ignore"),
        help="time_r1, tvgbench: ignore if files are cut; default apply",
    )
    add("--clamp-s", **seconds, default=0.0, help="cut ends that pass the clip's by at most S (default 0)")
    tolerance = f"between annotated and true durations ({TOLERANCE_S})"
    add("--tolerance-s", **seconds, default=TOLERANCE_S, help=tolerance)
    parser = argparse.ArgumentParser(prog="python -m video_opd.datasets", description=__doc__)
    add_command = parser.add_subparsers(dest="command", required=True).add_parser
    checking = add_command("check", parents=[shared], help="report findings; exit code 1 if there are any")
    limit = f"findings of a kind to print (default {SHOWN})"
    checking.add_argument("--limit", type=int, default=SHOWN, help=limit)
    converting = add_command("convert", parents=[shared], help="write the manifest without what check finds")
    output = "the manifest; NAME.left_out.csv beside it"
    converting.add_argument("--output", required=True, type=Path, metavar="PARQUET", help=output)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if check has findings; 2 for bad input."""
    parsed = _parse(arguments)
    options = {key: value for key, value in vars(parsed).items() if key in DatasetConfig.model_fields}
    try:
        dataset = parse_section(DatasetConfig, options, "command line")
        if parsed.command == "check":
            return 1 if show_findings(dataset, parsed.tolerance_s, parsed.limit) else 0
        num_prompts, left_out, list_path = convert(dataset, parsed.output, parsed.tolerance_s)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{kind} {count}" for kind, count in left_out.items())
    total = f"{left_out.total()}{f' ({counts})' if counts else ''}"
    print(f"{parsed.output}: {num_prompts} prompts; left out {total}")
    print(f"{list_path}: what was left out, and why")
    return 0


if __name__ == "__main__":
    sys.exit(main())
