"""What each objective learns and costs, from the same student, data, frames and number of updates.

`python -m benchmarks.objectives [--quick] [--out DIR]`. grpo samples 8 responses to each of as many prompts
as the others have; grpo/8 takes an eighth of the prompts, and so as many rollouts as the others. Prints a
table and writes objectives.png and report.html; the last line is one JSON object.
"""

import itertools
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

import launch
from benchmarks import command
from benchmarks.command import Row, by_kind, spread
from driver.records.report import embed
from driver.records.sinks import read_metrics
from video_opd.config_file import load_demo
from video_opd.files.run_folder import write_atomically

GROUPS, NUM_STEPS, EVAL_EVERY, ROLLOUTS, LR = 32, 40, 10, 8, 3e-4
GRPO = ["loss={kind: grpo}", f"rollout.rollouts_per_prompt={ROLLOUTS}"]
KINDS: dict[str, list[str]] = {
    "opd": ["loss={kind: opd, clamp: 3, center: batch}"],
    "opd_topk": ["loss={kind: opd_topk, top_k: 32, clamp: 3}"],
    "opd_full": ["loss={kind: opd_full}"],
    "opd_full jsd": ["loss={kind: opd_full, divergence: jsd}"],
    "grpo": GRPO,
    "grpo/8": [*GRPO, f"groups_per_step={GROUPS // ROLLOUTS}"],
    "off_policy_rkd": ["loss={kind: off_policy_rkd, clamp: 3}"],
    "off_policy_fkd": ["loss={kind: off_policy_fkd}"],
    "sft": ["loss={kind: sft}"],
    **{f"opd_topk K={k}": [f"loss={{kind: opd_topk, top_k: {k}, clamp: 3}}"] for k in (1, 4, 128)},
}
DEFAULT_KINDS = [kind for kind in KINDS if "K=" not in kind]
# Key of a row -> heading:
COST = {"wall_s": "wall s", "rollout_tokens": "rollout tokens", "teacher_tokens": "teacher tokens"}
COLUMNS = {"miou": "mIoU", "r1_07": "R1@0.7", "step_s": "s an update", **COST}
AXES = {"step": "updates", **COST}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Objectives</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
  td, th { padding: .25rem .8rem; text-align: right; }
  img { max-width: 100%; }
</style>
<h1>Objectives</h1><p>{{ title }}</p>
<table><tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
<img alt="held-out mIoU and R1@0.7 against updates, seconds and tokens"
  src="data:image/png;base64,{{ picture }}">
</html>
"""


def measure(kind: str, seed: int, runs: Path, num_steps: int, overrides: Sequence[str]) -> Row:
    """One run: its cost and its held-out curve. `step_s`: median of an update, without evaluation."""
    name = re.sub(r"\W", "-", f"{kind} {seed}")
    values = {"runs_dir": runs, "run_name": name, "seed": seed, "num_steps": num_steps, "learner.lr": LR}
    values |= {"groups_per_step": GROUPS, "eval_every": EVAL_EVERY}
    values |= {"max_policy_lag": 0}  # phases do not overlap: the seconds of an update are its own
    config = load_demo([*(f"{k}={v}" for k, v in values.items()), *KINDS[kind], *overrides])
    shutil.rmtree(runs / name, ignore_errors=True)  # left by an interrupted run
    summary = launch.launch(config)
    lines = read_metrics(runs / name)
    step_s = float(np.median([line["time/step_s"] for line in lines]))

    def point(step: int, line: Mapping[str, float], miou: float, r1_07: float) -> dict[str, float]:
        rollout, scored = (line.get(k, 0.0) for k in ("actors/rollout_tokens", "teacher/scored_tokens"))
        spent = {"wall_s": step * step_s, "rollout_tokens": rollout, "teacher_tokens": scored}
        return {"step": step, **spent, "miou": miou, "r1_07": r1_07}

    before, after, teacher = (summary[k] for k in ("student_before", "student_after", "teacher"))
    curve = [point(0, {}, before["miou"], before["r1@0.7"])]
    for line in lines:
        if "eval/miou" in line:
            curve.append(point(int(line["step"]) + 1, line, line["eval/miou"], line["eval/r1@0.7"]))
    row: Row = {"kind": kind, "seed": seed, "steps": num_steps, "overrides": list(overrides)}
    row |= {"miou": after["miou"], "r1_07": after["r1@0.7"]}
    row |= {"step_s": step_s, "wall_s": step_s * summary["steps"]}
    row |= {"rollout_tokens": summary["tokens"]["rollout"], "teacher_tokens": summary["tokens"]["scored"]}
    return row | {"teacher_miou": teacher["miou"] if teacher else None, "curve": curve}


def time_to(curves: Sequence[Sequence[dict[str, float]]], target: float) -> str:
    """Median training seconds until the first evaluation with this mIoU, over the seeds that reach it."""
    there = [[p["wall_s"] for p in curve if p["miou"] >= target] for curve in curves]
    reached = [times[0] for times in there if times]
    return f"{np.median(reached):.0f} ({len(reached)} of {len(curves)} seeds)" if reached else "not reached"


def draw(rows: dict[str, list[Row]]) -> Figure:
    """Held-out mIoU and R1@0.7, mean over seeds with their range, against what was spent."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharey="row")
    for number, (kind, of_kind) in enumerate(rows.items()):
        curves, color = [row["curve"] for row in of_kind], f"C{number}"
        for row, metric in enumerate(("miou", "r1_07")):
            values = np.array([[p[metric] for p in curve] for curve in curves])
            for axes, axis in zip(panels[row], AXES, strict=True):
                spent = np.mean([[p[axis] for p in curve] for curve in curves], axis=0)
                if spent[-1] > 0:
                    axes.plot(spent, values.mean(0), label=kind, color=color, marker=".")
                    axes.fill_between(spent, values.min(0), values.max(0), color=color, alpha=0.15)
    for axes, label in zip(panels[1], AXES.values(), strict=True):
        axes.set(xlabel=label)
    for axes in panels.flat:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0][0].set(ylabel="held-out mIoU")
    panels[1][0].set(ylabel="held-out R1@0.7")
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right")  # pyright: ignore  # its stubs lack it
    return figure


def report(rows: Sequence[Row], target: float, out: Path) -> None:
    """Prints the table and the result; writes objectives.png and report.html into `out`."""
    kinds = by_kind(rows)
    first = next(iter(kinds.values()))
    title = (
        f"{first[0]['curve'][-1]['step']} updates of {GROUPS} prompts, mean (lowest to highest) of "
        f"{len(first)} seed(s); mIoU before {first[0]['curve'][0]['miou']:.3f}"
    )
    shown = [
        {"": kind}
        | {heading: spread([row[key] for row in of_kind]) for key, heading in COLUMNS.items()}
        | {f"s to mIoU {target}": time_to([row["curve"] for row in of_kind], target)}
        for kind, of_kind in kinds.items()
    ]
    figure = draw(kinds)
    figure.savefig(out / "objectives.png", dpi=110)
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    write_atomically(out / "report.html", page.render(title=title, rows=shown, picture=embed(figure)))
    step_s = {kind: float(np.median([row["step_s"] for row in of_kind])) for kind, of_kind in kinds.items()}
    opd = [kind for kind in kinds if kind.startswith("opd") and "grpo" in kinds]
    ratios = {kind: step_s[kind] / step_s["grpo"] for kind in opd}
    runs = [{key: value for key, value in row.items() if key != "curve"} for row in rows]
    result: Row = {"rows": [{"objective": run["kind"], "updates": run["steps"]} | run for run in runs]}
    result["wall_ratio_opd_grpo"] = ratios.get("opd", ratios.get("opd_topk"))
    at_equal = f"grpo with G = {ROLLOUTS}"
    notes = [f"wall time per update at equal prompts, {k} : {at_equal}: {r:.2f}" for k, r in ratios.items()]
    command.print_result(result, title, shown, *notes)


def main() -> None:
    quick = "opd_topk and grpo, one seed, 10 updates"
    parser = command.make_parser("objectives", __doc__, quick, overrides=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=DEFAULT_KINDS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="updates of every run")
    parser.add_argument("--target", type=float, default=0.75, help="mIoU to which time is measured")
    kept = "folder of runs, rows.jsonl, picture and report; a run in rows.jsonl is not done again"
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help=kept)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kinds, arguments.seeds, arguments.steps = ["opd_topk", "grpo"], 1, EVAL_EVERY
    out, overrides = arguments.out.resolve(), arguments.overrides
    log = out / "rows.jsonl"
    done = {(r["kind"], r["seed"], r["steps"], *r["overrides"]): r for r in command.read_rows(log)}
    pairs = itertools.product(range(arguments.seeds), arguments.kinds)
    keys = [(kind, seed, arguments.steps, *overrides) for seed, kind in pairs]
    for key in keys:
        if key not in done:
            kind, seed, steps = key[:3]
            done[key] = command.in_new_process(measure, kind, seed, out / "runs", steps, overrides)
            command.append_row(log, done[key])
    report([done[key] for key in keys], arguments.target, out)


if __name__ == "__main__":
    main()
