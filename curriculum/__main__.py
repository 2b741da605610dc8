"""`python -m curriculum show RUN`: the state of a run's prompts, and why each was selected or not."""

import argparse
import difflib
import re
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

from video_opd.cluster.command_line import exit_code_of
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.errors import ConfigError
from video_opd.grounding import reaches

SHOWN = 20


def newest_records(run: Path) -> tuple[pa.Table, Path]:
    """The run's final records, else its latest checkpoint's or round's. Raises ConfigError if it has none."""
    final = run / "curriculum" / "records.parquet"
    if final.is_file():
        return pq.read_table(final), final
    patterns = ("curriculum/round-*.parquet", "checkpoints/step-*/curriculum.parquet")
    found = [list(run.glob(pattern)) for pattern in patterns]
    newest = [max(paths, key=lambda p: int(re.findall(r"-(\d+)", str(p))[-1])) for paths in found if paths]
    if not newest:
        raise ConfigError(f"{run} holds no curriculum records: name a run folder, e.g. runs/NAME")
    tables = [(pq.read_table(path), path) for path in newest]
    return max(tables, key=lambda t: (len(t[0]["student_iou"][0]), t[0]["last_step"].to_numpy().max()))


def state_of(record: dict) -> str:
    if record["dropped"]:
        return f"dropped: {record['dropped']}"
    if not record["selected"]:
        return "left out"
    return "suspended" if record["suspended"] else "selected"


def overview(records: pa.Table) -> Table:
    """Prompts by state, the most frequent ones: there may be as many reasons as dropped prompts."""
    states = [state_of(record) for record in records.drop_columns("student_iou").to_pylist()]
    sampled = pa.array(records["num_rollouts"].to_numpy() > 0)
    records = records.append_column("state", pa.array(states)).append_column("sampled", sampled)
    sums = [("state", "count"), ("sampled", "sum"), ("num_rollouts", "sum")]
    means = [("teacher_iou", "mean"), ("disagreement", "mean")]
    groups = records.group_by("state", use_threads=False).aggregate(sums + means)
    columns = ("state", "prompts", "sampled", "rollouts", "teacher IoU", "disagreement")
    table = Table(*columns, title=f"{len(records)} prompts")
    rows = groups.sort_by([("state_count", "descending")]).to_pylist()
    for row in rows[:SHOWN]:
        counts = (str(row[f"{name}_{what}"]) for name, what in sums)
        ious = (_number(row[f"{name}_{what}"]) for name, what in means)
        table.add_row(escape(row["state"]), *counts, *ious)
    if rest := rows[SHOWN:]:
        table.add_row(f"{len(rest)} other states", str(sum(row["state_count"] for row in rest)))
    return table


def largest(records: pa.Table, limit: int) -> Table:
    """The prompts of largest disagreement, without those dropped."""
    alive = records.filter(pc.field("dropped") == "").sort_by([("disagreement", "descending")])
    ious = ("disagreement", "teacher IoU", "student IoU by round")
    table = Table("prompt", "state", *ious, "rollouts", "last step", title="largest disagreement")
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
        asked = _asked(curriculum.num_teacher_predictions)
        threshold = f"threshold {curriculum.teacher_threshold}"
        lines.append(f"teacher: {asked}, {record['teacher_iou']:.3f}, {threshold}")
    if any(iou is not None for iou in record["student_iou"]):
        number = curriculum.num_student_predictions
        asked = "IoU of one rollout" if curriculum.scores_student else _asked(number)
        lines.append(f"student: {asked}, by round {_rounds(record)}")
    lines += [] if record["dropped"] else _why(record, records, config)
    sampled = "never"
    if record["num_rollouts"]:
        suspended = ", suspended that time" if record["suspended"] else ""
        sampled = f"{record['num_rollouts']} rollouts, last at step {record['last_step']}{suspended}"
    return [*lines, f"sampled: {sampled}"]


def _asked(number: int) -> str:
    return f"mean IoU over {number} answers" if number > 1 else "IoU of its greedy answer"


def _why(record: dict, records: pa.Table, config: Config) -> list[str]:
    """What decided whether a prompt that is not dropped was selected."""
    curriculum = config.curriculum
    if not record["student_iou"]:
        return ["no round has selected prompts yet"] if curriculum.kind != "uniform" else []
    if curriculum.asks_student and record["student_iou"][-1] is None:
        return [f"not asked in round {len(record['student_iou'])}: pool_sample={curriculum.pool_sample}"]
    selected = f"{int(records['selected'].to_numpy().sum())} selected"
    if curriculum.kind == "scc":
        sigma, scc, kind = np.array(record["student_iou"][0]), curriculum.scc, "neither kind"
        if reaches(sigma, scc.anchor_iou):
            kind = "Anchor"
        elif not reaches(sigma, scc.frontier_iou):
            kind = "Frontier"
        bounds = f"Anchors start at {scc.anchor_iou}, Frontier ends below {scc.frontier_iou}"
        return [f"{kind}: {bounds}; {selected}"]
    if curriculum.kind == "difficulty":
        mean, std = curriculum.difficulty_mean, curriculum.difficulty_std
        weight = np.exp(-((record["student_iou"][0] - mean) ** 2) / (2 * std**2))
        return [f"drawn with weight {weight:.3f}, which is 1 at a student IoU of {mean}; {selected}"]
    if curriculum.kind == "tvdf" and not curriculum.dbtp:
        return [f"drawn at random: {selected}"]
    if record["disagreement"] is None:
        return []
    alive = records.filter(pc.field("dropped") == "")["disagreement"].drop_null().to_numpy()
    rank = int(np.count_nonzero(alive > record["disagreement"])) + 1
    unit = " nats of reverse KL" if curriculum.scores_student else ""
    place = f"disagreement {record['disagreement']:.3f}{unit}, rank {rank} of {len(alive)}"
    how = f"{curriculum.sampler} of videos" if curriculum.select_by == "video" else curriculum.sampler
    return [f"{place}; {selected} ({how})"]


def _rounds(record: dict) -> str:
    return " ".join(map(_number, record["student_iou"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def show(run: Path, prompt_id: str | None, limit: int) -> None:
    """Prints the tables, or explains one prompt. Raises ConfigError."""
    console = Console()
    records, path = newest_records(run)
    if prompt_id:
        for line in explain(records, prompt_id, load_config(run / "config.yaml")):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(overview(records))
    if records["disagreement"].null_count < len(records):
        console.print(largest(records, limit))
    console.print(f"from {path}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m curriculum", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="print a run's prompts by state")
    command.add_argument("run", type=Path, help="run folder, e.g. runs/NAME")
    command.add_argument("--prompt", metavar="ID", help="explain one prompt")
    limit_help = f"prompts of the largest disagreement to list (default {SHOWN})"
    command.add_argument("--limit", type=int, default=SHOWN, help=limit_help)
    parsed = parser.parse_args(arguments)
    return exit_code_of(lambda: show(parsed.run, parsed.prompt, parsed.limit))


if __name__ == "__main__":
    sys.exit(main())
