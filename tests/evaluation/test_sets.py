"""Protocols of sets: what they read, and their metrics against literal readings with exact numbers.

The expected intervals are what TimeLens2's own _extract_spans_from_prediction gives (a5ce450,
evaluation/vlmeval/dataset/vidi_vue_tr.py), before starts are rounded down and ends up.
"""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from evaluation.protocols import PROTOCOLS
from evaluation.scoring import (
    Question,
    blind_baselines,
    bootstrap_intervals,
    metric_names,
    score_answers,
    summarise_answers,
)
from evaluation.sets import read_timelens2
from video_opd.types import Span

VUE = PROTOCOLS["vue_tr"]
AUC = ("iou_auc", "precision_auc", "recall_auc")


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("[[0, 3.5], [10, 12]]", [(0, 3.5), (10, 12)]),
        ("[1, 2] and 5 - 6", [(1, 2)]),
        ("From 5 to 10, and from 15 TO 20.", [(5, 10), (15, 20)]),
        ("5-10\n15 - 20", [(5, 10), (15, 20)]),
        ("1 - 5-3 - 4", [(1, 5), (-3, 4)]),
        ("starts at 5 s and ends at 10 s", [(5, 10)]),
        ("5, 10, 15", [(5, 10)]),
        ("[-1, 2]", [(-1, 2)]),
        ("1.2.3 - 4", [(2.3, 4)]),
        ("[[9, 4], [5]]", [(9, 4)]),
        ("[]", []),
        ("3", []),
        ("no", []),
    ],
)
def test_timelens2_reads_brackets_else_joined_pairs_else_all_numbers(text, spans):
    assert list(read_timelens2(text)) == spans


def test_timelens2_scores_whole_seconds_outward_and_merged_answers():
    protocol = PROTOCOLS["timelens2"]
    reading = protocol.parse("[[2.2, 3.1], [3.9, 6.0], [9.5, 9.0]]")
    assert reading and reading.spans == ((2.0, 4.0), (3.0, 6.0), (9.0, 9.0)) and reading.is_reversed
    assert protocol.score_set(reading.spans, [(4.0, 8.0)], 12.0) == pytest.approx(2 / 6)
    assert protocol.score_set(reading.spans, [(0.0, 3.0), (5.0, 6.0)], 12.0) == pytest.approx(2 / 6)
    assert protocol.score_set([(8.0, 2.0)], [(2.0, 8.0)], 12.0) == 0.0, "not swapped"


def test_only_set_protocols_score_more_than_one_interval():
    text, truth = "[[0, 2], [4, 6]]", [(0.0, 2.0), (4.0, 6.0)]
    question = Question(prompt_id="p", video="v", query="q", duration_s=9.0, answer_spans_s=tuple(truth))
    spans = {name: score_answers([question], {"p": text}, p, {})[0] for name, p in PROTOCOLS.items()}
    sets = {name for name, a in spans.items() if len(a.spans_s) > 1}
    assert sets == {"strict_sets", "timelens2", "vue_tr"} and all(spans[name].iou == 1.0 for name in sets)
    assert all(len(a.spans_s) <= 1 for name, a in spans.items() if name not in sets)


def cells(spans: list[Span]) -> list[int]:
    """The seconds of each interval one by one, so those of two overlapping ones twice."""
    return [t for start, end in spans for t in range(int(min(start, end)), int(max(start, end)))]


def literal_areas(answers: list[tuple[list[Span], list[Span]]]) -> dict[str, Fraction]:
    """qa_eval.py's three areas for answers of disjoint ascending whole seconds, by counting seconds."""
    ious, precisions, recalls = [], [], []
    for spans, truth in answers:
        predicted, true = cells(spans), cells(truth)
        shared = len(set(predicted) & set(true))
        ious.append(Fraction(shared, len(set(predicted) | set(true))))
        recalls.append(Fraction(shared, len(true)))
        precisions += [Fraction(shared, len(predicted))] if predicted else []

    def area(curve: list[Fraction]) -> Fraction:
        return sum(((a + b) / 200 for a, b in pairwise(curve)), Fraction(0))

    at = [Fraction(i, 100) for i in range(101)]
    return {
        "iou_auc": area([Fraction(sum(x > t for x in ious), len(ious)) for t in at]),
        "precision_auc": area([Fraction(sum(x >= t for x in precisions), len(precisions) or 1) for t in at]),
        "recall_auc": area([Fraction(sum(x >= t for x in recalls), len(recalls)) for t in at]),
    }


def disjoint(rng: np.random.Generator, fewest: int) -> list[Span]:
    ends = np.sort(rng.choice(60, 2 * int(rng.integers(fewest, 4)), replace=False)).reshape(-1, 2)
    return [(float(start), float(end)) for start, end in ends]


def asked(answers: list[tuple[list[Span], list[Span]]]):
    names = {"query": "q", "duration_s": 60.0}
    questions = [
        Question(prompt_id=str(i), video=f"v{i % 3}", answer_spans_s=tuple(truth), **names)
        for i, (_, truth) in enumerate(answers)
    ]
    texts = {str(i): str([list(s) for s in spans]) for i, (spans, _) in enumerate(answers)}
    return questions, score_answers(questions, texts, VUE, {})


@pytest.mark.parametrize("seed", range(4))
def test_areas_of_vue_tr_are_those_of_counted_seconds(seed):
    rng = np.random.default_rng(seed)
    answers = [(disjoint(rng, 0), disjoint(rng, 1)) for _ in range(12)]
    questions, scored = asked(answers)
    summary, literal = summarise_answers(scored, VUE), literal_areas(answers)
    # a share of exactly i / 100 may fall on either side of numpy's threshold, in qa_eval.py too
    assert {name: summary[name] for name in AUC} == pytest.approx(
        {name: float(value) for name, value in literal.items()}, abs=0.011 / len(answers)
    )
    intervals = bootstrap_intervals(scored, VUE)
    assert tuple(intervals) == metric_names(VUE) and set(AUC) < intervals.keys()
    assert all(intervals[name][0] <= summary[name] + 1e-9 <= intervals[name][1] + 2e-9 for name in AUC)
    assert blind_baselines(questions, [], VUE, seed)["random"].keys() >= set(AUC)


def test_areas_of_vue_tr_by_hand():
    """Precision leaves out answers without any time, recall and IoU count them as 0."""
    _, scored = asked([([(0.0, 8.0)], [(0.0, 4.0)]), ([], [(0.0, 4.0)])])
    summary = summarise_answers(scored, VUE)
    assert summary["iou_auc"] == pytest.approx(0.495 / 2), "above 0.5: from 0 to 0.49"
    assert summary["precision_auc"] == pytest.approx(0.505), "reaches 0.5: from 0 to 0.50"
    assert summary["recall_auc"] == pytest.approx((1.0 + 0.005) / 2), "a recall of 0 reaches 0"
    assert (summary["miou"], summary["unparsed"], summary["n"]) == (0.25, 1, 2)
    _, nothing = asked([([], [(0.0, 4.0)])])
    assert summarise_answers(nothing, VUE)["precision_auc"] == 0.0


def test_intervals_out_of_order_cost_precision_as_in_qa_eval():
    """It walks both lists once without sorting them, so a true interval may find its match already passed."""
    _, unsorted = asked([([(6.0, 8.0), (0.0, 2.0)], [(0.0, 2.0), (6.0, 8.0)])])
    summary = summarise_answers(unsorted, VUE)
    assert (summary["precision_auc"], summary["miou"]) == (pytest.approx(0.505), 1.0)
