"""Temporal grounding metrics: IoU of intervals, R1@m, mIoU, and baselines that do not see the video."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from video_opd.types import FailedPrompt, Prediction, Prompt, Span

THRESHOLDS = (0.3, 0.5, 0.7)
ROUNDING = 1e-9  # an IoU that misses a threshold by less has reached it


def first_span(spans: Sequence[Span]) -> Span | None:
    """What counts where one interval is asked for; None: the answer could not be parsed."""
    return spans[0] if spans else None


def temporal_iou(a: Span, b: Span) -> float:
    """Intersection over union of two intervals; 0 if one is empty, reversed or not finite."""
    if not np.all(np.isfinite((*a, *b))) or a[1] <= a[0] or b[1] <= b[0]:
        return 0.0
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return intersection / ((a[1] - a[0]) + (b[1] - b[0]) - intersection)


def best_iou(span: Span | None, answers: Sequence[Span]) -> float:
    """The largest IoU with any answer; 0 for an unparsed response (None)."""
    return 0.0 if span is None else max((temporal_iou(span, answer) for answer in answers), default=0.0)


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same seconds in disjoint intervals, ascending; without empty, reversed and infinite ones."""
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if -math.inf < span[0] < span[1] < math.inf):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def duration_s(spans: Iterable[Span]) -> float:
    """The length of disjoint intervals together."""
    return sum(end - start for start, end in spans)


def shared_s(a: Sequence[Span], b: Sequence[Span]) -> float:
    """The seconds in both of two sets of disjoint, ascending intervals."""
    shared, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        shared += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return shared


def merged_iou(spans: Iterable[Span], answers: Iterable[Span]) -> float:
    """IoU of two sets of intervals, by the seconds that each covers; 0 where one covers none."""
    predicted, truth = merge(spans), merge(answers)
    shared = shared_s(predicted, truth)
    union = duration_s(predicted) + duration_s(truth) - shared
    return shared / union if shared > 0 else 0.0


def wasserstein_s(a: Iterable[Span], b: Iterable[Span]) -> float:
    """W1 in seconds between the uniform distributions over two sets: the integral of |F_a - F_b|.

    inf if either covers no time. Both distribution functions are linear between the ends of intervals.
    """
    sets = merge(a), merge(b)
    if not all(sets):
        return math.inf
    ends = np.unique(np.array(sets[0] + sets[1]))  # float64[E], ascending
    shares = []
    for spans in sets:
        lengths = np.diff(spans)[:, 0]
        reached = np.repeat(np.cumsum(lengths), 2)
        reached[::2] -= lengths  # float64[2 per span]: seconds covered before each end
        shares.append(np.interp(ends, np.ravel(spans), reached / lengths.sum()))
    gap = shares[0] - shares[1]
    left, right, widths = gap[:-1], gap[1:], np.diff(ends)
    size = np.abs(left) + np.abs(right)
    crosses = left * right < 0
    areas = np.where(crosses, (left**2 + right**2) / np.where(crosses, size, 1.0), size) / 2
    return float(areas @ widths)


def prompt_iou(spans: Sequence[Span], prompt: Prompt, multi_span: str) -> float:
    """IoU of an answer with the prompt's ground truth. multi_span: how several spans count.

    best: the answer's first with the nearest true one; merged: the seconds that either set covers.
    """
    truth = prompt.answer_spans_s or ()
    return merged_iou(spans, truth) if multi_span == "merged" else best_iou(first_span(spans), truth)


def reaches(ious: np.ndarray, threshold: float) -> np.ndarray:
    """bool[N]: IoU >= threshold, up to ROUNDING."""
    return ious >= threshold - ROUNDING


def summarise(
    ious: Sequence[float], num_unparsed: int = 0, reached: Callable[[np.ndarray, float], np.ndarray] = reaches
) -> dict[str, float]:
    """mIoU and R1@m, the share of IoUs that `reached` m. Failures count with an IoU of 0."""
    if not len(ious):
        raise ValueError("no prompts to summarise")
    values = np.asarray(ious, dtype=np.float64)
    recalls = {f"r1@{m}": float(reached(values, m).mean()) for m in THRESHOLDS}
    return {"miou": float(values.mean()), **recalls, "n": len(values), "unparsed": num_unparsed}


def odd_truth(truths: Iterable[tuple[Sequence[Span], float]]) -> dict[str, int]:
    """Prompts whose true spans are odd, by kind, from pairs (true spans, duration of the clip)."""
    kinds: dict[str, Callable[[float, float, float], bool]] = {
        "beyond_end": lambda start, end, duration: max(start, end) > duration + ROUNDING,
        "before_start": lambda start, end, _: min(start, end) < 0,
        "zero_length": lambda start, end, _: start == end,
        "reversed": lambda start, end, _: start > end,
    }
    pairs = list(truths)
    counts = {
        kind: sum(any(is_odd(*s, d) for s in spans) for spans, d in pairs) for kind, is_odd in kinds.items()
    }
    return {kind: count for kind, count in counts.items() if count}


def describe_odd(counts: Mapping[str, int]) -> str:
    """One line about what odd_truth counted."""
    kinds = ", ".join(f"{kind.replace('_', ' ')} {count}" for kind, count in counts.items())
    return f"odd truth, scored as published: {kinds}"


def evaluate(
    predictions: Sequence[Prediction], prompts: Sequence[Prompt | FailedPrompt], span_iou: str = "best"
) -> dict[str, float]:
    """Scores one prediction per prompt. A prompt without one counts as IoU 0 and as unparsed.

    span_iou: as prompt_iou's multi_span.
    """
    by_id = {p.prompt_id: p.spans_s for p in predictions}
    spans = [by_id.get(p.prompt_id, ()) for p in prompts]
    return summarise(_ious(spans, prompts, span_iou), spans.count(()))


def best_constant_interval(answers: Sequence[tuple[Sequence[Span], float]], grid: int = 24) -> Span:
    """The interval, in fractions of the duration, of highest mean IoU over pairs (answers, duration).

    Arrays are as long as there are spans, whatever the number of candidates.
    """
    ticks = np.linspace(0.0, 1.0, grid + 1)
    candidates = [(a, b) for i, a in enumerate(ticks) for b in ticks[i + 1 :]]
    every = [(*span, d) for spans, d in answers for span in spans or ((0.0, 0.0),)]
    starts, ends, durations = np.array(every, dtype=np.float64).T  # [S] spans of all P pairs
    first_of_pair = np.cumsum([0, *(max(len(spans), 1) for spans, _ in answers[:-1])])
    starts, ends = np.where(np.isfinite(starts + ends) & (starts < ends), (starts, ends), 0.0)

    def mean_iou(a: float, b: float) -> float:
        shared = np.maximum(np.minimum(b * durations, ends) - np.maximum(a * durations, starts), 0.0)
        union = (b * durations - a * durations) + (ends - starts) - shared
        return float(np.maximum.reduceat(shared / union, first_of_pair).mean())

    return max(candidates, key=lambda candidate: mean_iou(*candidate))  # the first of equals


def random_spans(durations_s: Sequence[float], seed: int) -> list[Span]:
    """One interval per clip, both ends uniform over it."""
    rng = np.random.default_rng(seed)
    return [tuple(np.sort(rng.uniform(0.0, d, size=2)).tolist()) for d in durations_s]


def blind_baselines(
    train: Sequence[Prompt],
    evaluation: Sequence[Prompt | FailedPrompt],
    seed: int = 0,
    span_iou: str = "best",
) -> dict[str, Any]:
    """Scores without a model: the constant interval that is best on `train`, and a random interval.

    best_constant is None if `train` has no labels. A prompt whose clip cannot be read counts as IoU 0.
    """
    labelled = [(p.answer_spans_s, p.clip.duration_s) for p in train if p.answer_spans_s]
    readable = [p for p in evaluation if isinstance(p, Prompt)]
    durations = [p.clip.duration_s for p in readable]
    failed = [0.0] * (len(evaluation) - len(readable))
    constant = None
    if labelled:
        start, end = best_constant_interval(labelled)
        constant = summarise(_ious([[(start * d, end * d)] for d in durations], readable, span_iou) + failed)
        constant |= {"interval_frac": [float(start), float(end)]}
    drawn = [[span] for span in random_spans(durations, seed)]
    random = summarise(_ious(drawn, readable, span_iou) + failed)
    return {"best_constant": constant, "random": random}


def _ious(
    spans: Sequence[Sequence[Span]], prompts: Sequence[Prompt | FailedPrompt], span_iou: str
) -> list[float]:
    pairs = zip(spans, prompts, strict=True)
    return [prompt_iou(of, p, span_iou) if isinstance(p, Prompt) else 0.0 for of, p in pairs]
