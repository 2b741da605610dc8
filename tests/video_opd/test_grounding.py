"""Temporal IoU and its summaries against slow literal readings."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import make_prompt
from video_opd.grounding import (
    best_constant_interval,
    best_iou,
    blind_baselines,
    describe_odd,
    evaluate,
    merged_iou,
    odd_truth,
    prompt_iou,
    summarise,
    temporal_iou,
    wasserstein_s,
)
from video_opd.types import Prediction, Span

TICK_S = 0.25
ticks = st.integers(0, 60)


def literal_iou(a: Span, b: Span) -> float:
    """Time cut into cells of a tick: cells in both intervals over cells in either."""
    cells_a, cells_b = (
        {i for i in range(100) if span[0] <= (i + 0.5) * TICK_S <= span[1]} for span in (a, b)
    )
    return len(cells_a & cells_b) / len(cells_a | cells_b) if cells_a | cells_b else 0.0


@given(a=st.tuples(ticks, ticks), b=st.tuples(ticks, ticks))
def test_iou_is_the_share_of_common_time_on_a_fine_grid(a, b):
    a, b = ((x * TICK_S, y * TICK_S) for x, y in (a, b))
    expected = literal_iou(a, b) if a[0] < a[1] and b[0] < b[1] else 0.0
    assert temporal_iou(a, b) == pytest.approx(expected, abs=1e-12)
    assert temporal_iou(b, a) == temporal_iou(a, b)


@given(start=st.floats(0, 1e4), length=st.floats(1e-3, 1e4))
def test_iou_of_an_interval_with_itself_is_one(start, length):
    span = (start, start + length)
    assert temporal_iou(span, span) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad",
    [
        (5.0, 2.0),
        (3.0, 3.0),
        (math.nan, 4.0),
        (1.0, math.nan),
        (1.0, math.inf),
        (-math.inf, 4.0),
        (math.nan, math.nan),
    ],
)
def test_iou_with_a_reversed_empty_or_unbounded_interval_is_zero(bad):
    assert temporal_iou(bad, (1.0, 4.0)) == 0.0
    assert temporal_iou((1.0, 4.0), bad) == 0.0
    assert temporal_iou(bad, bad) == 0.0


def test_iou_by_hand():
    assert temporal_iou((2.0, 6.0), (4.0, 8.0)) == pytest.approx(2 / 6)
    assert temporal_iou((0.0, 10.0), (4.0, 5.0)) == pytest.approx(0.1)
    assert temporal_iou((0.0, 1.0), (1.0, 2.0)) == 0.0
    assert temporal_iou((0.0, 1.0), (5.0, 6.0)) == 0.0


def test_best_iou_is_that_of_the_nearest_answer_and_zero_for_no_interval():
    assert best_iou((0.0, 2.0), [(5.0, 6.0), (0.0, 4.0), (1.0, 2.0)]) == pytest.approx(0.5)
    assert best_iou(None, [(0.0, 4.0)]) == 0.0


spans = st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda s: s[0] < s[1])


sets = st.lists(spans, min_size=1, max_size=4)


@given(predicted=sets, answers=sets)
def test_merged_iou_is_that_of_the_seconds_that_two_sets_cover_on_a_fine_grid(predicted, answers):
    ours, theirs = ({t for a, b in of for t in range(a, b)} for of in (predicted, answers))
    assert merged_iou(predicted, answers) == pytest.approx(len(ours & theirs) / len(ours | theirs))
    assert merged_iou(answers, predicted) == merged_iou(predicted, answers)
    assert merged_iou(predicted[:1], answers[:1]) == best_iou(predicted[0], answers[:1])


@pytest.mark.parametrize("bad", [(3.0, 3.0), (4.0, 2.0), (0.0, float("nan")), (float("-inf"), 1.0)])
def test_merged_iou_leaves_out_what_is_no_interval(bad):
    truth = [(0.0, 4.0), (6.0, 8.0)]
    assert merged_iou([], truth) == merged_iou([bad], truth) == merged_iou(truth, [bad]) == 0.0
    assert merged_iou([bad, (6.0, 8.0)], truth) == pytest.approx(2 / 6)


def literal_wasserstein(a: list[tuple[int, int]], b: list[tuple[int, int]], atoms_a_cell: int) -> float:
    """Both sets as equally many atoms, spread evenly over their cells of a second, and moved in order."""
    cells = [sorted({t for start, end in of for t in range(start, end)}) for of in (a, b)]
    num = len(cells[0]) * len(cells[1]) * atoms_a_cell
    atoms = [np.sort([t + x for t in of for x in _even(num // len(of))]) for of in cells]
    return float(np.abs(atoms[0] - atoms[1]).mean())


def _even(num: int) -> np.ndarray:
    return (np.arange(num) + 0.5) / num


def test_wasserstein_is_the_mean_way_of_atoms_moved_in_order():
    rng = np.random.default_rng(0)
    for _ in range(40):
        starts, lengths = rng.integers(0, 20, (2, 3)), rng.integers(1, 8, (2, 3))
        a, b = (
            list(zip(s.tolist(), (s + n).tolist(), strict=True)) for s, n in zip(starts, lengths, strict=True)
        )
        assert wasserstein_s(a, b) == pytest.approx(literal_wasserstein(a, b, 30), abs=0.04)
        assert wasserstein_s(a, b) == pytest.approx(wasserstein_s(b, a), abs=1e-12)
        shifted = [(start + 7.5, end + 7.5) for start, end in a]
        assert wasserstein_s(a, shifted) == pytest.approx(7.5, abs=1e-12)


def test_wasserstein_by_hand():
    assert wasserstein_s([(0, 2)], [(4, 8)]) == 5.0, "centres 1 and 6"
    assert wasserstein_s([(0, 4)], [(1, 3)]) == 0.5, "4u and 1 + 2u cross at 1/2"
    assert wasserstein_s([(9, 10), (0, 1)], [(0, 10)]) == pytest.approx(2.0)
    assert wasserstein_s([(0, 2), (1, 4), (4, 5)], [(0, 5)]) == 0.0
    assert wasserstein_s([], [(0, 1)]) == wasserstein_s([(0, 1)], [(2, 2)]) == math.inf


def test_a_prompt_of_several_spans_is_read_as_its_nearest_or_as_their_union():
    prompt = make_prompt("p", ((0.0, 2.0), (6.0, 8.0)))
    assert prompt_iou(((0.0, 2.0), (6.0, 8.0)), prompt, "best") == 1.0
    assert prompt_iou(((0.0, 2.0),), prompt, "merged") == 0.5
    assert prompt_iou(((0.0, 8.0),), prompt, "merged") == 0.5
    assert prompt_iou(((0.0, 2.0), (6.0, 8.0)), prompt, "merged") == 1.0
    assert prompt_iou((), prompt, "best") == prompt_iou((), prompt, "merged") == 0.0


def test_summary_counts_thresholds_inclusively_and_over_every_prompt():
    summary = summarise([0.0, 0.3, 0.5, 0.7, 1.0, 0.2999], num_unparsed=1)
    assert summary["miou"] == pytest.approx((0.3 + 0.5 + 0.7 + 1.0 + 0.2999) / 6)
    assert [summary[f"r1@{m}"] for m in (0.3, 0.5, 0.7)] == pytest.approx([4 / 6, 3 / 6, 2 / 6])
    assert (summary["n"], summary["unparsed"]) == (6, 1)


def test_a_threshold_that_rounding_missed_counts_as_reached():
    iou = temporal_iou((0.0, 0.7), (0.0, 1.0)) - 1e-12
    assert iou < 0.7 and summarise([iou])["r1@0.7"] == 1.0


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(ValueError, match="no prompts"):
        summarise([])


def prediction(prompt_id: str, span: Span | None) -> Prediction:
    return Prediction(prompt_id=prompt_id, text="", spans_s=(span,) if span else ())


def test_prompts_without_a_prediction_or_without_an_interval_stay_in_the_denominator():
    prompts = [make_prompt(name, ((2.0, 6.0),)) for name in ("right", "half", "unparsed", "missing")]
    predictions = [
        prediction("unparsed", None),  # in any order
        prediction("half", (2.0, 4.0)),
        prediction("of another prompt", (2.0, 6.0)),
        prediction("right", (2.0, 6.0)),
    ]
    summary = evaluate(predictions, prompts)
    assert summary["n"] == 4
    assert summary["unparsed"] == 2
    assert summary["miou"] == pytest.approx(1.5 / 4)
    assert summary["r1@0.5"] == pytest.approx(2 / 4)
    assert summary["r1@0.7"] == pytest.approx(1 / 4)


def test_without_any_prediction_everything_is_zero():
    summary = evaluate([], [make_prompt("a"), make_prompt("b")])
    assert (summary["miou"], summary["r1@0.3"], summary["n"], summary["unparsed"]) == (0.0, 0.0, 2, 2)


def test_best_constant_interval_is_the_common_one_as_fractions_of_the_duration():
    answers = [([(2.0, 5.0)], 10.0), ([(4.0, 10.0)], 20.0), ([(9.0, 10.0)], 10.0)]  # 0.2 to 0.5 twice
    assert best_constant_interval(answers, grid=10) == pytest.approx((0.2, 0.5))


truths = st.lists(st.tuples(st.floats(-5, 40), st.floats(-5, 40)), max_size=3)


@given(st.lists(st.tuples(truths, st.floats(0.5, 30)), min_size=1, max_size=12), st.integers(1, 8))
def test_best_constant_interval_is_that_of_a_loop_over_all_intervals_and_prompts(answers, grid):
    """The first of equals; true spans may be none, empty, reversed or beyond the clip."""
    ticks = np.linspace(0.0, 1.0, grid + 1)
    candidates = list(itertools.combinations(ticks, 2))
    means = [np.mean([best_iou((a * d, b * d), spans) for spans, d in answers]) for a, b in candidates]
    assert best_constant_interval(answers, grid) == candidates[int(np.argmax(means))]


def test_odd_truths_are_counted_by_kind_and_by_prompt():
    truths = [
        ([(2.0, 12.0)], 12.0),
        ([(2.0, 12.0 + 1e-12)], 12.0),  # the last bits of a division
        ([(2.0, 13.1), (3.0, 14.0)], 12.0),
        ([(13.0, 14.0)], 12.0),
        ([(1.0, 2.0), (3.0, 3.0)], 12.0),
        ([(4.0, 3.0)], 12.0),
        ([(-1.0, 3.0)], 12.0),
        ([], 12.0),
    ]
    counts = odd_truth(truths)
    assert counts == {"beyond_end": 2, "before_start": 1, "zero_length": 1, "reversed": 1}
    assert describe_odd(counts).endswith("beyond end 2, before start 1, zero length 1, reversed 1")
    assert odd_truth(truths[:2]) == {}


def test_baselines_under_odd_or_no_truth():
    odd = [make_prompt(f"o{i}", (span,)) for i, span in enumerate([(3.0, 3.0), (5.0, 2.0), (10.0, 99.0)])]
    baselines = blind_baselines(odd, odd)
    assert baselines["best_constant"]["interval_frac"] == pytest.approx([20 / 24, 1.0])
    assert baselines["best_constant"]["miou"] == pytest.approx(2 / 89 / 3)
    assert blind_baselines([make_prompt("u", None)], odd)["best_constant"] is None


def test_blind_baselines_choose_on_train_score_on_evaluation_and_follow_the_seed():
    train = [make_prompt(f"t{i}", ((3.0, 6.0),), duration_s=12.0) for i in range(3)]
    evaluation = [make_prompt("same", ((6.0, 12.0),), duration_s=24.0)]
    evaluation += [make_prompt(f"other{i}", ((20.0, 24.0),), duration_s=24.0) for i in range(2)]
    baselines = blind_baselines(train, evaluation, seed=1)
    assert baselines["best_constant"]["interval_frac"] == pytest.approx([0.25, 0.5])
    assert baselines["best_constant"]["miou"] == pytest.approx(1 / 3)
    assert baselines == blind_baselines(train, evaluation, seed=1)
    assert baselines["random"]["miou"] != blind_baselines(train, evaluation, seed=2)["random"]["miou"]
