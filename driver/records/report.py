"""What a run shows a person: progress while it runs, a table and report.html when it is done."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from driver.clock import PHASES
from driver.records.sinks import read_metrics
from video_opd.config import Config
from video_opd.files.run_folder import write_atomically
from video_opd.grounding import THRESHOLDS
from video_opd.models.prompting import parse_span
from video_opd.types import Prompt
from video_opd.video.frame_cache import FrameCache

COLUMNS = ("miou", *(f"r1@{m}" for m in THRESHOLDS))
NUM_EXAMPLES = 4
NUM_EXAMPLE_FRAMES = 12
MAX_ROUNDS_SHOWN = 4
REVERSE_KL = {
    "learner/reverse_kl": ("all", "C1"),
    "learner/reverse_kl_time": ("tokens of a time", "C4"),
    "learner/reverse_kl_rest": ("the rest", "C7"),
}


class StepProgress:
    """The bar of a run."""

    def __init__(self, progress: Progress, task: Any):
        self._progress, self._task = progress, task

    def advance(self, metrics: dict[str, float]) -> None:
        """One step is done; shows its main numbers."""
        self._progress.update(
            self._task,
            advance=1,
            numbers=f"rollout mIoU {metrics['actors/miou']:.2f}  reverse KL {metrics.get('learner/reverse_kl', math.nan):.3f}  "
            f"{metrics['time/step_s']:.1f} s/step",
        )


@contextmanager
def progress_bar(num_steps: int, done: int) -> Iterator[StepProgress]:
    """A bar over the steps of the run on the terminal."""
    columns = [TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}")]
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as progress:
        yield StepProgress(progress, progress.add_task("train", total=num_steps, completed=done, numbers=""))


def rows(summary: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The lines of the final table: models, then what can be had without one. A run without teacher or actors has fewer."""
    baselines = summary["baselines"]
    lines = [
        ("teacher", summary["teacher"]),
        ("student before", summary["student_before"]),
        ("student after", summary["student_after"]),
        ("student after, grey frames", baselines["no_video"]),
        ("best constant interval", baselines["best_constant"]),
        ("random interval", baselines["random"]),
    ]
    return [(name, values) for name, values in lines if values]


def print_summary(folder: Path, summary: dict[str, Any]) -> None:
    """The final table on standard output."""
    n = summary["baselines"]["random"]["n"]
    table = Table(title=f"held-out split, {n} prompts, loss {summary['loss']}, seed {summary['seed']}")
    table.add_column("")
    for name in ("mIoU", *(f"R1@{m}" for m in THRESHOLDS), "unparsed"):
        table.add_column(name, justify="right")
    for name, values in rows(summary):
        table.add_row(name, *(f"{values[c]:.3f}" for c in COLUMNS), str(values["unparsed"]))
    console = Console()
    console.print(table)
    student = _improvement(summary) if summary["student_after"] else "not evaluated"
    minutes = summary["seconds"]["total"] / 60
    console.print(
        f"{student}, after {summary['steps']} steps in {minutes:.1f} min; {len(summary['dropped'])} prompts dropped"
    )
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _improvement(summary: dict[str, Any]) -> str:
    before, after = summary["student_before"]["miou"], summary["student_after"]["miou"]
    teacher = summary["teacher"]["miou"] if summary["teacher"] else 0.0
    return f"mIoU {after - before:+.3f}" + (f", {after / teacher:.0%} of the teacher's" if teacher else "")


def _learning(metrics: Sequence[dict[str, float]], summary: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [m["step"] for m in metrics]
    left.plot(steps, _series(metrics, "actors/miou"), color="C0", alpha=0.35, label="rollouts of the step")
    evaluated = {m["step"] + 1: m["eval/miou"] for m in metrics if "eval/miou" in m}
    if evaluated:
        left.plot(list(evaluated), list(evaluated.values()), color="C0", marker="o", label="held-out split")
    for name, colour in (("teacher", "C2"), ("student_after", "C0"), ("student_before", "C7")):
        if summary[name]:
            left.axhline(summary[name]["miou"], color=colour, linestyle="--", label=name.replace("_", " "))
    left.axhline(
        summary["baselines"]["best_constant"]["miou"],
        color="C3",
        linestyle=":",
        label="best constant interval",
    )
    left.set(xlabel="step", ylabel="mIoU", ylim=(0, 1))
    left.legend(fontsize="x-small", loc="lower right")
    for name, (label, colour) in REVERSE_KL.items():
        if any(name in m for m in metrics):
            right.plot(steps, _series(metrics, name), color=colour, label=label, alpha=0.8)
            right.legend(fontsize="x-small")
    right.set(xlabel="step", ylabel="reverse KL, nats a token")
    return figure


def _series(metrics: Sequence[dict[str, float]], name: str) -> list[float]:
    return [m.get(name, math.nan) for m in metrics]


def _policy(metrics: Sequence[dict[str, float]]) -> Figure:
    """How sure student and teacher are, and how far the learner's policy is from the one that sampled."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [m["step"] for m in metrics]
    for name, label in (("learner/entropy", "student"), ("teacher/entropy", "teacher")):
        left.plot(steps, _series(metrics, name), label=label)
    left.set(xlabel="step", ylabel="entropy, nats a token")
    left.legend(fontsize="x-small")
    right.plot(steps, _series(metrics, "learner/ratio_p50"), color="C0", label="median")
    right.fill_between(
        steps,
        _series(metrics, "learner/ratio_p01"),
        _series(metrics, "learner/ratio_p99"),
        alpha=0.3,
        label="1 to 99 %",
    )
    right.set(xlabel="step", ylabel="importance ratio")
    right.legend(fontsize="x-small")
    return figure


def _phases(metrics: Sequence[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    names = (*PHASES, "idle")
    axes.barh(names, [float(np.median([m[f"time/{n}_s"] for m in metrics])) for n in names])
    axes.set(xlabel="median seconds a step (rollout and scoring overlap)")
    return figure


def _validation(records: pa.Table, threshold: float) -> Figure:
    """tau of every prompt: kept and dropped by TRPV."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots()
    tau, dropped = records["teacher_iou"].to_numpy(), records["dropped"].to_numpy() != ""
    shares = {
        name: tau[which & np.isfinite(tau)] for name, which in (("kept", ~dropped), ("dropped", dropped))
    }
    labels = [f"{name}: {len(values)}" for name, values in shares.items()]
    axes.hist(
        list(shares.values()),
        bins=np.linspace(0, 1, 41).tolist(),
        stacked=True,
        color=["C2", "C3"],
        label=labels,
    )
    axes.axvline(threshold, color="black", linestyle=":")
    axes.set(xlabel="teacher IoU (mean over its answers)", ylabel="prompts")
    axes.legend(fontsize="x-small")
    return figure


def _disagreements(rounds: dict[int, pa.Table]) -> Figure:
    """delta of every prompt that is not dropped, round by round: selected and left."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, len(rounds), squeeze=False, sharey=True)[0]
    for axes, (number, every) in zip(panels, rounds.items(), strict=True):
        records = every.filter(pc.field("dropped") == "")
        delta, selected = records["disagreement"].to_numpy(), records["selected"].to_numpy()
        shares = {
            name: delta[which & np.isfinite(delta)]
            for name, which in (("selected", selected), ("left", ~selected))
        }
        labels = [f"{name}: {len(values)}" for name, values in shares.items()]
        axes.hist(
            list(shares.values()),
            bins=np.linspace(-1, 1, 41).tolist(),
            stacked=True,
            color=["C0", "C7"],
            label=labels,
        )
        axes.set(xlabel="disagreement", title=f"round {number}")
        axes.legend(fontsize="x-small")
    panels[0].set(ylabel="prompts")
    return figure


def _routing(metrics: Sequence[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([m["step"] for m in metrics], [m["curriculum/suspended_frac"] for m in metrics], color="C4")
    axes.set(xlabel="step", ylabel="share of rollouts suspended", ylim=(0, 1))
    return figure


def _curriculum(
    folder: Path, config: Config, metrics: Sequence[dict[str, float]]
) -> list[tuple[str, Figure]]:
    """The curriculum's pictures with what they show, where it has something to show; the last rounds of many."""
    paths = {
        int(path.stem.removeprefix("round-")): path
        for path in (folder / "curriculum").glob("round-*.parquet")
    }
    rounds = {number: pq.read_table(paths[number]) for number in sorted(paths)[-MAX_ROUNDS_SHOWN:]}
    figures = []
    if rounds and config.curriculum.trpv and config.curriculum.asks_teacher:
        figures.append(
            (
                "teacher IoU, kept and dropped",
                _validation(next(iter(rounds.values())), config.curriculum.teacher_threshold),
            )
        )
    asked = {
        number: records
        for number, records in rounds.items()
        if records["disagreement"].null_count < len(records)
    }
    if asked:
        figures.append(("disagreement by round", _disagreements(asked)))
    if config.curriculum.kind == "scc":
        figures.append(("share of rollouts suspended", _routing(metrics)))
    return figures


def _example(prompt: Prompt, frames: np.ndarray, texts: dict[str, str]) -> Figure:
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    strip, axes = figure.subplots(2, 1, height_ratios=[1, 1.6], sharex=True)
    shown = frames[np.linspace(0, len(frames) - 1, min(NUM_EXAMPLE_FRAMES, len(frames))).round().astype(int)]
    duration = prompt.clip.duration_s
    strip.imshow(np.concatenate(list(shown), axis=1), aspect="auto", extent=(0, duration, 0, 1))
    strip.set(yticks=[], title=f'"{prompt.query}"')
    spans = {
        "teacher": texts.get("teacher"),
        "after": texts.get("student_after"),
        "before": texts.get("student_before"),
    }
    for height, (_name, text) in enumerate(reversed(spans.items())):
        span = parse_span(text) if text else None
        if span and span[1] > span[0]:
            axes.barh(height, span[1] - span[0], left=span[0], color="C0", height=0.6)
    for start, end in prompt.answer_spans_s or ():
        axes.barh(len(spans), end - start, left=start, color="C2", height=0.6)
    axes.set(
        yticks=range(len(spans) + 1),
        yticklabels=[*reversed(spans), "truth"],
        xlim=(0, duration),
        xlabel="seconds",
    )
    return figure


def embed(figure: Figure) -> str:
    """The figure as base64 of a PNG, for a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def write_report(folder: Path, config: Config, prompts: Sequence[Prompt], summary: dict[str, Any]) -> None:
    """report.html, one file that needs nothing else, and learning.png, its first picture."""
    metrics = read_metrics(folder)
    learning = _learning(metrics, summary)
    learning.savefig(folder / "learning.png", dpi=110)
    cache, readable = (
        FrameCache(config.video),
        [p for p in prompts if p.prompt_id not in summary["failed_eval"]],
    )
    examples = [
        embed(
            _example(
                p,
                cache.read(p.clip),
                {k: v[p.prompt_id] for k, v in summary["examples"].items() if p.prompt_id in v},
            )
        )
        for p in readable[:NUM_EXAMPLES]
    ]
    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_name("report.html.jinja").read_text()
    )
    html = template.render(
        name=folder.name,
        summary=summary,
        rows=[
            (name, [f"{values[c]:.3f}" for c in COLUMNS], values["unparsed"])
            for name, values in rows(summary)
        ],
        columns=["mIoU", *(f"R1@{m}" for m in THRESHOLDS)],
        learning=embed(learning),
        policy=embed(_policy(metrics)),
        phases=embed(_phases(metrics)),
        curriculum=[(what, embed(figure)) for what, figure in _curriculum(folder, config, metrics)],
        examples=examples,
        config=config.model_dump_json(indent=2),
    )
    write_atomically(folder / "report.html", html)
