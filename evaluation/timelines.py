"""A picture of a few prompts: the truth and the answer on the clip's time line."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.scoring import ScoredAnswer

NUM_SHOWN = 8
MAX_QUERY_CHARACTERS = 90


def draw_timelines(scored: Sequence[ScoredAnswer]) -> Figure:
    """One row a prompt, true spans above, the answer below; evenly spread over `scored`, at most NUM_SHOWN."""
    num = min(NUM_SHOWN, len(scored))
    shown = [scored[i * len(scored) // num] for i in range(num)]
    figure = Figure(figsize=(9, 0.4 + 1.1 * num), layout="constrained")
    for axes, answer in zip(figure.subplots(num, 1, squeeze=False)[:, 0], shown, strict=True):
        question, duration = answer.question, answer.question.duration_s
        for start, end in question.answer_spans_s:
            axes.barh(1, end - start, left=start, color="C2", height=0.7)
        if answer.span_s is not None and answer.failure is None:
            start, end = answer.span_s
            axes.barh(0, end - start, left=start, color="C0", height=0.7)
        verdict = answer.failure if answer.failure is not None else f"IoU {answer.iou:.2f}"
        axes.set(yticks=(0, 1), yticklabels=("answer", "truth"), ylim=(-0.5, 1.5), xlim=(0, duration))
        title = (
            question.query
            if len(question.query) <= MAX_QUERY_CHARACTERS
            else question.query[:MAX_QUERY_CHARACTERS] + "..."
        )
        axes.set_title(f"{title} ({verdict})", fontsize="small", loc="left", parse_math=False)
        axes.tick_params(labelsize="x-small")
    figure.supxlabel("seconds", fontsize="small")
    return figure


def write_timelines(path: Path, scored: Sequence[ScoredAnswer]) -> None:
    """A PNG. Appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    draw_timelines(scored).savefig(temporary, format="png", dpi=110)
    temporary.rename(path)
