"""Responses -> intervals: what follows the thought, and the interval or the set of them that it names.

docs/evaluation.md lists what is read. Reading takes time linear in the response's length and never raises.
"""

import math
import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from video_opd.types import Span

# Tags of thoughts: Qwen, DeepSeek, Time-R1 and others; Kimi-VL; Magistral; OpenThinker. Boxes: GLM-4.1V.
_NAMES = r"(?:think|thinking|thoughts?|reason|reasoning)"
_THOUGHT = rf"<{_NAMES}>|◁think▷|\[THINK\]|<\|begin_of_thought\|>"
_THOUGHT_END = rf"</{_NAMES}>|◁/think▷|\[/THINK\]|<\|end_of_thought\|>"
_THOUGHT_TAG = re.compile(rf"(?P<end>{_THOUGHT_END})|{_THOUGHT}", re.IGNORECASE)
_ANSWER = re.compile(r"<answer>|<\|begin_of_box\|>", re.IGNORECASE)
_ANSWER_END = re.compile(r"</answer>|<\|end_of_box\|>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*+>")

_UNITS = {  # seconds of each; words end at a letter's end, signs need not
    1.0: r"(?:s|secs?|seo?c?onds?|с|сек|секунд[аыу]?|segundos?|secondes?|sekunden?|secondi)\b|秒钟?|초",
    60.0: r"(?:mins?|minutes?|m(?=\s*\d+(?:\.\d+)?\s*s)|мин|минут[аыу]?)\b|m(?=\d+(?:\.\d+)?\s*s)|分钟?|분",
    3600.0: r"(?:hours?|hrs?|час(?:а|ов)?)\b|h(?=\s*\d+\s*m)|小时|時間|시간",
}
_UNIT_S = {"number": 0.0, **{f"_{unit_s:.0f}": unit_s for unit_s in _UNITS}}  # by group
_UNIT = "|".join(f"(?P<_{unit_s:.0f}>{words})" for unit_s, words in _UNITS.items())
_NUMBER = r"(?P<number>\d++(?:[.:]\d++)*+|(?<![\w.])\.\d++)"
_TIME = re.compile(rf"{_NUMBER}(?:[\s*_`\"']*+(?:{_UNIT}))?+", re.IGNORECASE)
_CLOCK = re.compile(r"(?:(\d{1,2}):(?=\d\d:))?(\d{1,3}):(\d\d(?:\.\d+)?)")  # H:MM:SS or M:SS
_COMMA = r"(?<![\d.,:])(?:\d{1,3}(?:,\d{3})++(?:\.\d+)?|\d+,\d{1,2})(?![\d,:])"  # 1,000.5 or 2,5
_COMMA_NUMBER = re.compile(_COMMA)
_COMMA_NUMBERS = re.compile(rf"{_COMMA}\s{{0,9}}(?:to|and|until|-|–|—)\s{{0,9}}{_COMMA}")
_COMMA_CLOCK = re.compile(r"(:\d\d),(\d{3})(?![\d:])")  # 00:00:20,500

_WIDE = str.maketrans("０１２３４５６７８９．：，", "0123456789.:,")

_DECORATION = " \t\r\n*_`\"'“”‘’<>()[]"
_DASHES = {"-", "--", "–", "—", "―", "−", "‑", "~", "～", "〜", "→", "…"}
_COMMAS = {",", "，", "、"}
_JOINS = {"to", "and", "and until", "until", "till", "til", "up to", "through", "thru", "bis", "und", "hasta"}
_JOINS |= {"до", "по", "и", "到", "至", "直到", "から", "부터", "에서"}
_ABOUT = re.compile(r"^marks?\s+|(?:\s*(?:about|around|approximately|roughly|the|~|≈))+$")
_LABEL = re.compile(  # what stands before a time: `"start_time": "`, `and ends at about `
    r"(?<![A-Za-z])(?:(?P<start>start|begin|开始|開始)|end|stop|finish|结束|結束)(?:s|es|ed|ing|ning)?+"
    r"(?:[\W_]++|(?:time|timestamp|at|is|was|s|sec|seconds?|the|about|around|approximately|in|on|point)"
    r"(?![^\W\d_])|时间|時間|于|在|为|是)*+$",
    re.IGNORECASE,
)

# Words around a pair of numbers that are no times.
_COUNTED_BEFORE = re.compile(
    r"\b(?:frames?|pages?|chapters?|steps?|scenes?|shots?|figures?|objects?|persons?|players?|numbers?|rooms?"
    r"|versions?|ages?|aged|scores?|jan\w*|feb\w*|mar|march|apr\w*|may|june?|july?|aug\w*|sep\w*|oct\w*"
    r"|nov\w*|dec\w*)[\s#]*$",
    re.IGNORECASE,
)
_COUNTED = re.compile(  # any number of these; of bare integers also a plural
    r"[\s*_`\"']*+-?(?:[%°€£]|[个個名人次只岁帧]|명|개|(?:percent|frames?|fps|k?hz|px|pixels?|[ckm]?m|met(?:er|re)s?|k?g"
    r"|feet|ft|inch(?:es)?|miles?|mph|ms|years?|days?|weeks?|months?|degrees?|times|people|persons|x|am|pm)"
    r"(?![^\W_]))",
    re.IGNORECASE,
)
_PLURAL = re.compile(
    r"-[A-Za-z]|[ \t]*+(?!(?:is|as|was|has|his|this|its|shows|happens|occurs|contains|matches|corresponds)\b)"
    r"(?:[A-Za-z]+s|men|women|children|o'clock)\b",
    re.IGNORECASE,
)
_FROM = re.compile(r"\b(?:from|de|von|с|от)[\s*_`\"']*$|从$", re.IGNORECASE)
_PART = re.compile(r"[A-Za-z_](?<!from)(?<!between)$", re.IGNORECASE)  # an integer after it is part of a name
_DATE = re.compile(r"(?:19|20)\d\d-\d\d(?!\d)|\d++-\d++-\d")
_NEAR = 40  # characters that are looked at before a time

_QUOTED = re.compile(
    r"\"[^\"\n]*+\"|“[^“”]*+”|(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w))*+'(?!\w)|(?<!\w)‘(?:[^‘’\n]|(?<=\w)’(?=\w))*+’"
)
_OTHER_WORD = re.compile(rf"\b(?!(?:from|between|to|and|until)\b|{_UNIT})[^\W\d_]{{2,}}", re.IGNORECASE)
_ARRAY_OF_PAIRS = re.compile(r"\[\s*+\[[^\[\]]*+\](?:\s*+,\s*+\[[^\[\]]*+\])*+\s*+,?+\s*+\]")


class _Time(NamedTuple):
    """A number in a text that may be a time."""

    start: int  # in the text
    end: int  # after the unit
    seconds: float  # nan: no time
    unit_s: float  # 0: none is written
    is_bare: bool  # an integer without a unit, which may count anything


def parse_span(text: str) -> Span | None:
    """The interval that a response names, in seconds, or None. A reversed one is returned as written.

    It is the first that follows the thought, outside quotations unless all are inside one.
    """
    return next(iter(parse_spans(text)), None)


def parse_spans(text: str, as_set: bool = False) -> tuple[Span, ...]:
    """parse_span's interval; `as_set`: all that the response names, as written. Empty: none.

    Of a set only the first JSON array of pairs counts, if one has an interval: the rest are words about it.
    """
    answer = _without_commas(_answer_of(text).translate(_WIDE).strip())
    if as_set:
        arrays = (tuple(_spans(array[0], as_set)) for array in _ARRAY_OF_PAIRS.finditer(answer))
        if spans := next(filter(None, arrays), ()):
            return spans

    def without_times(quotation: re.Match[str]) -> str:
        quoted = quotation[0]
        is_answer = len(quoted) == len(answer) or not _OTHER_WORD.search(quoted)
        return quoted if is_answer or not re.search(r"\d", quoted) else "\N{PILCROW SIGN}"

    outside, most = _QUOTED.sub(without_times, answer), None if as_set else 1
    found = tuple(islice(_spans(outside, as_set), most))
    if found or outside == answer:
        return found
    return tuple(islice(_spans(answer, as_set, bare=False), most))


def opened_thought(prompt: str) -> str:
    """The tag of a thought that a prompt ends with, as its chat template wrote it, or ""."""
    match = re.search(rf"(?:{_THOUGHT})\s*\Z", prompt, re.IGNORECASE)
    return match[0] if match else ""


def _answer_of(text: str) -> str:
    """What is outside thoughts: the last part that is not empty, or the last <answer> in it.

    An <answer> ends a thought that has no end; and a thought's end that nothing follows ends the <answer>.
    """
    parts, start, is_outside = [], 0, True
    for tag in _THOUGHT_TAG.finditer(text):
        if tag["end"]:
            if is_outside:  # the prompt opened the thought
                parts.clear()
            start, is_outside = tag.end(), True
        elif is_outside:
            parts.append(text[start : tag.start()])
            start, is_outside = tag.end(), False
    if is_outside or _ANSWER.search(text, start):
        parts.append(text[start:])
    answers = [part for part in parts if _TAG.sub("", part).strip()]
    answer = answers[-1] if answers else text if _ANSWER.search(text) else ""
    tags = [match.end() for match in _ANSWER.finditer(answer)]
    return _ANSWER_END.split(answer[tags[-1] :], maxsplit=1)[0] if tags else answer


def _without_commas(text: str) -> str:
    """Thousands and decimals with a comma in plain digits, if both ends of an interval have one."""
    text = _COMMA_CLOCK.sub(r"\1.\2", text)
    if not _COMMA_NUMBERS.search(text):
        return text

    def plain(match: re.Match[str]) -> str:
        is_decimal = re.fullmatch(r"\d+,\d{1,2}", match[0])
        return match[0].replace(",", "." if is_decimal else "")

    return _COMMA_NUMBER.sub(plain, text)


def _spans(text: str, disjoint: bool, bare: bool = True) -> Iterator[Span]:
    """The pairs of times in `text` that are joined, or told as start and end; not `bare`: without bare pairs.

    `disjoint`: no time is in two of them (5 to 10 and 15 to 20).
    """
    last_end = -1
    for span, is_bare, (start, end) in _intervals(text):
        if (bare or not is_bare) and not (disjoint and start < last_end):
            yield span
            last_end = end


def _intervals(text: str) -> Iterator[tuple[Span, bool, tuple[int, int]]]:
    """All pairs, whether both times are bare, and from where to where in `text` they stand."""
    previous = started = ended = None
    for time in _times(text):
        gap = text[previous.end if previous else 0 : time.start]
        if previous and _joins(text, previous, time, gap) and _is_interval(text, previous, time):
            scale = 1.0 if previous.unit_s else time.unit_s or 1.0  # 1 - 2 minutes
            is_bare = previous.is_bare and time.is_bare
            yield (previous.seconds * scale, time.seconds), is_bare, (previous.start, time.end)
        is_time = not math.isnan(time.seconds) and not _COUNTED.match(text, time.end)
        label = _LABEL.search(gap[-_NEAR:]) if is_time else None
        if label and label["start"]:
            if ended and ended is previous and '"' in gap:  # JSON has no order
                yield (time.seconds, ended.seconds), False, (ended.start, time.end)
            started, ended = time, None
        elif label and started:
            yield (started.seconds, time.seconds), False, (started.start, time.end)
            started = None
        elif label:
            ended = time
        previous = time


def _times(text: str) -> Iterator[_Time]:
    """All numbers with their units, `1 min 5 s` as one."""
    pending: _Time | None = None
    for match in _TIME.finditer(text):
        number, start = match["number"], match.start()
        unit_s = 1.0 if ":" in number else _UNIT_S[match.lastgroup or "number"]
        seconds = _value(number) * (unit_s or 1.0)
        if pending:
            between = text[pending.end : start].strip(" ,") if pending.unit_s > unit_s > 0 else "-"
            if between in ("", "and") and seconds < pending.unit_s:
                start, seconds = pending.start, pending.seconds + seconds
            else:
                yield pending
        pending = _Time(start, match.end(), seconds, unit_s, is_bare=not unit_s and "." not in number)
    if pending:
        yield pending


def _value(number: str) -> float:
    """Of a number or, in seconds, of a clock time; nan if it is neither."""
    if ":" not in number:
        return float(number) if number.count(".") <= 1 else math.nan
    clock = _CLOCK.fullmatch(number)
    hours, minutes, seconds = (float(part or 0) for part in clock.groups()) if clock else [math.nan] * 3
    return hours * 3600 + minutes * 60 + seconds


def _joins(text: str, first: _Time, second: _Time, gap: str) -> bool:
    """Whether the text between two times makes an interval of them: a dash, a comma or a word."""
    core = gap.strip(_DECORATION).lower()
    if not 0 < len(core) <= _NEAR:
        return False
    marks = set(gap.replace("->", ""))
    opens, closes = bool(marks & set("([<")), bool(marks & set(")]>"))
    if opens or closes:  # [12.0] - [18.5], but not [1] - [12.0, 18.5]
        is_closed = re.match(r"[\"'*]*+[)\]>]", text[second.end : second.end + _NEAR])
        if core in _COMMAS or not (opens and closes and is_closed):
            return False
    if core in _COMMAS:
        return second.unit_s > 0 or not first.unit_s  # it lasts 5 seconds, 12 to 17
    if core in _DASHES:
        return True
    return _ABOUT.sub("", core.strip(",:;." + _DECORATION)).strip(_DECORATION) in _JOINS


def _is_interval(text: str, first: _Time, second: _Time) -> bool:
    """Whether a joined pair is of times: no negative number, date, version, percentage or count."""
    before = text[max(0, first.start - _NEAR) : first.start]
    if math.isnan(first.seconds + second.seconds) or before.endswith(("-", "−")):
        return False
    if first.is_bare and _PART.search(before):
        return False
    if _COUNTED_BEFORE.search(before) or _COUNTED.match(text, second.end) or _DATE.match(text, first.start):
        return False
    is_bare = first.is_bare and second.is_bare
    return not (is_bare and _PLURAL.match(text, second.end)) or bool(_FROM.search(before))
