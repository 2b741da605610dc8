"""Checks annotation files against their videos, or converts them to the manifest. Formats: docs/data.md."""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter

from video_opd.cluster.command_line import exit_code_of
from video_opd.config_data import AnnotationFormat, DatasetConfig, NonNegativeFloat, VideoConfig
from video_opd.config_file import Section, parse_section
from video_opd.datasets.check import NOTES, TOLERANCE_S, Asked, Read, check, convert
from video_opd.datasets.fields import CLEANINGS
from video_opd.errors import DataError

SHOWN = 20


def show_findings(dataset: DatasetConfig, asked: Asked, limit: int) -> int:
    """Prints what check finds, grouped by reason. Returns the number of annotations with faults."""
    num_annotations = num_bad = 0
    counts, places = Counter(), defaultdict(list)  # of each kind; of each fault
    for annotation, faults in check(dataset, asked):
        num_annotations += 1
        num_bad += any(fault.kind not in NOTES for fault in faults)
        for fault in faults:
            counts[fault.kind] += 1
            places[fault].append(annotation.where)
    if not num_annotations:
        raise DataError(f"{dataset.annotations} has no annotations")
    for kind in counts:
        of_kind = [fault for fault in places if fault.kind == kind]
        for fault in of_kind[:limit]:
            first, *others = places[fault]
            more = f" (and {len(others)} more annotations)" if others else ""
            print(f"{kind}: {first}: {fault.reason}{more}")
        if len(of_kind) > limit:
            print(f"{kind}: {len(of_kind) - limit} more; see them with --limit")
    notes = Counter({kind: counts.pop(kind) for kind in NOTES & counts.keys()})
    listed = f": {_list(counts)}" if counts else ""
    noted = f"; noted: {_list(notes)}" if notes else ""
    print(f"{num_annotations} annotations, {num_bad} with findings{listed}{noted}")
    return num_bad


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    seconds: dict[str, Any] = {"type": TypeAdapter(NonNegativeFloat).validate_python, "metavar": "S"}
    options = {  # keys of DatasetConfig, whose descriptions are the help
        "format": {"choices": get_args(AnnotationFormat), "default": "auto"},
        "videos": {"required": True, "metavar": "DIR"},
        "lengths": {"metavar": "CSV"},
        "cleaning": {"choices": tuple(CLEANINGS)},
        "round_s": seconds,
        "annotators": {"choices": ("mean", "majority", "first", "all")},
        "cuts": {"choices": ("apply", "ignore")},
        "query_pattern": {"metavar": "REGEX"},
        "clamp_s": seconds | {"default": 0.0},
    }
    of_video = {  # keys of VideoConfig
        "decoder": {"choices": get_args(VideoConfig.model_fields["decoder"].annotation)},
        "decode_workers": {"type": int, "metavar": "N"},
        "frame_folder_fps": seconds | {"metavar": "FPS"},
    }
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("annotations", help="annotation file, or a manifest")
    for section, names in ((DatasetConfig, options), (VideoConfig, of_video)):
        for name, more in names.items():
            described = (section.model_fields[name].description or "").replace("None:", "default:")
            shared.add_argument(f"--{name.replace('_', '-')}", help=described, **more)
    pictures = (
        "decode the first, middle and last pictures of each video (some, the default), all that a run sees"
    )
    shared.add_argument("--read", choices=get_args(Read), default="some", help=f"{pictures}, or none")
    tolerance = f"between annotated and true durations ({TOLERANCE_S})"
    shared.add_argument("--tolerance-s", **seconds, default=TOLERANCE_S, help=tolerance)
    parser = argparse.ArgumentParser(prog="python -m video_opd.datasets", description=__doc__)
    add_command = parser.add_subparsers(dest="command", required=True).add_parser
    checking = add_command("check", parents=[shared], help="report findings; exit code 1 if there are any")
    limit = f"findings of a kind to print (default {SHOWN})"
    checking.add_argument("--limit", type=int, default=SHOWN, help=limit)
    converting = add_command("convert", parents=[shared], help="write the manifest without what check finds")
    output = "the manifest; NAME.left_out.csv beside it"
    converting.add_argument("--output", required=True, type=Path, metavar="PARQUET", help=output)
    return parser.parse_args(arguments)


def _section(section: type[Section], parsed: argparse.Namespace) -> Section:
    given = {k: value for k, value in vars(parsed).items() if k in section.model_fields and value is not None}
    return parse_section(section, given, "command line")


def _run(parsed: argparse.Namespace) -> int:
    dataset = _section(DatasetConfig, parsed)
    asked = Asked(parsed.tolerance_s, _section(VideoConfig, parsed), parsed.read)
    if parsed.command == "check":
        return 1 if show_findings(dataset, asked, parsed.limit) else 0
    num_prompts, left_out, list_path = convert(dataset, parsed.output, asked)
    listed = f" ({_list(left_out)})" if left_out else ""
    print(f"{parsed.output}: {num_prompts} prompts; left out {left_out.total()}{listed}")
    print(f"{list_path}: what was left out, and why")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if check has findings; 2 for bad input."""
    parsed = _parse(arguments)
    return exit_code_of(lambda: _run(parsed))


if __name__ == "__main__":
    sys.exit(main())
