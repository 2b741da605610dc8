"""Every objective from the same student on the same data, frames and number of updates: what it learns and what it costs.

`python -m benchmarks.objectives [--quick] [--out DIR]`. grpo samples 8 responses to each of as many prompts as the others have;
grpo/8 takes an eighth of the prompts, so that it has as many rollouts as the others. Prints a table, writes objectives.png and
report.html; the last line is one JSON object.
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table

import launch
from benchmarks.rows import append_row, by_kind, read_rows, spread
from driver.records.report import embed
from driver.records.sinks import read_metrics
from video_opd.config_file import load_demo
from video_opd.files.run_folder import write_atomically

GROUPS, NUM_STEPS, EVAL_EVERY, ROLLOUTS, LR = 32, 40, 10, 8, 3e-4
KINDS: dict[str, list[str]] = {
    "opd": ["loss={kind: opd, clamp: 3, center: batch}"],
    "opd_topk": ["loss={kind: opd_topk, top_k: 32, clamp: 3}"],
    "opd_full": ["loss={kind: opd_full}"],
    "opd_full jsd": ["loss={kind: opd_full, divergence: jsd}"],
    "grpo": ["loss={kind: grpo}", f"rollout.rollouts_per_prompt={ROLLOUTS}"],
    "grpo/8": [
        "loss={kind: grpo}",
        f"rollout.rollouts_per_prompt={ROLLOUTS}",
        f"groups_per_step={GROUPS // ROLLOUTS}",
    ],
    "off_policy_rkd": ["loss={kind: off_policy_rkd, clamp: 3}"],
    "off_policy_fkd": ["loss={kind: off_policy_fkd}"],
    "sft": ["loss={kind: sft}"],
    **{f"opd_topk K={k}": [f"loss={{kind: opd_topk, top_k: {k}, clamp: 3}}"] for k in (1, 4, 128)},
}
DEFAULT_KINDS = [kind for kind in KINDS if "K=" not in kind]
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Objectives</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
  td, th { padding: .25rem .8rem; text-align: right; }
  img { max-width: 100%; }
</style>
<h1>Objectives</h1><p>{{ title }}</p>
<table><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>{% for value in line %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table>
<img alt="held-out mIoU and R1@0.7 against updates, seconds and tokens" src="data:image/png;base64,{{ picture }}">
</html>
"""
AXES = {
    "step": "updates",
    "wall_s": "wall seconds of training",
    "rollout_tokens": "rollout tokens",
    "teacher_tokens": "teacher tokens",
}


def measure(kind: str, seed: int, runs: Path, num_steps: int, more: Sequence[str]) -> dict[str, Any]:
    """One run: what it cost, and its curve on the held-out split. An update's seconds are a median and hold no evaluation."""
    name = re.sub(r"\W", "-", f"{kind} {seed}")
    overrides = [
        f"runs_dir={runs}",
        f"run_name={name}",
        f"seed={seed}",
        f"groups_per_step={GROUPS}",
        f"num_steps={num_steps}",
        f"eval_every={EVAL_EVERY}",
        f"learner.lr={LR}",
        "max_policy_lag=0",  # phases do not overlap: the seconds of an update are its own
        *KINDS[kind],
        *more,
    ]
    shutil.rmtree(runs / name, ignore_errors=True)  # left by an interrupted run
    summary = launch.launch(load_demo(overrides))
    lines = read_metrics(runs / name)
    step_s = float(np.median([line["time/step_s"] for line in lines]))
    curve = [point(0, step_s, {}, summary["student_before"])]
    for line in lines:
        if "eval/miou" in line:
            curve.append(
                point(
                    int(line["step"]) + 1, step_s, line, {k.removeprefix("eval/"): v for k, v in line.items()}
                )
            )
    return {
        "kind": kind,
        "seed": seed,
        "steps": num_steps,
        "overrides": list(more),
        "miou": summary["student_after"]["miou"],
        "r1_07": summary["student_after"]["r1@0.7"],
        "step_s": step_s,
        "wall_s": step_s * summary["steps"],
        "rollout_tokens": summary["tokens"]["rollout"],
        "teacher_tokens": summary["tokens"]["scored"],
        "teacher_miou": summary["teacher"]["miou"] if summary["teacher"] else None,
        "curve": curve,
    }


def key_of(row: dict[str, Any]) -> tuple:
    """Rows with one key are of the same run."""
    return row["kind"], row["seed"], row["steps"], *row["overrides"]


def point(step: int, step_s: float, line: dict[str, float], values: dict[str, float]) -> dict[str, float]:
    return {
        "step": step,
        "wall_s": step * step_s,
        "rollout_tokens": line.get("actors/rollout_tokens", 0.0),
        "teacher_tokens": line.get("teacher/scored_tokens", 0.0),
        "miou": values["miou"],
        "r1_07": values["r1@0.7"],
    }


def seconds_to(curve: Sequence[dict[str, float]], target: float) -> float:
    """Wall seconds of training until the first evaluation with this mIoU; infinite if there is none."""
    return min((p["wall_s"] for p in curve if p["miou"] >= target), default=math.inf)


def draw(rows: dict[str, list[dict[str, Any]]]) -> Figure:
    """Held-out mIoU and R1@0.7, mean over seeds with their range, against what was spent."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharey="row")
    for place, (kind, of_kind) in enumerate(rows.items()):
        curves = [row["curve"] for row in of_kind]
        for row, metric in enumerate(("miou", "r1_07")):
            values = np.array([[p[metric] for p in curve] for curve in curves])
            for column, axis in enumerate(AXES):
                spent = np.mean([[p[axis] for p in curve] for curve in curves], axis=0)
                if spent[-1] == 0:
                    continue
                axes = panels[row][column]
                axes.plot(spent, values.mean(0), label=kind, color=f"C{place}", marker=".")
                axes.fill_between(spent, values.min(0), values.max(0), color=f"C{place}", alpha=0.15)
    for column, label in enumerate(AXES.values()):
        panels[1][column].set(xlabel=label)
        for axes in panels[:, column]:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for row, label in enumerate(("mIoU", "R1@0.7")):
        panels[row][0].set(ylabel=f"held-out {label}")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right")  # pyright: ignore  # its stubs lack it
    return figure


def table_of(rows: dict[str, list[dict[str, Any]]], target: float) -> tuple[list[str], list[list[str]]]:
    """Header and lines: mean (lowest to highest) over seeds."""
    header = [
        "",
        "mIoU",
        "R1@0.7",
        "s an update",
        "wall s",
        "rollout tokens",
        "teacher tokens",
        f"s to mIoU {target}",
    ]
    lines = []
    for kind, of_kind in rows.items():
        columns = ("miou", "r1_07", "step_s", "wall_s", "rollout_tokens", "teacher_tokens")
        times = sorted(seconds_to(row["curve"], target) for row in of_kind)
        reached = [t for t in times if math.isfinite(t)]
        told = (
            f"{np.median(reached):.0f} ({len(reached)} of {len(times)} seeds)" if reached else "not reached"
        )
        lines.append([kind, *(spread([row[c] for row in of_kind]) for c in columns), told])
    return header, lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objectives", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values of every run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=DEFAULT_KINDS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="updates of every run")
    parser.add_argument("--target", type=float, default=0.75, help="mIoU to which time is measured")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/objectives"),
        help="folder of runs, rows.jsonl, picture and report; what is there is not run again",
    )
    parser.add_argument("--quick", action="store_true", help="opd_topk and grpo, one seed, 10 updates")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kinds, arguments.seeds, arguments.steps = ["opd_topk", "grpo"], 1, EVAL_EVERY
    out = arguments.out.resolve()
    done = {key_of(row): row for row in read_rows(out / "rows.jsonl")}
    rows = []
    for seed in range(arguments.seeds):
        for kind in arguments.kinds:
            wanted = key_of(
                {"kind": kind, "seed": seed, "steps": arguments.steps, "overrides": arguments.overrides}
            )
            if wanted not in done:
                done[wanted] = measure(kind, seed, out / "runs", arguments.steps, arguments.overrides)
                append_row(out / "rows.jsonl", done[wanted])
            rows.append(done[wanted])
    report(by_kind(rows), arguments.target, out)
    print(json.dumps({"rows": [{k: v for k, v in row.items() if k != "curve"} for row in rows]}))


def report(rows: dict[str, list[dict[str, Any]]], target: float, out: Path) -> None:
    """The table on the terminal; objectives.png and report.html in `out`."""
    first = next(iter(rows.values()))
    header, lines = table_of(rows, target)
    title = (
        f"{first[0]['curve'][-1]['step']} updates of {GROUPS} prompts, mean (lowest to highest) of "
        f"{len(first)} seed(s); mIoU before {first[0]['curve'][0]['miou']:.3f}"
    )
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=180).print(table)
    if "grpo" in rows:
        grpo = np.median([row["step_s"] for row in rows["grpo"]])
        for kind in (k for k in rows if k.startswith("opd")):
            share = np.median([row["step_s"] for row in rows[kind]]) / grpo
            print(f"wall time per update at equal prompts, {kind} : grpo with G = {ROLLOUTS}: {share:.2f}")
    figure = draw(rows)
    figure.savefig(out / "objectives.png", dpi=110)
    html = jinja2.Environment(autoescape=True).from_string(PAGE)
    write_atomically(
        out / "report.html", html.render(title=title, header=header, lines=lines, picture=embed(figure))
    )


if __name__ == "__main__":
    main()
