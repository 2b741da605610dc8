"""How each protocol reads answers and counts them.

The expected intervals are what the codebases' own functions returned for these answers, at these revisions:
  timelens   TencentARC/TimeLens, timelens/utils.py (extract_time), evaluation/eval_dataloader.py (whole
             seconds), evaluation/compute_metrics.py (the first pair counts, >=)
  time_r1    xiaomi-research/time-r1 @ 8f9c9df, evaluate.py (extract_answer),
             src/vllm_inference/eval_all.py (>)
  vtimellm   huangb23/VTimeLLM @ 673312a, vtimellm/eval/eval.py (iou: reading and two decimals),
             vtimellm/eval/metric.py (>=)
  lmms_eval  EvolvingLMMs-Lab/lmms-eval @ 532ca07, lmms_eval/tasks/charades_sta/eval_tvg.py (extract_time,
             swap, >=)
  strict     video_opd/answers.py and video_opd/grounding.py, which launch.py uses
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.protocols import PROTOCOLS, hull_iou, protocol_named
from video_opd.errors import ConfigError
from video_opd.grounding import summarise, temporal_iou
from video_opd.types import Span

SETS = ("strict_sets", "timelens2", "vue_tr")
NAMES = ("strict", "timelens", "time_r1", "vtimellm", "lmms_eval")
# An answer, then what each of NAMES scores: seconds, for vtimellm shares of the clip; None: no interval.
TABLE = [
    # the forms that the codebases ask for
    ("From 2.0 to 5.0 seconds.", (2.0, 5.0), (2.0, 5.0), (2.0, 5.0), None, (2.0, 5.0)),
    ("The event happens in 2.0 - 5.0 seconds.", (2.0, 5.0), (2.0, 5.0), None, None, (2.0, 5.0)),
    ("The event happens in 2.5 - 7.4 seconds", (2.5, 7.4), (2.0, 7.0), None, None, (2.5, 7.4)),
    ("From 12 to 34.", (12.0, 34.0), (12.0, 34.0), (12.0, 34.0), (0.12, 0.34), (12.0, 34.0)),
    ("between 12 and 34", (12.0, 34.0), (12.0, 34.0), (12.0, 34.0), (0.12, 0.34), None),
    ("12.54 to 17.83", (12.54, 17.83), (13.0, 18.0), (12.54, 17.83), (0.54, 0.17), (12.54, 17.83)),
    (
        "<think>first 1.0 to 2.0</think><answer>12.54 to 17.83</answer>",
        (12.54, 17.83),
        (1.0, 2.0),
        (12.54, 17.83),
        (0.54, 0.17),
        (1.0, 2.0),
    ),
    (
        "<answer>12.54 to 17.83</answer> and not 20.0 to 30.0",
        (12.54, 17.83),
        (13.0, 18.0),
        (20.0, 30.0),
        (0.54, 0.17),
        (12.54, 17.83),
    ),
    ("<answer>\n3.00 to 8.50\n</answer>", (3.0, 8.5), (3.0, 8.0), (3.0, 8.5), None, (3.0, 8.5)),
    (
        "The event 'person turn a light on' happens in the 24.3 - 30.4 seonds",
        (24.3, 30.4),
        (24.0, 30.0),
        None,
        None,
        (24.3, 30.4),
    ),
    ("[3.1, 4.8]", (3.1, 4.8), (3.0, 5.0), None, None, None),
    ("[[3.1, 4.8], [6.0, 7.0]]", (3.1, 4.8), (3.0, 5.0), None, None, None),
    # what joins the numbers
    ("3.1-4.8", (3.1, 4.8), (3.0, 5.0), None, None, (3.1, 4.8)),
    ("3.1 -4.8", (3.1, 4.8), (3.0, 5.0), None, None, (3.1, 4.8)),
    ("3.1–4.8", (3.1, 4.8), (3.0, 5.0), None, None, None),
    ("3.1 — 4.8 s", (3.1, 4.8), (3.0, 5.0), None, None, None),
    ("3 , 9", (3.0, 9.0), (3.0, 9.0), None, None, None),
    ("12  to  34", (12.0, 34.0), (12.0, 34.0), None, None, (12.0, 34.0)),
    ("12\tto\t34", (12.0, 34.0), (12.0, 34.0), None, None, (12.0, 34.0)),
    ("12\nto\n34", (12.0, 34.0), (12.0, 34.0), None, None, (12.0, 34.0)),
    ("12 TO 34", (12.0, 34.0), (12.0, 34.0), None, None, (12.0, 34.0)),
    ("12 To 34", (12.0, 34.0), (12.0, 34.0), None, None, (12.0, 34.0)),
    ("12to34", (12.0, 34.0), None, None, None, (12.0, 34.0)),
    ("12 and 34", (12.0, 34.0), (12.0, 34.0), (12.0, 34.0), (0.12, 0.34), None),
    ("12 & 34", None, (12.0, 34.0), None, None, None),
    ("12 until 34", (12.0, 34.0), (12.0, 34.0), None, None, None),
    ("12 through 34", (12.0, 34.0), (12.0, 34.0), None, None, None),
    ("12;34", None, (12.0, 34.0), None, None, None),
    ("12 / 34", None, (12.0, 34.0), None, None, None),
    ("12 34", None, (12.0, 34.0), None, None, None),
    ("12 → 34", (12.0, 34.0), (12.0, 34.0), None, None, None),
    # units
    ("2.0s to 5.0s", (2.0, 5.0), (2.0, 5.0), None, None, None),
    ("2 seconds to 5 seconds", (2.0, 5.0), (2.0, 5.0), None, None, None),
    ("2 sec - 5 sec", (2.0, 5.0), (2.0, 5.0), None, None, None),
    ("2s - 5s", (2.0, 5.0), None, None, None, None),
    ("12 s and 34 s", (12.0, 34.0), (12.0, 34.0), None, None, None),
    ("12 seconds and 34 seconds", (12.0, 34.0), (12.0, 34.0), None, None, None),
    ("starts at 12.5s\nends at 30.2s", (12.5, 30.2), (12.0, 30.0), None, None, (12.0, 30.0)),
    ("starts at 12s\nends at 30s", (12.0, 30.0), None, None, None, None),
    ("12 minutes to 34 minutes", (720.0, 2040.0), (12.0, 34.0), None, None, None),
    ("12% to 34%", None, (12.0, 34.0), None, None, None),
    ("12 ms to 34 ms", None, (12.0, 34.0), None, None, None),
    # clock times
    ("00:18 - 00:23", (18.0, 23.0), (18.0, 23.0), None, None, (0.0, 18.0)),
    ("00:18 to 00:23", (18.0, 23.0), (18.0, 23.0), (18.0, 0.0), (0.18, 0.0), (0.0, 18.0)),
    ("from 00:00:18 to 00:00:23", (18.0, 23.0), (18.0, 23.0), (18.0, 0.0), (0.18, 0.0), (0.0, 18.0)),
    ("1:05 - 1:20", (65.0, 80.0), (65.0, 80.0), None, None, (1.0, 5.0)),
    ("01:02:03 - 01:02:09.5", (3723.0, 3729.5), (3723.0, 3730.0), None, None, (1.0, 3.0)),
    ("00:09.25 to 00:12.75", (9.25, 12.75), (9.0, 13.0), (9.25, 0.0), (0.25, 0.0), (0.0, 9.25)),
    ("00:12.5s - 00:15.5s", (12.5, 15.5), (12.0, 15.0), None, None, None),
    ("at 00:18", None, (0.0, 18.0), None, None, None),
    ("at 00:18, lasting 5 - 7 s", (5.0, 7.0), (5.0, 7.0), None, None, (5.0, 7.0)),
    ("1:2:03 and 1:04", None, (123.0, 64.0), (3.0, 1.0), None, None),
    ("starts at 00:00:18\nends at 00:00:23", (18.0, 23.0), (18.0, 23.0), None, None, (0.0, 0.0)),
    ("starts at 00:00:18 and ends at 00:00:23.", (18.0, 23.0), (18.0, 23.0), None, None, None),
    ("12:34:56x 00:10", None, (754.0, 10.0), None, None, None),
    ("100:20 - 100:40", (6020.0, 6040.0), (20.0, 100.0), None, None, (20.0, 100.0)),
    # several pairs, and other numbers
    (
        "It is seen from 1.0 to 2.0 seconds, then from 5.0 to 6.0.",
        (1.0, 2.0),
        (1.0, 2.0),
        (5.0, 6.0),
        None,
        (1.0, 2.0),
    ),
    ("1 to 2 to 3", (1.0, 2.0), (1.0, 2.0), (1.0, 2.0), None, (1.0, 2.0)),
    ("At 10, then 12 - 34, or 40 to 50", (12.0, 34.0), (12.0, 34.0), (40.0, 50.0), (0.4, 0.5), (12.0, 34.0)),
    ("12 to 34, or 40 - 50", (12.0, 34.0), (40.0, 50.0), (12.0, 34.0), (0.12, 0.34), (12.0, 34.0)),
    ("Object 3 is seen 1.0 - 2.0", (1.0, 2.0), (1.0, 2.0), None, None, (1.0, 2.0)),
    ("2024-05: 12 - 34", (12.0, 34.0), (2024.0, 5.0), None, None, (5.0, 2024.0)),
    ("version 1.2.3 - 4", None, (2.0, 4.0), None, None, (2.3, 4.0)),
    ("12 and 34 and 56", (12.0, 34.0), (12.0, 34.0), (12.0, 34.0), (0.12, 0.34), None),
    ("123 to 456", (123.0, 456.0), (123.0, 456.0), (123.0, 456.0), (0.23, 0.45), (123.0, 456.0)),
    ("5 to 10", (5.0, 10.0), (5.0, 10.0), (5.0, 10.0), None, (5.0, 10.0)),
    ("05 to 10", (5.0, 10.0), (5.0, 10.0), (5.0, 10.0), (0.05, 0.1), (5.0, 10.0)),
    ("12.55 to 17.83", (12.55, 17.83), (13.0, 18.0), (12.55, 17.83), (0.55, 0.17), (12.55, 17.83)),
    ("007 to 009", (7.0, 9.0), (7.0, 9.0), (7.0, 9.0), (0.07, 0.0), (7.0, 9.0)),
    # reversed and empty
    ("From 5.0 to 2.0 seconds.", (5.0, 2.0), (5.0, 2.0), (5.0, 2.0), None, (2.0, 5.0)),
    ("34 - 12", (34.0, 12.0), (34.0, 12.0), None, None, (12.0, 34.0)),
    ("34 to 12", (34.0, 12.0), (34.0, 12.0), (34.0, 12.0), (0.34, 0.12), (12.0, 34.0)),
    ("7 - 7", (7.0, 7.0), (7.0, 7.0), None, None, (7.0, 7.0)),
    ("00:23 - 00:18", (23.0, 18.0), (23.0, 18.0), None, None, (0.0, 23.0)),
    # one number a sentence
    ("Start time: 0.8 seconds. End time: 1.1 seconds", (0.8, 1.1), (1.0, 1.0), None, None, None),
    ("Start time: 0.8 seconds\nEnd time: 1.1 seconds", (0.8, 1.1), (1.0, 1.0), None, None, (0.8, 1.1)),
    (
        "The start time is 0 seconds, and the end time is 12 seconds.",
        (0.0, 12.0),
        (0.0, 12.0),
        None,
        None,
        None,
    ),
    ("It starts at 3!\nIt ends at 8?", (3.0, 8.0), (3.0, 8.0), None, None, (3.0, 8.0)),
    ("It begins at 3\nIt stops at 8", (3.0, 8.0), (3.0, 8.0), None, None, None),
    ("3 at first\nthen 8", None, (3.0, 8.0), None, None, None),
    ("photo 5, photo 9", None, (5.0, 9.0), None, None, None),
    ("tomato 12 to 34", (12.0, 34.0), (12.0, 34.0), (12.0, 34.0), (0.12, 0.34), (12.0, 34.0)),
    ("5to 9", (5.0, 9.0), None, None, None, (5.0, 9.0)),
    (
        "A specific example is : 20.8 - 30.0 seconds. Mine: 3 - 9",
        (20.8, 30.0),
        (21.0, 30.0),
        None,
        None,
        (3.0, 9.0),
    ),
    # no number, one number, and what is not one
    ("", None, None, None, None, None),
    ("to - ,", None, None, None, None, None),
    ("no idea", None, None, None, None, None),
    ("From two to five seconds.", None, None, None, None, None),
    ("At 2.0 seconds.", None, None, None, None, None),
    ("From 2.0 to", None, None, None, None, None),
    ("- 5", None, None, None, None, None),
    ("nan to nan", None, None, None, None, None),
    ("nan - inf", None, None, None, None, None),
    ("1..5 - 7", (5.0, 7.0), (5.0, 7.0), None, None, None),
    ("3... - 9", None, (3.0, 9.0), None, None, None),
    ("5. to 9.", (5.0, 9.0), (5.0, 9.0), (5.0, 9.0), None, (5.0, 9.0)),
    ("12. - 34.", None, (12.0, 34.0), None, None, (12.0, 34.0)),
    ("-5 to -2", None, (5.0, 2.0), None, None, None),
    ("-5 - 3", None, (5.0, 3.0), None, None, (3.0, 5.0)),
    ("1e3 to 2e3", None, (3.0, 2.0), (3.0, 2.0), None, (2.0, 3.0)),
    ("1,000 to 2,000", (1000.0, 2000.0), (0.0, 2.0), (0.0, 2.0), None, (0.0, 2.0)),
    ("2.5.1 to 3.5.2", None, (5.0, 4.0), (5.1, 3.5), None, (3.5, 5.1)),
    ("٣ to ٩", (3.0, 9.0), (3.0, 9.0), (3.0, 9.0), None, (3.0, 9.0)),
    (".5 to .9", (0.5, 0.9), (5.0, 9.0), None, None, None),
    ("2,5 - 3,5", (2.5, 3.5), (5.0, 3.0), None, None, (3.0, 5.0)),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0][:40])
def test_an_answer_is_read_as_each_codebase_reads_it(row):
    text, *expected = row
    for name, span in zip(NAMES, expected, strict=True):
        reading = PROTOCOLS[name].parse(text)
        assert (reading.span if reading else None) == span, name


def test_the_table_is_of_all_protocols_and_tells_every_two_apart():
    assert tuple(PROTOCOLS) == (*NAMES, "timelens_strict", *SETS) and len(TABLE) >= 60
    for a in range(len(NAMES)):
        for b in range(a):
            assert sum(row[1 + a] != row[1 + b] for row in TABLE) >= 5, (NAMES[a], NAMES[b])
    assert all("/" in protocol.source and ".py" in protocol.source for protocol in PROTOCOLS.values())


def test_only_lmms_eval_puts_a_reversed_pair_in_order_and_all_say_that_it_was_reversed():
    readings = {name: PROTOCOLS[name].parse("34 to 12") for name in NAMES}
    assert all(reading is not None and reading.is_reversed for reading in readings.values())
    ious = {
        name: PROTOCOLS[name].score(reading.span, [(12.0, 34.0)], 100.0)
        for name, reading in readings.items()
        if reading
    }
    assert ious == {"strict": 0.0, "timelens": 0.0, "time_r1": 0.0, "vtimellm": 0.0, "lmms_eval": 1.0}


def test_a_threshold_that_is_met_exactly_counts_except_in_time_r1_and_timelens_strict():
    ious = np.array([0.5])
    assert {name: bool(p.reaches(ious, 0.5)[0]) for name, p in PROTOCOLS.items()} == {
        "strict": True,
        "timelens": True,
        "time_r1": False,
        "vtimellm": True,
        "lmms_eval": True,
        "timelens_strict": False,
        "strict_sets": True,
        "timelens2": True,
        "vue_tr": True,
    }


def test_only_strict_forgives_a_rounding_error_below_a_threshold():
    ious = np.array([0.7 - 1e-12])
    assert [name for name, p in PROTOCOLS.items() if p.reaches(ious, 0.7)[0]] == ["strict", "strict_sets"]


def test_vtimellm_rounds_each_iou_to_two_decimals_and_reads_shares_of_the_video():
    protocol = PROTOCOLS["vtimellm"]
    reading = protocol.parse("From 10 to 30.")
    assert reading and protocol.seconds(reading.span, 50.0) == (5.0, 15.0)
    assert hull_iou((5.0, 15.0), (5.0, 19.4)) == pytest.approx(0.694, abs=1e-3)
    assert protocol.score(reading.span, [(5.0, 19.4)], 50.0) == 0.69
    assert protocol.score(reading.span, [(5.0, 19.35)], 50.0) == 0.7, "0.6969 reaches 0.7"
    assert summarise([0.7], reached=protocol.reaches)["r1@0.7"] == 1.0
    assert protocol.score_seconds((5.0, 15.0), [(5.0, 19.35)], 50.0) == 0.7
    assert PROTOCOLS["strict"].score((5.0, 15.0), [(5.0, 19.35)], 50.0) == pytest.approx(0.6969, abs=1e-4)


def test_timelens_scores_whole_seconds_halves_to_even():
    reading = PROTOCOLS["timelens"].parse("2.5 - 7.5")
    assert reading and reading.span == (2.0, 8.0)
    assert PROTOCOLS["timelens"].score(reading.span, [(2.5, 7.5)], 12.0) == pytest.approx(5 / 6)
    assert PROTOCOLS["strict"].score((2.5, 7.5), [(2.5, 7.5)], 12.0) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_no_protocol_clamps_an_interval_to_the_clip(name):
    protocol = PROTOCOLS[name]
    span = (0.0, 2.0) if protocol.shares else (0.0, 24.0)
    assert protocol.score(span, [(0.0, 12.0)], 12.0) == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_of_several_true_spans_the_nearest_counts(name):
    protocol = PROTOCOLS[name]
    assert protocol.score_seconds((4.0, 8.0), [(20.0, 30.0), (4.0, 8.0), (0.0, 8.0)], 40.0) == 1.0
    assert protocol.score_seconds((4.0, 8.0), [], 40.0) == 0.0


spans = st.tuples(st.floats(0, 100), st.floats(0, 100))


@given(a=spans, b=spans.filter(lambda s: s[1] - s[0] > 1e-3))
def test_the_hull_gives_the_same_iou_as_the_union(a: Span, b: Span):
    assert hull_iou(a, b) == pytest.approx(temporal_iou(a, b), abs=1e-9)


def test_an_unknown_protocol_names_the_known_ones():
    with pytest.raises(ConfigError, match="strict, timelens, time_r1, vtimellm, lmms_eval"):
        protocol_named("timelens3")


SHORT, LONG = 500, 30_000
HARD = [
    *("1", "1.", ".", " ", "-", "1 ", "1 1.", "1-", "1 to ", "1 and "),
    *("00:", "00:00.1", "1..", "end ", "start 1s", "1 s ", "1seconds "),
]


@pytest.mark.parametrize("name", NAMES)
def test_very_long_answers_are_read_as_shorter_ones_are(name):
    """In linear time: with a pattern that backtracks this test runs into its timeout."""

    def read(unit: str, times: int):
        long = "1" * times
        answers = (unit * times, f"{long}{unit}{long}s", f"1{unit * times}s")
        return [PROTOCOLS[name].parse(answer) for answer in answers]

    for unit in HARD:
        assert read(unit, LONG) == read(unit, SHORT), unit


@pytest.mark.parametrize("name", SETS[:2])
def test_very_long_sets_are_read_in_linear_time(name):
    for unit in ("[", "[[", "[ ", "[1,", "[[1,2],", "[[1],", "-1 ", "1 - 2 ", "1, ", '"1', "- "):
        assert PROTOCOLS[name].parse(unit * 10_000 + "x") is None or unit.count("1")
    reading = PROTOCOLS[name].parse(f"[{'[1, 2], ' * 9_999}[1, 2]]")
    assert reading and len(reading.spans) == 10_000


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_thousands_of_digits_score_zero(name):
    protocol, long = PROTOCOLS[name], "9" * 5000
    for text in (
        f"0 - {long}",
        f"0 to {long}",
        f"{long} to {long}",
        f"{long} - {long}",
        f"00 to {long}",
        long,
    ):
        reading = protocol.parse(text)
        if reading and not protocol.shares:  # two digits are two digits
            assert protocol.score(reading.span, [(0.0, 5.0)], 12.0) == 0.0
