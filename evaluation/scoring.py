"""Scores answers: means over every prompt, counts of every kind of failure, bootstrap intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.protocols import Protocol
from video_opd.errors import DataError
from video_opd.grounding import THRESHOLDS, best_constant_interval, random_spans, summarise
from video_opd.types import Prompt, Span

METRICS = ("miou", *(f"r1@{m}" for m in THRESHOLDS))
NUM_RESAMPLES = 1000
DRAWN_AT_ONCE = 2_000_000  # videos: 16 MB
INTERVAL_PERCENT = (2.5, 97.5)  # of the resamples: a 95 % interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as scoring sees it: no frames."""

    prompt_id: str
    video: str  # clip id; questions of one video are resampled together
    query: str
    duration_s: float
    answer_spans_s: tuple[Span, ...]

    def __post_init__(self):
        duration_s, spans = self.duration_s, self.answer_spans_s
        if not spans or not np.isfinite([duration_s, *sum(spans, ())]).all() or duration_s <= 0:
            found = f"prompt {self.prompt_id}: duration {duration_s} s, true spans {list(spans)}"
            raise DataError(f"{found}: give it a positive duration and at least one finite span")


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """A question, its answer, and what a protocol makes of both."""

    question: Question
    text: str | None  # None: missing
    spans_s: tuple[Span, ...]  # as scored, in seconds; empty: the answer has no interval
    iou: float  # 0 for every failure
    is_reversed: bool  # as written; some protocols put it in order
    failure: str | None  # why the answer could not be right, whatever the truth; None: it could

    @property
    def is_out_of_range(self) -> bool:
        """Whether the interval reaches beyond the clip's end. No protocol clamps or forbids it."""
        return any(not max(span) <= self.question.duration_s for span in self.spans_s)


def questions_of(prompts: Sequence[Prompt]) -> list[Question]:
    """Raises DataError for a prompt without ground truth."""
    questions = []
    for prompt in prompts:
        names = {"prompt_id": prompt.prompt_id, "video": prompt.clip.clip_id, "query": prompt.query}
        truth = tuple(prompt.answer_spans_s or ())
        questions.append(Question(**names, duration_s=prompt.clip.duration_s, answer_spans_s=truth))
    return questions


def score_answer(question: Question, text: str | None, protocol: Protocol, why_missing: str) -> ScoredAnswer:
    """`text` None: there is no answer, because of `why_missing`."""
    reading = None if text is None else protocol.parse(text)
    if reading is None:
        failure = why_missing if text is None else "no interval in the answer"
        return ScoredAnswer(question, text, spans_s=(), iou=0.0, is_reversed=False, failure=failure)
    spans_s = tuple(protocol.seconds(span, question.duration_s) for span in reading.spans)
    iou = protocol.score_set(reading.spans, question.answer_spans_s, question.duration_s)
    failures = [_failure(*span) for span in spans_s]
    failure = failures[0] if all(failures) else None
    return ScoredAnswer(question, text, spans_s, iou, reading.is_reversed, failure)


def _failure(start: float, end: float) -> str | None:
    if not (math.isfinite(start) and math.isfinite(end)):
        return "not finite"
    return ("reversed" if start > end else "zero length") if start >= end else None


def score_answers(
    questions: Sequence[Question],
    texts: Mapping[str, str | None],
    protocol: Protocol,
    why_missing: Mapping[str, str],
) -> list[ScoredAnswer]:
    """One for each question, in order. `texts` and `why_missing` are by prompt id and may lack some."""
    return [
        score_answer(q, texts.get(q.prompt_id), protocol, why_missing.get(q.prompt_id, "no prediction"))
        for q in questions
    ]


def summarise_answers(scored: Sequence[ScoredAnswer], protocol: Protocol) -> dict[str, float]:
    """mIoU, R1@m, areas, n, and counts: unparsed (missing ones included), reversed, out of range, missing."""
    answers = [(a.spans_s, a.question.answer_spans_s) for a in scored]
    return {
        **summarise([a.iou for a in scored], sum(not a.spans_s for a in scored), protocol.reaches),
        **_areas(answers, protocol),
        "reversed": sum(a.is_reversed for a in scored),
        "out_of_range": sum(a.is_out_of_range for a in scored),
        "missing": sum(a.text is None for a in scored),
    }


def _areas(answers: Sequence[Any], protocol: Protocol) -> dict[str, float]:
    """The protocol's areas over pairs (spans as scored, true spans)."""
    values = {name: [area(*pair) for pair in answers] for name, area in protocol.areas.items()}
    return {name: float(mean_of_counted(np.array(of))) for name, of in values.items()}


def metric_names(protocol: Protocol) -> tuple[str, ...]:
    return *METRICS, *protocol.areas


def heading(metric: str) -> str:
    """A metric's name in tables: mIoU, R1@0.5, IoU AUC."""
    return metric.replace("iou", "IoU").replace("r1", "R1").replace("_auc", " AUC")


def metric_values(scored: Sequence[ScoredAnswer], protocol: Protocol) -> np.ndarray:
    """float64[prompts, metrics]: what each prompt adds to the means, in metric_names' order; NaN: nothing."""
    ious = np.array([a.iou for a in scored])
    areas = [[f(a.spans_s, a.question.answer_spans_s) for a in scored] for f in protocol.areas.values()]
    return np.stack([ious, *(protocol.reaches(ious, m) for m in THRESHOLDS), *areas], axis=1)


def mean_of_counted(values: np.ndarray) -> np.ndarray:
    """Means over the first axis without NaN; 0 where there is nothing else."""
    counted = ~np.isnan(values)
    return np.where(counted, values, 0.0).sum(0) / np.maximum(counted.sum(0), 1)


def resampled_means(
    values: np.ndarray, videos: Sequence[str], seed: int, num_resamples: int
) -> np.ndarray:  # float64[resamples, metrics]
    """Means of float64[prompts, metrics] over VIDEOS drawn with replacement, each with all its prompts.

    NaN: a value that does not count.

    Answers about one video are not independent. A resample's value is the mean over its prompts (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, ch. 8, 13). Equal seeds draw equal videos.
    """
    names, of_prompt = np.unique(videos, return_inverse=True)
    num = len(names)
    sums, counts = np.zeros((2, num, values.shape[1]))
    np.add.at(sums, of_prompt, np.nan_to_num(values))
    np.add.at(counts, of_prompt, ~np.isnan(values))
    rng, means = np.random.default_rng(seed), []
    rows = max(1, DRAWN_AT_ONCE // num)
    for first in range(0, num_resamples, rows):
        drawn = rng.integers(0, num, (min(rows, num_resamples - first), num))
        at = drawn + num * np.arange(len(drawn))[:, None]
        times = np.bincount(at.ravel(), minlength=drawn.size).reshape(drawn.shape)  # [resamples, videos]
        means.append(times @ sums / np.maximum(times @ counts, 1.0))
    return np.concatenate(means)


def bootstrap_intervals(
    scored: Sequence[ScoredAnswer], protocol: Protocol, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of mIoU and R1@m, see resampled_means."""
    videos = [a.question.video for a in scored]
    means = resampled_means(metric_values(scored, protocol), videos, seed, num_resamples)
    low, high = np.percentile(means, INTERVAL_PERCENT, axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(metric_names(protocol))}


def blind_baselines(
    questions: Sequence[Question], train: Sequence[Prompt], protocol: Protocol, seed: int
) -> dict[str, Any]:
    """An interval drawn uniformly from each clip, and the one that is best on `train`, if it has labels.

    The best constant interval is chosen by the strict IoU; interval_frac is in shares of the duration.
    """

    def score(spans_s: Sequence[Span]) -> dict[str, Any]:
        pairs = zip(questions, spans_s, strict=True)
        ious = [protocol.score_seconds(span, q.answer_spans_s, q.duration_s) for q, span in pairs]
        answers = [([span], q.answer_spans_s) for q, span in zip(questions, spans_s, strict=True)]
        return summarise(ious, reached=protocol.reaches) | _areas(answers, protocol)

    durations = [q.duration_s for q in questions]
    baselines = {}
    labelled = [(p.answer_spans_s, p.clip.duration_s) for p in train if p.answer_spans_s]
    if labelled:
        start, end = (float(x) for x in best_constant_interval(labelled))
        constant = score([(start * d, end * d) for d in durations])
        baselines["best_constant"] = constant | {"interval_frac": [start, end]}
    return baselines | {"random": score(random_spans(durations, seed))}
