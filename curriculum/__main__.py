"""`python -m curriculum show RUN`: the state of a run's prompts, and why each was selected or not."""

import argparse
import difflib
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.errors import ConfigError, InputError

SHOWN = 20


def newest_records(run: Path) -> tuple[pa.Table, Path]:
    """The run's final records, else its latest checkpoint's or round's. Raises ConfigError if it has none."""
    final = run / "curriculum" / "records.parquet"
    if final.is_file():
        return pq.read_table(final), final
    found = [
        list(run.glob(p)) for p in ("curriculum/round-*.parquet", "checkpoints/step-*/curriculum.parquet")
    ]
    newest = [max(paths, key=_number_in) for paths in found if paths]
    tables = [(pq.read_table(path), path) for path in newest]
    if not tables:
        raise ConfigError(f"{run} holds no curriculum records: name a run folder, e.g. runs/NAME")
    return max(tables, key=lambda t: (len(t[0]["student_iou"][0]), t[0]["last_step"].to_numpy().max()))


def _number_in(path: Path) -> int:
    """N of curriculum/round-N.parquet and step-N/curriculum.parquet."""
    return int(re.findall(r"-(\d+)", f"{path.parent.name}/{path.stem}")[-1])


def state_of(record: dict) -> str:
    if record["dropped"]:
        return "dropped"
    if not record["selected"]:
        return "left out"
    return "suspended" if record["suspended"] else "selected"


def overview(records: pa.Table) -> Table:
    """Prompts by state; dropped ones by reason."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in records.drop_columns(["prompt_id", "student_iou"]).to_pylist():
        groups[f"dropped: {row['dropped']}" if row["dropped"] else state_of(row)].append(row)
    columns = ("state", "prompts", "sampled", "rollouts", "teacher IoU", "disagreement")
    table = Table(*columns, title=f"{len(records)} prompts")
    for state, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        rollouts = [row["num_rollouts"] for row in rows]
        means = [_mean([row[name] for row in rows]) for name in ("teacher_iou", "disagreement")]
        counts = (len(rows), np.count_nonzero(rollouts), sum(rollouts))
        table.add_row(escape(state), *map(str, counts), *means)
    return table


def largest(records: pa.Table, limit: int) -> Table:
    """The prompts of largest disagreement, without those dropped."""
    alive = records.filter(pc.field("dropped") == "").sort_by([("disagreement", "descending")])
    columns = (
        "prompt",
        "state",
        "disagreement",
        "teacher IoU",
        "student IoU by round",
        "rollouts",
        "last step",
    )
    table = Table(*columns, title="largest disagreement")
    for record in alive.slice(0, limit).to_pylist():
        ious = (_number(record["disagreement"]), _number(record["teacher_iou"]), _rounds(record))
        counts = (str(record["num_rollouts"]), str(record["last_step"]))
        table.add_row(escape(record["prompt_id"]), state_of(record), *ious, *counts)
    return table


def explain(records: pa.Table, prompt_id: str, config: Config) -> list[str]:
    """Why a prompt was selected or not, in sentences. Raises ConfigError for an unknown prompt."""
    found = records.filter(pc.field("prompt_id") == prompt_id).to_pylist()
    if not found:
        near = difflib.get_close_matches(prompt_id, records["prompt_id"].to_pylist(), n=1, cutoff=0.0)[0]
        raise ConfigError(f"no prompt {prompt_id} among {len(records)}; did you mean {near}?")
    record, curriculum = found[0], config.curriculum
    lines = [f"{prompt_id}: {state_of(record)}"]
    if record["teacher_iou"] is not None:
        answers = (
            f"over {curriculum.num_teacher_predictions} answers, threshold {curriculum.teacher_threshold}"
        )
        lines.append(f"teacher: mean IoU {record['teacher_iou']:.3f} {answers}")
    if any(iou is not None for iou in record["student_iou"]):
        lines.append(f"student: IoU by round {_rounds(record)}")
    lines += [f"dropped: {record['dropped']}"] if record["dropped"] else _why(record, records, config)
    sampled = "never"
    if record["num_rollouts"]:
        suspended = ", suspended that time" if record["suspended"] else ""
        sampled = f"{record['num_rollouts']} rollouts, last at step {record['last_step']}{suspended}"
    return [*lines, f"sampled: {sampled}"]


def _why(record: dict, records: pa.Table, config: Config) -> list[str]:
    """What decided whether a prompt that is not dropped was selected."""
    curriculum = config.curriculum
    selected = f"{int(records['selected'].to_numpy().sum())} selected"
    if curriculum.kind == "scc":
        sigma, kind = record["student_iou"][0], "neither kind"
        if sigma >= curriculum.anchor_iou:
            kind = "Anchor"
        elif sigma < curriculum.frontier_iou:
            kind = "Frontier"
        bounds = f"Anchors start at {curriculum.anchor_iou}, Frontier ends below {curriculum.frontier_iou}"
        return [f"{kind}: {bounds}; {selected}"]
    if curriculum.kind == "tvdf" and not curriculum.dbtp:
        return [f"drawn at random: {selected}"]
    if record["disagreement"] is None:
        return []
    alive = records.filter(pc.field("dropped") == "")["disagreement"].to_numpy()
    rank = int((alive > record["disagreement"]).sum()) + 1
    place = f"disagreement {record['disagreement']:.3f}, rank {rank} of {len(alive)}"
    return [f"{place}; {selected} ({curriculum.sampler})"]


def _rounds(record: dict) -> str:
    return " ".join(_number(iou) for iou in record["student_iou"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.3f}" if known else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m curriculum", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print a run's prompts by state")
    show.add_argument("run", type=Path, help="run folder, e.g. runs/NAME")
    show.add_argument("--prompt", metavar="ID", help="explain one prompt")
    limit_help = f"prompts of the largest disagreement to list (default {SHOWN})"
    show.add_argument("--limit", type=int, default=SHOWN, help=limit_help)
    parsed = parser.parse_args(arguments)
    console = Console()
    try:
        records, path = newest_records(parsed.run)
        if parsed.prompt:
            for line in explain(records, parsed.prompt, load_config(parsed.run / "config.yaml")):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(overview(records))
            if records["disagreement"].null_count < len(records):
                console.print(largest(records, parsed.limit))
            console.print(f"from {path}", soft_wrap=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
