"""Two sets of answers to the same questions, side by side: differences, their intervals, and the prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from evaluation.protocols import Protocol
from evaluation.scoring import (
    INTERVAL_PERCENT,
    Question,
    ScoredAnswer,
    heading,
    mean_of_counted,
    metric_names,
    metric_values,
    resampled_means,
)
from video_opd.errors import DataError

NUM_RESAMPLES = 10_000
NUM_SHOWN = 5  # of the prompts that got better, and of those that got worse
SAME_IOU = 1e-9  # a smaller difference is none


def check_same_questions(a: Sequence[Question], b: Sequence[Question], names: tuple[str, str]) -> None:
    """Raises DataError unless both have the same prompts, of the same videos, queries and truth."""
    of_a, of_b = ({q.prompt_id: q for q in questions} for questions in (a, b))
    only = zip((of_a.keys() - of_b, of_b.keys() - of_a), names, strict=True)
    changed = sorted(name for name in of_a.keys() & of_b.keys() if of_a[name] != of_b[name])
    found = [f"{len(ids)} prompts are only in {name}" for ids, name in only if ids]
    if changed:
        found.append(f"{len(changed)} have another video, query, duration or truth (the first: {changed[0]})")
    if found:
        why = f"do not answer the same questions: {', '.join(found)}"
        raise DataError(f"{names[0]} and {names[1]} {why}: evaluate both with the same data.eval")


def compare(
    a: Sequence[ScoredAnswer], b: Sequence[ScoredAnswer], protocol: Protocol, seed: int = 0
) -> dict[str, Any]:
    """Metrics of A, of B, and B - A with a paired 95 % percentile interval; prompts by their change of IoU.

    `a` and `b` answer the same questions in the same order. Each resample draws videos once and takes both
    answers of each of their prompts, so what makes a video hard cancels out (see resampled_means).
    """
    values_a, values_b = metric_values(a, protocol), metric_values(b, protocol)
    videos = [x.question.video for x in a]
    means = [resampled_means(values, videos, seed, NUM_RESAMPLES) for values in (values_a, values_b)]
    low, high = np.percentile(means[1] - means[0], INTERVAL_PERCENT, axis=0)
    of_a, of_b = mean_of_counted(values_a), mean_of_counted(values_b)
    columns = np.stack([of_a, of_b, of_b - of_a, low, high], axis=1).tolist()
    metrics = {
        name: {"a": of_a, "b": of_b, "difference": by, "interval_95": interval}
        for name, (of_a, of_b, by, *interval) in zip(metric_names(protocol), columns, strict=True)
    }
    changes = sorted(zip(a, b, strict=True), key=lambda pair: pair[0].iou - pair[1].iou)  # best first
    better = [pair for pair in changes if pair[1].iou - pair[0].iou > SAME_IOU]
    worse = [pair for pair in reversed(changes) if pair[0].iou - pair[1].iou > SAME_IOU]
    return {
        "protocol": protocol.name,
        "n": len(a),
        "num_videos": len({x.question.video for x in a}),
        "metrics": metrics,
        "better": len(better),
        "worse": len(worse),
        "same": len(a) - len(better) - len(worse),
        "most_better": [_change(*pair) for pair in better[:NUM_SHOWN]],
        "most_worse": [_change(*pair) for pair in worse[:NUM_SHOWN]],
    }


def _change(a: ScoredAnswer, b: ScoredAnswer) -> dict[str, Any]:
    q, answers = a.question, {"iou_a": a.iou, "iou_b": b.iou, "text_a": a.text, "text_b": b.text}
    return {"prompt_id": q.prompt_id, "query": q.query, "answer_spans_s": q.answer_spans_s} | answers


def print_comparison(result: dict[str, Any]) -> None:
    """`result`: what compare gives, with `a` and `b`: name and video budget of each side."""
    title = f"protocol {result['protocol']}, {result['n']} prompts on {result['num_videos']} videos"
    table = Table("", "A", "B", "B - A", "95 % interval", title=title)
    for name, m in result["metrics"].items():
        low, high = m["interval_95"]
        values = f"{m['a']:.3f}", f"{m['b']:.3f}", f"{m['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}"
        table.add_row(heading(name), *values)
    Console().print(table)
    print(*(f"{side.upper()}: {result[side]['name']}, {result[side]['video']}" for side in "ab"), sep="\n")
    print(f"prompts: {result['better']} better in B, {result['worse']} worse, {result['same']} the same")
    for kind in ("better", "worse"):
        for x in result[f"most_{kind}"]:
            print(f"  {kind}: IoU {x['iou_a']:.2f} -> {x['iou_b']:.2f}  {x['prompt_id']}  {x['query']}")
