"""A picture of a few prompts: the truth and the answer on the clip's time line."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.scoring import ScoredAnswer

NUM_SHOWN = 8
MAX_QUERY_CHARACTERS = 90


def draw_timelines(scored: Sequence[ScoredAnswer]) -> Figure:
    """At most NUM_SHOWN prompts, evenly spread over `scored`; a row each, true spans above the answer."""
    num = min(NUM_SHOWN, len(scored))
    shown = [scored[i * len(scored) // num] for i in range(num)]
    figure = Figure(figsize=(9, 0.4 + 1.1 * num), layout="constrained")
    for axes, answer in zip(figure.subplots(num, 1, squeeze=False)[:, 0], shown, strict=True):
        question, verdict = answer.question, answer.failure or f"IoU {answer.iou:.2f}"
        bars = [(1, span, "C2") for span in question.answer_spans_s]
        if not answer.failure:
            bars += [(0, span, "C0") for span in answer.spans_s]
        for row, (start, end), color in bars:
            axes.barh(row, end - start, left=start, color=color, height=0.7)
        axes.set(yticks=(0, 1), yticklabels=("answer", "truth"), ylim=(-0.5, 1.5))
        axes.set(xlim=(0, question.duration_s))
        dots = "..." if len(question.query) > MAX_QUERY_CHARACTERS else ""
        title = f"{question.query[:MAX_QUERY_CHARACTERS]}{dots} ({verdict})"
        axes.set_title(title, fontsize="small", loc="left", parse_math=False)
        axes.tick_params(labelsize="x-small")
    figure.supxlabel("seconds", fontsize="small")
    return figure


def write_timelines(path: Path, scored: Sequence[ScoredAnswer]) -> None:
    """Writes a PNG, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    draw_timelines(scored).savefig(temporary, format="png", dpi=110)
    temporary.rename(path)
