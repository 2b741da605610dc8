"""`python -m curriculum show RUN`: what the curriculum knows of a run's prompts, and why it took or left one."""

import argparse
import difflib
import sys
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
    """The run's last records, or those of its latest checkpoint or round. Raises ConfigError if there are none."""
    final = run / "curriculum" / "records.parquet"
    if final.is_file():
        return pq.read_table(final), final
    checkpoints = sorted(
        run.glob("checkpoints/step-*/curriculum.parquet"), key=lambda p: _number_of(p.parent.name)
    )[-1:]
    rounds = sorted(run.glob("curriculum/round-*.parquet"), key=lambda p: _number_of(p.stem))[-1:]
    tables = [(pq.read_table(path), path) for path in (*rounds, *checkpoints)]
    if not tables:
        raise ConfigError(f"{run} holds no curriculum records: name a run folder, e.g. runs/NAME")
    return max(
        tables, key=lambda table: (len(table[0]["student_iou"][0]), table[0]["last_step"].to_numpy().max())
    )


def _number_of(name: str) -> int:
    """N of step-N and round-N."""
    return int(name.rpartition("-")[2])


def state_of(record: dict) -> str:
    """One word for where a prompt stands."""
    if record["dropped"]:
        return "dropped"
    if not record["selected"]:
        return "left out"
    return "suspended" if record["suspended"] else "selected"


def overview(records: pa.Table) -> Table:
    """Prompts by state; dropped ones by reason."""
    rows = records.select(
        ["dropped", "selected", "suspended", "num_rollouts", "teacher_iou", "disagreement"]
    ).to_pylist()
    groups: dict[str, list[dict]] = {}
    for row in rows:
        state = state_of(row)
        groups.setdefault(f"dropped: {row['dropped']}" if state == "dropped" else state, []).append(row)
    table = Table(
        "state",
        "prompts",
        "sampled",
        "rollouts",
        "teacher IoU",
        "disagreement",
        title=f"{len(records)} prompts",
    )
    for state, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        sampled = sum(m["num_rollouts"] > 0 for m in members)
        means = [_mean([m[name] for m in members]) for name in ("teacher_iou", "disagreement")]
        table.add_row(
            escape(state),
            str(len(members)),
            str(sampled),
            str(sum(m["num_rollouts"] for m in members)),
            *means,
        )
    return table


def largest(records: pa.Table, limit: int) -> Table:
    """The prompts of the largest disagreement that are not dropped."""
    alive = records.filter(pc.field("dropped") == "").sort_by([("disagreement", "descending")])
    table = Table(
        "prompt",
        "state",
        "disagreement",
        "teacher IoU",
        "student IoU by round",
        "rollouts",
        "last step",
        title="largest disagreement",
    )
    for record in alive.slice(0, limit).to_pylist():
        student = " ".join(_number(iou) for iou in record["student_iou"])
        numbers = (_number(record["disagreement"]), _number(record["teacher_iou"]), student)
        table.add_row(
            escape(record["prompt_id"]),
            state_of(record),
            *numbers,
            str(record["num_rollouts"]),
            str(record["last_step"]),
        )
    return table


def explain(records: pa.Table, prompt_id: str, config: Config) -> list[str]:
    """Why a prompt was taken or left, in sentences. Raises ConfigError for an unknown one."""
    found = records.filter(pc.field("prompt_id") == prompt_id).to_pylist()
    if not found:
        near = difflib.get_close_matches(prompt_id, records["prompt_id"].to_pylist(), n=1, cutoff=0.0)[0]
        raise ConfigError(f"no prompt {prompt_id} among {len(records)}; did you mean {near}?")
    record, curriculum = found[0], config.curriculum
    lines = [f"{prompt_id}: {state_of(record)}"]
    if record["teacher_iou"] is not None:
        answers = curriculum.num_teacher_predictions
        lines.append(
            f"teacher: mean IoU {record['teacher_iou']:.3f} over {answers} answers, threshold {curriculum.teacher_threshold}"
        )
    if any(iou is not None for iou in record["student_iou"]):
        lines.append(f"student: IoU by round {' '.join(_number(iou) for iou in record['student_iou'])}")
    if record["dropped"]:
        lines.append(f"dropped: {record['dropped']}")
    else:
        lines += _why(record, records, config)
    if record["num_rollouts"]:
        suspended = ", suspended that time" if record["suspended"] else ""
        lines.append(
            f"sampled: {record['num_rollouts']} rollouts, last at step {record['last_step']}{suspended}"
        )
    else:
        lines.append("sampled: never")
    return lines


def _why(record: dict, records: pa.Table, config: Config) -> list[str]:
    """What decided whether a prompt that is not dropped was selected."""
    curriculum, chosen = config.curriculum, int(records["selected"].to_numpy().sum())
    if curriculum.kind == "scc":
        sigma = record["student_iou"][0]
        kind = (
            "Anchor"
            if sigma >= curriculum.anchor_iou
            else "Frontier"
            if sigma < curriculum.frontier_iou
            else "neither kind"
        )
        return [
            f"{kind}: Anchors start at {curriculum.anchor_iou}, Frontier ends below {curriculum.frontier_iou}; {chosen} selected"
        ]
    if curriculum.kind == "tvdf" and not curriculum.dbtp:
        return [f"drawn at random: {chosen} selected"]
    if record["disagreement"] is None:
        return []
    alive = records.filter(pc.field("dropped") == "")
    rank = int((alive["disagreement"].to_numpy() > record["disagreement"]).sum()) + 1
    return [
        f"disagreement {record['disagreement']:.3f}, rank {rank} of {len(alive)}; {chosen} selected ({curriculum.sampler})"
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.3f}" if known else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m curriculum", description=__doc__)
    show = parser.add_subparsers(dest="command", required=True).add_parser(
        "show", help="print a run's prompts by state"
    )
    show.add_argument("run", type=Path, help="run folder, e.g. runs/NAME")
    show.add_argument("--prompt", metavar="ID", help="explain one prompt")
    show.add_argument(
        "--limit",
        type=int,
        default=SHOWN,
        help=f"prompts of the largest disagreement to list (default {SHOWN})",
    )
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
