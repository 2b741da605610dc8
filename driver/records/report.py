"""What a person sees of a run: a progress bar while it runs, then a table and report.html."""

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from driver.clock import PHASES
from driver.passes import TERMINAL
from driver.records.answers import MODELS, disputed_answers, error_tables, largest_changes, prompt_ious
from driver.records.masking import masked_config
from driver.records.sinks import read_metrics
from video_opd.answers import parse_spans
from video_opd.config import Config
from video_opd.errors import ClipError, ModelError
from video_opd.files.run_folder import write_atomically
from video_opd.grounding import THRESHOLDS, describe_odd, merge
from video_opd.types import Prompt
from video_opd.video.frame_cache import FrameCache

COLUMNS = {"miou": "mIoU", **{f"r1@{m}": f"R1@{m}" for m in THRESHOLDS}}
NUM_EXAMPLE_FRAMES, MAX_ROUNDS_SHOWN = 12, 4
MAX_COLUMNS = 300  # of a curve; longer runs are drawn as a band with its median
ROWS = {
    "teacher": "teacher",
    "student_before": "student before",
    "student_after": "student after",
    "no_video": "student after, grey frames",
    "best_constant": "best constant interval",
    "random": "random interval",
}
EVALUATIONS = {"teacher": "C2", "student_after": "C0", "student_before": "C7", "best_constant": "C3"}
REVERSE_KL = {
    "learner/reverse_kl": ("all", "C1"),
    "learner/reverse_kl_time": ("tokens of a time", "C4"),
    "learner/reverse_kl_rest": ("the rest", "C7"),
}
COMPUTED, SEPARATE = "/computed_tokens", "/separate_tokens"  # ends of metrics; the run's totals add them up
ENTROPY = {"learner/entropy": ("student", "C0"), "teacher/entropy": ("teacher", "C1")}

Metrics = Sequence[Mapping[str, float]]  # the lines of metrics.jsonl
ShowStep = Callable[[Mapping[str, float]], None]  # advances the bar by a step, shows its main metrics


@contextmanager
def progress_bar(num_steps: int, done: int) -> Iterator[ShowStep]:
    """A progress bar over the run's steps on stderr."""
    columns = "step", bars.MofNCompleteColumn(), bars.BarColumn(), "{task.fields[numbers]}"
    times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    with bars.Progress(*columns, *times, console=TERMINAL) as progress:
        task = progress.add_task("train", total=num_steps, completed=done, numbers="")

        def show(metrics: Mapping[str, float]) -> None:
            miou, kl = metrics["actors/miou"], metrics.get("learner/reverse_kl", math.nan)
            numbers = f"rollout mIoU {miou:.2f}  reverse KL {kl:.3f}  {metrics['time/step_s']:.1f} s/step"
            progress.update(task, advance=1, numbers=numbers)

        yield show


def print_summary(folder: Path, summary: dict[str, Any]) -> None:
    n = summary["baselines"]["random"]["n"]
    table = Table("", title=f"held-out split, {n} prompts, loss {summary['loss']}, seed {summary['seed']}")
    for name in (*COLUMNS.values(), "unparsed"):
        table.add_column(name, justify="right")
    for name, values, unparsed in _rows(summary):
        table.add_row(name, *values, str(unparsed))
    console = Console()
    console.print(table)
    student = "not evaluated"
    if summary["student_after"]:
        before, after = summary["student_before"], summary["student_after"]["miou"]
        teacher = summary["teacher"]["miou"] if summary["teacher"] else 0.0
        share = f", {after / teacher:.0%} of the teacher's" if teacher else ""
        student = f"mIoU {after - before['miou']:+.3f}{share}" if before else f"mIoU {after:.3f}{share}"
    steps = f"after {summary['steps']} steps in {summary['seconds']['total'] / 60:.1f} min"
    console.print(f"{student}, {steps}; {len(summary['dropped'])} prompts dropped")
    console.print(f"video budget: {summary['video']}", soft_wrap=True)
    if shared := describe_shared(summary):
        console.print(shared, soft_wrap=True)
    if odd := summary["odd_truth"]:
        console.print(describe_odd(odd), soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def describe_shared(summary: dict[str, Any]) -> str:
    """Tokens that passes computed, against those of separate sequences; empty where they are not counted."""
    tokens, told = summary["tokens"], []
    for name, separate in tokens.items():
        if name.endswith(SEPARATE) and separate:
            role = name.removesuffix(SEPARATE)
            computed = tokens[role + COMPUTED]
            told.append(f"{role} {computed:,.0f} of {separate:,.0f} ({1 - computed / separate:.0%} saved)")
    return f"tokens computed: {', '.join(told)}" if told else ""


def write_report(
    folder: Path, config: Config, prompts: Sequence[Prompt], summary: dict[str, Any]
) -> list[Path]:
    """Writes report.html, one self-contained file, and of its pictures learning.png and timelines/*.png.

    Returns these files."""
    metrics = read_metrics(folder)
    learning = _learning(metrics, summary)
    learning.savefig(folder / "learning.png", dpi=110)
    cache = FrameCache(config.video)
    answered = [p for p in prompts if p.prompt_id not in summary["failed_eval"]]
    texts, as_sets = summary["examples"], config.prompt.asks_for_sets
    ious = prompt_ious(answered, texts, as_sets)
    try:
        disputed, why_not = disputed_answers(folder / "trajectories", Path(config.student)), ""
    except ModelError as error:
        disputed, why_not = [], str(error)
    changes = [
        (caption, embed(_example(p, _frames(cache, p), texts, as_sets)))
        for caption, p in largest_changes(answered, ious)
    ]
    source = Path(__file__).with_name("report.html.jinja").read_text()
    html = jinja2.Template(source, autoescape=True).render(
        name=folder.name,
        summary=summary,
        rows=_rows(summary),
        shared=describe_shared(summary),
        columns=COLUMNS.values(),
        learning=embed(learning),
        policy=embed(_policy(metrics)),
        phases=embed(_phases(metrics)),
        curriculum=[(what, embed(figure)) for what, figure in _curriculum(folder, config, metrics)],
        examples=changes,
        errors=error_tables(answered, ious),
        disputed=disputed,
        not_disputed=why_not,
        config=json.dumps(masked_config(config), indent=2),
    )
    write_atomically(folder / "report.html", html)
    (folder / "timelines").mkdir(exist_ok=True)
    pictures = [folder / "timelines" / f"timeline-{number}.png" for number in range(1, len(changes) + 1)]
    for path, (_, png) in zip(pictures, changes, strict=True):
        path.write_bytes(base64.b64decode(png))
    return [folder / "report.html", folder / "learning.png", *pictures]


def embed(figure: Figure) -> str:
    """The figure as base64 of a PNG, for a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _rows(summary: dict[str, Any]) -> list[tuple[str, list[str], int]]:
    """Name, values and number of unparsed answers of every model and baseline that was evaluated."""
    scores = summary | summary["baselines"]
    lines = {label: scores[name] for name, label in ROWS.items() if scores[name]}
    return [(label, [f"{v[c]:.3f}" for c in COLUMNS], v["unparsed"]) for label, v in lines.items()]


def _panels(height: float, columns: int = 1, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=sharey)[0])


def _series(metrics: Metrics, name: str) -> list[float]:
    return [m.get(name, math.nan) for m in metrics]


def thinned(steps: Sequence[float], low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """float64[4, columns]: first step, lowest and median of `low`, highest of `high` of each part of a run.

    At most MAX_COLUMNS parts keep all extremes. Values that are not finite are left out.
    """
    points = np.array([steps, low, high], dtype=float)
    points = points[:, np.isfinite(points).all(0)]
    parts = np.array_split(points, min(MAX_COLUMNS, max(1, points.shape[1])), axis=1)
    columns = [(x[0], y.min(), np.median(y), z.max()) for x, y, z in parts if len(x)]
    return np.array(columns).reshape(-1, 4).T


def _curve(axes: Axes, steps: Sequence[float], values: Sequence[float], colour: str, **look: Any) -> None:
    """A line; of a long run the median, within a band from the lowest to the highest."""
    if len(steps) <= 2 * MAX_COLUMNS:
        axes.plot(steps, values, color=colour, **look)
        return
    step, low, median, high = thinned(steps, values, values)
    axes.fill_between(step, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(step, median, color=colour, **look)


def _plot(axes: Axes, metrics: Metrics, lines: Mapping[str, tuple[str, str]], ylabel: str) -> None:
    """Plots the metrics that the run has: `lines` gives the label and colour of each."""
    for name, (label, colour) in lines.items():
        if any(name in m for m in metrics):
            _curve(axes, _series(metrics, "step"), _series(metrics, name), colour, label=label, alpha=0.8)
            axes.legend(fontsize="x-small")
    axes.set(xlabel="step", ylabel=ylabel)


def _histogram(
    axes: Axes, shares: Mapping[str, np.ndarray], colours: list[str], bounds: tuple[float, float] | None
) -> None:
    """Stacked histogram of 40 bins within `bounds`, None: those of the values.

    The legend counts each share's finite values.
    """
    finite = [values[np.isfinite(values)] for values in shares.values()]
    labels = [f"{name}: {len(values)}" for name, values in zip(shares, finite, strict=True)]
    axes.hist(finite, bins=40, range=bounds, stacked=True, color=colours, label=labels)
    axes.legend(fontsize="x-small")


def _learning(metrics: Metrics, summary: dict[str, Any]) -> Figure:
    figure, (left, right) = _panels(3.2, 2)
    steps, rollouts = _series(metrics, "step"), _series(metrics, "actors/miou")
    _curve(left, steps, rollouts, "C0", alpha=0.35, label="rollouts of the step")
    evaluated = {m["step"] + 1: m["eval/miou"] for m in metrics if "eval/miou" in m}
    if evaluated:
        left.plot(list(evaluated), list(evaluated.values()), color="C0", marker="o", label="held-out split")
    scores = summary | summary["baselines"]
    for name, colour in EVALUATIONS.items():
        if scores[name]:
            left.axhline(scores[name]["miou"], color=colour, linestyle="--", label=ROWS[name])
    left.set(xlabel="step", ylabel="mIoU", ylim=(0, 1))
    left.legend(fontsize="x-small", loc="lower right")
    _plot(right, metrics, REVERSE_KL, "reverse KL, nats a token")
    return figure


def _policy(metrics: Metrics) -> Figure:
    """Entropy of student and teacher; importance ratios of the learner's policy to the sampling policy."""
    figure, (left, right) = _panels(2.6, 2)
    _plot(left, metrics, ENTROPY, "entropy, nats a token")
    names = "step", "learner/ratio_p01", "learner/ratio_p99"
    step, low, _, high = thinned(*(_series(metrics, name) for name in names))
    right.fill_between(step, low, high, alpha=0.3, label="1 to 99 %")
    _plot(right, metrics, {"learner/ratio_p50": ("median", "C0")}, "importance ratio")
    return figure


def _phases(metrics: Metrics) -> Figure:
    figure, (axes,) = _panels(2.2)
    names = (*PHASES, "idle")
    axes.barh(names, [float(np.median([m[f"time/{n}_s"] for m in metrics])) for n in names])
    axes.set(xlabel="median seconds a step (rollout and scoring overlap)")
    return figure


def _curriculum(folder: Path, config: Config, metrics: Metrics) -> list[tuple[str, Figure]]:
    """Captions and figures of what the curriculum did, for the last rounds."""
    paths = {int(p.stem.removeprefix("round-")): p for p in (folder / "curriculum").glob("round-*.parquet")}
    rounds = {number: pq.read_table(paths[number]) for number in sorted(paths)[-MAX_ROUNDS_SHOWN:]}
    figures = []
    if rounds and config.curriculum.trpv and config.curriculum.asks_teacher:
        validation = _validation(next(iter(rounds.values())), config.curriculum.teacher_threshold)
        figures.append(("teacher IoU, kept and dropped", validation))
    asked = {n: records for n, records in rounds.items() if records["disagreement"].null_count < len(records)}
    if asked:
        figures.append(("disagreement by round", _disagreements(asked, not config.curriculum.scores_student)))
    if config.curriculum.suspends:
        figure, (axes,) = _panels(2.2)
        _plot(axes, metrics, {"curriculum/suspended_frac": ("suspended", "C4")}, "share of rollouts")
        figures.append(("share of rollouts suspended", figure))
    return figures


def _validation(records: pa.Table, threshold: float) -> Figure:
    figure, (axes,) = _panels(2.4)
    tau, dropped = records["teacher_iou"].to_numpy(), records["dropped"].to_numpy() != ""
    _histogram(axes, {"kept": tau[~dropped], "dropped": tau[dropped]}, ["C2", "C3"], (0, 1))
    axes.axvline(threshold, color="black", linestyle=":")
    axes.set(xlabel="teacher IoU (mean over its answers)", ylabel="prompts")
    return figure


def _disagreements(rounds: dict[int, pa.Table], of_ious: bool) -> Figure:
    """The disagreement on each prompt of the pool, by round: selected and left."""
    figure, panels = _panels(2.6, len(rounds), sharey=True)
    bounds, label = ((-1, 1), "disagreement") if of_ious else (None, "reverse KL, nats")
    for axes, (number, every) in zip(panels, rounds.items(), strict=True):
        records = every.filter(pc.field("dropped") == "")
        delta, selected = records["disagreement"].to_numpy(), records["selected"].to_numpy()
        _histogram(axes, {"selected": delta[selected], "left": delta[~selected]}, ["C0", "C7"], bounds)
        axes.set(xlabel=label, title=f"round {number}")
    panels[0].set(ylabel="prompts")
    return figure


def _frames(cache: FrameCache, prompt: Prompt) -> np.ndarray | str:
    """uint8[F, H, W, 3], or why the clip cannot be read here; an actor may have read it elsewhere."""
    try:
        return cache.read(prompt.clip)
    except ClipError as error:
        return str(error)


def _example(
    prompt: Prompt, frames: np.ndarray | str, examples: dict[str, dict[str, str]], as_sets: bool = False
) -> Figure:
    """Frames of the clip, or why there are none, above the answers and the truth.

    `examples`: texts by evaluation and prompt id.
    """
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    strip, axes = figure.subplots(2, 1, height_ratios=[1, 1.6], sharex=True)
    duration = prompt.clip.duration_s
    if isinstance(frames, str):
        strip.text(0, 0.5, fill(frames, 110), fontsize="small", va="center", parse_math=False)
    else:
        shown = np.linspace(0, len(frames) - 1, min(NUM_EXAMPLE_FRAMES, len(frames))).round().astype(int)
        strip.imshow(np.concatenate(list(frames[shown]), axis=1), aspect="auto", extent=(0, duration, 0, 1))
    strip.set(yticks=[])
    strip.set_title(f'"{prompt.query}"', parse_math=False)
    texts = [examples.get(name, {}).get(prompt.prompt_id, "") for name in MODELS]
    bars_s = [
        (row, span, "C0") for row, text in enumerate(texts) for span in merge(parse_spans(text, as_sets))
    ]
    bars_s += [(len(MODELS), span, "C2") for span in prompt.answer_spans_s or ()]
    for row, (start, end), colour in bars_s:
        axes.barh(row, end - start, left=start, color=colour, height=0.6)
    axes.set(yticks=range(len(MODELS) + 1), yticklabels=[*MODELS.values(), "truth"])
    axes.set(xlim=(0, duration), xlabel="seconds")
    return figure
