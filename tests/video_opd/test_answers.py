"""Which interval an answer names: thoughts, forms of times, numbers that are no times."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_opd.answers import opened_thought, parse_span, parse_spans

OPENED = "Scenes:\n- 28.2s to 35.5s: people.\n- From 195.2s to 220.7s: basketball.\n</think>\n\n"
THOUGHTS = [
    (OPENED + "The event happens in 195.2 - 220.7 seconds.", (195.2, 220.7)),
    ("<think>\nAt 28.2 - 35.5 they dance.\n</think>\n\nIt happens in 195.2 - 220.7 seconds.", (195.2, 220.7)),
    ("<think>The clip lasts 400 seconds, so between 5 and 10 nothing", None),
    ("<think>at 5 - 6</think>", None),
    ("3 - 4 <think>no</think> or 5 - 6</think>", None),  # the prompt opened the first thought
    ("<think>at 5 - 6</think>\n<|im_end|>", None),
    ("<think>1 to 2</think> 3 - 4 <think>no, 5 to 6</think> 7 - 8", (7.0, 8.0)),
    ("3 - 4 <think>or 5 - 6", (3.0, 4.0)),
    ("<think>1 - 2</think> 3 - 4 <think>yes, not 5 - 6</think>", (3.0, 4.0)),
    ("<think>1 - 2 <think>3 - 4</think> 5 - 6</think> 7 - 8", (7.0, 8.0)),
    ("<think>1 - 2</think><answer>12.54 to 17.83</answer>", (12.54, 17.83)),
    ("<think>1 - 2</think><answer>12.0 to 18.5", (12.0, 18.5)),
    ("<think>1 - 2</think><answer>", None),
    ("<think>1 - 2</think><answer></answer>", None),
    ("<think>1 - 2 <answer>12.0 to 18.5</answer>", (12.0, 18.5)),
    ("<think>so <answer>12.0 to 18.5</answer></think>", (12.0, 18.5)),
    ("<think>say <answer>1 to 2</answer>? no</think> The event happens in 3 - 4 seconds.", (3.0, 4.0)),
    ("<answer>12.0 to 18.5</think></answer>", (12.0, 18.5)),
    ("<answer>1 to 2</answer> or <answer>3 to 4</answer>", (3.0, 4.0)),
    ("<answer>It is not seen.</answer> I looked at 5 to 10.", None),
    ("<Think>1 - 2</Think>3 - 4", (3.0, 4.0)),
    ("<thinking>1 - 2</thinking>3 - 4", (3.0, 4.0)),
    ("◁think▷1 - 2◁/think▷3 - 4", (3.0, 4.0)),
    ("[THINK]1 - 2[/THINK]3 - 4", (3.0, 4.0)),
    ("<|begin_of_thought|>1 - 2<|end_of_thought|>3 - 4", (3.0, 4.0)),
    ("<think>1 - 2</think>at 3 - 4: <|begin_of_box|>5 - 6<|end_of_box|>", (5.0, 6.0)),
]
FORMS = [
    # pairs
    ("From 2.0 to 5.0 seconds.", (2.0, 5.0)),
    ("The event happens in 2.5 - 7 seconds", (2.5, 7.0)),
    ("The event happens in 2.5 - 7.25 seconds.", (2.5, 7.25)),
    ("2.0s to 5.0s", (2.0, 5.0)),
    ("from 2 seconds to 5 seconds", (2.0, 5.0)),
    ("From 2 sec - 5 sec", (2.0, 5.0)),
    ("12.0 sec. to 18.5 sec.", (12.0, 18.5)),
    ("between 12 and 15.5 seconds", (12.0, 15.5)),
    ("[3.1, 4.8]", (3.1, 4.8)),
    ("[[3.1, 4.8], [6.0, 7.0]]", (3.1, 4.8)),
    ("3.1–4.8", (3.1, 4.8)),
    ("3.1 — 4.8 s", (3.1, 4.8)),
    ("Object 3 is seen from 1.0 to 2.0 seconds, then from 5.0 to 6.0.", (1.0, 2.0)),
    ("It is seen from 1.0 to 2.0, then from 5.0 to 6.0 seconds.", (1.0, 2.0)),
    ("From\n2.0\nto\n5.0", (2.0, 5.0)),
    ("From 5.0 to 2.0 seconds.", (5.0, 2.0)),  # an answer, though a wrong one
    ("From 2 to 5 the man lifts boxes.", (2.0, 5.0)),
    ("12 - 34 person turns", (12.0, 34.0)),
    ("12 - 34 is when", (12.0, 34.0)),
    ("<answer>\n23.50 to 30.00\n</answer><|im_end|>", (23.5, 30.0)),
    ("12 to 18</s>", (12.0, 18.0)),
    ("From 12.0s until 18.5s.", (12.0, 18.5)),
    ("from about 12.0 to about 18.5 seconds", (12.0, 18.5)),
    ("from ~12.0s to ~18.5s", (12.0, 18.5)),
    ("12.0 ~ 18.5", (12.0, 18.5)),
    ("12.0s --> 18.5s", (12.0, 18.5)),
    ("the 12.0 second mark to the 18.5 second mark", (12.0, 18.5)),
    ("0030.0 -  0043.0 seconds, she names the ink.", (30.0, 43.0)),
    ("24 - 30 seonds", (24.0, 30.0)),
    # marks around the numbers
    ("<12.0 seconds> to <18.5 seconds>", (12.0, 18.5)),
    ("**12.0** - **18.5** seconds", (12.0, 18.5)),
    ("The answer is [12.0] - [18.5]", (12.0, 18.5)),
    ("Scene [1] - [12.0, 18.5]", (12.0, 18.5)),
    ("\\boxed{12.0 - 18.5}", (12.0, 18.5)),
    ("$12.0 - 18.5$", (12.0, 18.5)),
    ("From12to34", (12.0, 34.0)),
    ("seconds8.2 to 9.0", (8.2, 9.0)),
    # a start and an end
    ("The event starts at 12.0 seconds and ends at 18.5 seconds.", (12.0, 18.5)),
    ("Start time: 0.8 seconds. End time: 1.1 seconds", (0.8, 1.1)),
    ("It starts at 12 s, when 3 men come, and ends at 18 s.", (12.0, 18.0)),
    ("The intro ends at 5.0. The event starts at 12.0 seconds and ends at 18.5 seconds.", (12.0, 18.5)),
    ('```json\n{"query": "q", "relevant_windows": [["12.0", "18.5"]]}\n```', (12.0, 18.5)),
    ('```json\n[{"start": 12.0, "end": 18.5, "label": "q"}]\n```', (12.0, 18.5)),
    ('{"start_time": "12.0s", "end_time": "18.5s"}', (12.0, 18.5)),
    ('{"startTime": 12, "endTime": 18}', (12.0, 18.0)),
    ('{"end": 18.5, "start": 12.0}', (12.0, 18.5)),
    ('{"from": 12.0, "to": 18.5}', (12.0, 18.5)),
    ('{"query": "lifts 2 to 3 boxes", "start": 12, "end": 18}', (12.0, 18.0)),
    ('{"timestamp": "12 - 18"}', (12.0, 18.0)),
    ('{"timestamps": ["00:00:12", "00:00:18"]}', (12.0, 18.0)),
    # clock times and units
    ("[0] 00:00:20 - 00:00:28  conf=0.403", (20.0, 28.0)),
    ("12:34.56s - 12:40.12s", (754.56, 760.12)),
    ("The event happens in 1:05 - 1:20.", (65.0, 80.0)),
    ("00:00:20,500 --> 00:00:28,000", (20.5, 28.0)),
    ("00:12,00:18", (12.0, 18.0)),
    ("1 - 2 minutes", (60.0, 120.0)),
    ("1.5 - 2 minutes", (90.0, 120.0)),
    ("00:30 to 2 minutes", (30.0, 120.0)),
    ("1 min 5 s to 1 min 20 s", (65.0, 80.0)),
    ("1 minute and 5 seconds to 1 minute and 20 seconds", (65.0, 80.0)),
    ("1m05s - 1m20s", (65.0, 80.0)),
    ("It lasts 5 seconds, 12 to 17.", (12.0, 17.0)),
    ("１２．０秒到１８．５秒", (12.0, 18.5)),
    ("1h2m3s - 1h2m9s", (3723.0, 3729.0)),
    ("该事件发生在37.1秒到52.6秒。", (37.1, 52.6)),
    ("1分5秒到1分20秒", (65.0, 80.0)),
    ("开始时间：12.0秒，结束时间：18.5秒", (12.0, 18.5)),
    ("12.0秒から18.5秒まで", (12.0, 18.5)),
    ("12.0초부터 18.5초까지", (12.0, 18.5)),
    ("от 12 с до 18 с", (12.0, 18.0)),
    ("с 12.0 до 18.5 секунд", (12.0, 18.5)),
    # commas in numbers
    ("1,000 to 2,000 seconds", (1000.0, 2000.0)),
    ("1,000.5 - 1,200.5 s", (1000.5, 1200.5)),
    ("2,5 - 3,5", (2.5, 3.5)),
    ("[2,5]", (2.0, 5.0)),
    ("12-18,20-25", (12.0, 18.0)),
    # quotations
    ("The event 'the man lifts 2 to 3 boxes' happens in 12.0 - 18.5 seconds.", (12.0, 18.5)),
    ("The event 'counts from 1 to 10' happens in 12 - 18.", (12.0, 18.0)),
    ("The event 'the man's 2 to 3 boxes' happens in 12 - 18.", (12.0, 18.0)),
    ("The event “from 1.0 to 2.0” happens in 12 - 18.", (1.0, 2.0)),  # nothing but times: an answer
    ("The event 'counts from 1 to 10' does not occur.", None),
    ("The dogs' bowls from 12 to 18 and the cats' bowls", (12.0, 18.0)),
    ('"The event happens in 12 - 18."', (12.0, 18.0)),
    ('The answer is "From 12.0 to 18.5 seconds."', (12.0, 18.5)),
    # counts, dates and other numbers, with and without an interval beside them
    ("5 to 10 people are seen from 12 to 18.", (12.0, 18.0)),
    ("Objects 3 and 4 collide from 1.0 to 2.0 seconds.", (1.0, 2.0)),
    ("On 2024-05-06 it is seen at 12 - 18.", (12.0, 18.0)),
    ("On May 5, 2024 from 3 to 4.", (3.0, 4.0)),
    ("frames 120 to 250 (4.0 to 8.3 seconds)", (4.0, 8.3)),
]
NONE = [
    *("From 2.0 to", "At 2.0 seconds.", "From two to five seconds.", "to - ,", "", "3 / 4", "3 4", "3;4"),
    *("There are 5-10 people.", "2 to 3 men", "Between 5 and 10 boys are visible.", "I see 2, 3 men"),
    *("5-10-year-old", "7-8pm", "5 to 6 o'clock", "5-10个人", "$5 to $10", "aspect 16:9", "24/7", "2x2 - 3"),
    *(
        "12% to 34%",
        "12-34%",
        "12 to 34 frames",
        "frames 12 to 34",
        "20-25°C",
        '{"start_frame": 1, "end_frame": 2}',
    ),
    *("It starts at 12% and ends at 18%", "2024-05-06", "1-2-3", "version 1.2.3 - 4", "1e3 to 2e3"),
    *("-5 to 10", "from -5 to -2", "start: 1.2.3, end: 5", "1:2:03 and 1:04", "at 00:75:10 - 3:2"),
]


@pytest.mark.parametrize(("text", "span"), [*THOUGHTS, *FORMS, *((text, None) for text in NONE)])
def test_an_answer_names_one_interval_or_none(text, span):
    assert parse_span(text) == (span and pytest.approx(span))


times = st.integers(0, 99_999).map(lambda tenths: tenths / 10)
UNITS = ("", "s", " s", " sec", " seconds", "秒")
JOINS = (" to ", " - ", "-", "–", " and ", " until ", ", ")
AROUND = (
    "{}",
    "From {}.",
    "The event happens in {}",
    "[{}]",
    "**{}**",
    "<answer>{}</answer>",
    "<think>1 - 2</think>{}",
)


@given(
    start=times,
    end=times,
    unit=st.sampled_from(UNITS),
    join=st.sampled_from(JOINS),
    around=st.sampled_from(AROUND),
)
def test_every_form_of_an_interval_is_read(start, end, unit, join, around):
    assert parse_span(around.format(f"{start:.1f}{unit}{join}{end:.1f}{unit}")) == (start, end)


@given(start=times, end=times)
def test_answers_of_the_demo_and_of_the_prompt_styles_are_read_back(start, end):
    for template in (
        "From {:.1f} to {:.1f} seconds.",
        "The event happens in {:.1f} - {:.1f} seconds.",
        "[[{}, {}]]",
    ):
        assert parse_span(template.format(start, end)) == (start, end)


pieces = st.sampled_from(
    [
        *"1234567890.,:-–'\"[]<>()% \n",
        " to ",
        " and ",
        "s",
        " min ",
        "start",
        "end",
        "<think>",
        "</think>",
        "<answer>",
    ]
)


@given(text=st.one_of(st.text(), st.lists(pieces, max_size=40).map("".join)))
def test_reading_never_raises(text):
    span = parse_span(text)
    assert span is None or (len(span) == 2 and not any(math.isnan(time) or time < 0 for time in span))


HARD = [
    "1,5 ",
    "'a1 ",
    '"1 2',
    "“1",
    "<think>a</think>b",
    "<answer>",
    "</think>",
    "<",
    "start at 1 ",
    "1 h ",
    "frame 1 to 2 ",
]


@pytest.mark.parametrize("unit", HARD)
def test_reading_is_linear(unit):
    """With a pattern that backtracks this test runs into its timeout."""
    short, long = (parse_span(unit * times) for times in (100, 30_000))
    assert short == long


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("Write <think> first.<|im_end|>\n<|im_start|>assistant\n", ""),
    ],
)
def test_a_thought_that_the_chat_template_opens_is_known(prompt, tag):
    assert opened_thought(prompt) == tag
    assert parse_span(tag + "Perhaps 3 - 4") == (None if tag else (3.0, 4.0))


# --- sets ---

A_AND_B = ((5.0, 10.0), (15.0, 20.5))
SETS = [
    ("[[5.0, 10.0], [15.0, 20.5]]", A_AND_B),
    ("```json\n[[5, 10],\n [15, 20.5],]\n```\nIt is not 30 - 40.", A_AND_B),
    ("Between 1 and 40 s I see it twice: [[5, 10], [15, 20.5]].", A_AND_B),
    ("[['5.0s', '10.0s'], ['00:15', '00:20.5']]", A_AND_B),
    ("[5, 10], [15, 20.5]", A_AND_B),
    ("[(5, 10), (15, 20.5)]", A_AND_B),
    ("From 5.0 to 10.0 seconds, and from 15.0 to 20.5 seconds.", A_AND_B),
    ("It is seen from 5 to 10 and 15 to 20.5.", A_AND_B),
    ("5 - 10, 15 - 20.5", A_AND_B),
    ("- 00:05 to 00:10\n- 00:15 to 00:20.5", A_AND_B),
    ("The event happens in 5 - 10 seconds.\nThe event happens in 15 - 20.5 seconds.", A_AND_B),
    ('[{"start": 5, "end": 10}, {"end": 20.5, "start": 15}]', A_AND_B),
    ("starts at 5 s and ends at 10 s, then starts at 15 s and ends at 20.5 s", A_AND_B),
    ("<think>at 1 - 2</think><answer>[[5, 10], [15, 20.5]]</answer>", A_AND_B),
    ("[[15, 20.5], [5, 10], [5, 10]]", ((15.0, 20.5), (5.0, 10.0), (5.0, 10.0))),  # as written
    ("[[10, 5], [3, 3]]", ((10.0, 5.0), (3.0, 3.0))),
    ("[[5, 10], [-3, 4], [1]]", ((5.0, 10.0),)),
    ("1 - 2 - 3 - 4", ((1.0, 2.0), (3.0, 4.0))),
    ("5 to 10", ((5.0, 10.0),)),
    ("[[1, 2], [3", ((1.0, 2.0),)),  # cut
    ("[]", ()),
    ("[[]] or 7", ()),
]


@pytest.mark.parametrize(("text", "spans"), SETS)
def test_a_set_is_all_intervals_and_one_answer_the_first(text, spans):
    assert parse_spans(text, as_set=True) == spans
    one = parse_spans(text, as_set=False)
    assert len(one) <= 1 and one == ((first,) if (first := parse_span(text)) else ())


times = st.integers(0, 36_000).map(lambda tenths: tenths / 10)
FORMATS = [
    ("[{}]", "[{:.1f}, {:.1f}]", ", "),
    ("From {}.", "{:.1f} to {:.1f} seconds", ", and from "),
    ("{}", "The event happens in {:.1f} - {:.1f} seconds.", "\n"),
]


@given(st.lists(st.tuples(times, times), min_size=1, max_size=5), st.sampled_from(FORMATS))
def test_any_set_is_read_back(spans, form):
    around, pair, between = form
    assert parse_spans(around.format(between.join(pair.format(*s) for s in spans)), as_set=True) == tuple(
        spans
    )


@given(st.text(alphabet="[], 0123456789.-:to\"'sand\n", max_size=60))
def test_reading_a_set_never_raises_and_begins_where_one_answer_does(text):
    spans, one = parse_spans(text, as_set=True), parse_span(text)
    assert bool(spans) == (one is not None)
