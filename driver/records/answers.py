"""What a report says of answers: prompts that changed most, errors by event, tokens that were disputed."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from video_opd.answers import parse_spans
from video_opd.grounding import duration_s, merge, prompt_iou
from video_opd.models.lengths import read_tokenizer
from video_opd.types import Prompt

MODELS = {"student_before": "before", "student_after": "after", "teacher": "teacher"}
NUM_CHANGES = 3  # the best, and the worst
NUM_BINS = 5
LAST_STEPS = 50  # whose answers are looked through
NUM_ANSWERS, MAX_TOKENS = 6, 200
FULL_COLOUR_NATS = 3.0
DOUBTED, PREFERRED = "214,39,40", "44,160,44"  # by the teacher: red, green

Ious = Mapping[str, np.ndarray]  # float64[prompts] by evaluation; NaN: a prompt without truth


def prompt_ious(
    prompts: Sequence[Prompt], examples: Mapping[str, Mapping[str, str]], as_sets: bool = False
) -> Ious:
    """Of each model that answered; a missing answer is IoU 0. `examples`: texts by evaluation and prompt."""
    reading = "merged" if as_sets else "best"

    def iou(prompt: Prompt, text: str) -> float:
        return prompt_iou(parse_spans(text, as_sets), prompt, reading) if prompt.answer_spans_s else np.nan

    asked = [name for name in MODELS if examples.get(name)]
    return {n: np.array([iou(p, examples[n].get(p.prompt_id, "")) for p in prompts]) for n in asked}


def largest_changes(prompts: Sequence[Prompt], ious: Ious) -> list[tuple[str, Prompt]]:
    """Prompts with captions: the worst changes, then the best; the first prompts where none can be known."""
    order, change = np.arange(0), np.zeros(len(prompts))
    if {"student_before", "student_after"} <= ious.keys():
        change = ious["student_after"] - ious["student_before"]
        order = np.argsort(change, kind="stable")
    worst = [int(i) for i in order[:NUM_CHANGES] if change[i] < 0]
    best = [int(i) for i in order[np.isfinite(change[order])][::-1][:NUM_CHANGES] if change[i] > 0]
    shown = worst + best or range(min(NUM_CHANGES, len(prompts)))
    return [(_caption(prompts[i], {name: of[i] for name, of in ious.items()}), prompts[i]) for i in shown]


def _caption(prompt: Prompt, ious: Mapping[str, float]) -> str:
    known = ", ".join(f"{MODELS[name]} {iou:.2f}" for name, iou in ious.items() if np.isfinite(iou))
    return f"{prompt.prompt_id}: IoU {known}" if known else prompt.prompt_id


@dataclass(frozen=True)
class ErrorTable:
    """Mean IoU of prompts with like events."""

    what: str
    models: list[str]
    rows: list[tuple[str, int, list[str]]]  # bin, prompts, mean IoU of each model


def error_tables(prompts: Sequence[Prompt], ious: Ious) -> list[ErrorTable]:
    """By the true event's length, in bins of as many prompts, and by its middle in the video, in fifths.

    An event of several intervals is as long as they together, and lies in the middle of their hull.
    """
    known = [(i, p, merge(p.answer_spans_s or ())) for i, p in enumerate(prompts)]
    known = [(i, p, spans) for i, p, spans in known if spans]
    if not known or not ious:
        return []
    of = {name: values[[i for i, *_ in known]] for name, values in ious.items()}
    lengths = np.array([duration_s(spans) for *_, spans in known])
    middles = np.array([(s[0][0] + s[-1][1]) / 2 / p.clip.duration_s for _, p, s in known]).clip(0, 1)
    by_length = np.unique(np.quantile(lengths, np.linspace(0, 1, NUM_BINS + 1)))
    by_place = np.linspace(0, 100, NUM_BINS + 1)
    return [
        _binned("length of the event", lengths, by_length, "s", of),
        _binned("middle of the event in the video", 100 * middles, by_place, "%", of),
    ]


def _binned(what: str, values: np.ndarray, edges: np.ndarray, unit: str, ious: Ious) -> ErrorTable:
    bins = np.digitize(values, edges[1:-1])
    rows = []
    for number in np.unique(bins):
        inside, (low, high) = bins == number, edges[[number, min(number + 1, len(edges) - 1)]]
        means = [f"{of[inside].mean():.3f}" for of in ious.values()]
        rows.append((f"{low:.4g} to {high:.4g} {unit}", int(inside.sum()), means))
    return ErrorTable(what, [MODELS[name] for name in ious], rows)


@dataclass(frozen=True)
class DisputedAnswer:
    """A rollout whose tokens student and teacher hold for differently likely."""

    step: int
    prompt_id: str
    tokens: list[tuple[str, str, str]]  # text, CSS colour, both probabilities in words


def disputed_answers(trajectories: Path, student: Path) -> list[DisputedAnswer]:
    """Of the last steps, an answer of each of the prompts with the largest mean |log-ratio| of a token.

    Empty without a teacher's log-probs. Raises ModelError if the student's tokenizer cannot be read.
    """
    largest: dict[str, tuple[float, dict[str, Any]]] = {}
    for row in _last_rows(trajectories):
        ratio = np.asarray(row["teacher_logprobs"]) - np.asarray(row["actor_logprobs"])
        size = float(np.abs(ratio).mean()) if len(ratio) else 0.0
        if size > largest.get(row["prompt_id"], (0.0, {}))[0]:
            largest[row["prompt_id"]] = size, row
    rows = [row for _, row in sorted(largest.values(), key=lambda found: -found[0])[:NUM_ANSWERS]]
    if not rows:
        return []
    tokenizer = read_tokenizer(student)
    return [DisputedAnswer(row["step"], row["prompt_id"], _tokens(row, tokenizer)) for row in rows]


def _last_rows(trajectories: Path) -> Iterator[dict[str, Any]]:
    """Rollouts of the last steps that a teacher scored. A batch that a crash cut off is left out."""
    batches = deque[pa.RecordBatch](maxlen=LAST_STEPS)
    for path in sorted(trajectories.glob("from-step-*.arrows")):
        with suppress(pa.ArrowInvalid), pa.memory_map(str(path)) as source:
            batches.extend(pa.ipc.open_stream(source))
    columns = ["step", "prompt_id", "response_token_ids", "actor_logprobs", "teacher_logprobs"]
    for batch in batches:
        scored = batch.filter(batch["teacher_logprobs"].is_valid())
        sampled = scored["prompt_fingerprint"].is_valid()  # not the ground truth: no student's log-probs
        yield from scored.select(columns).filter(sampled).to_pylist()


def _tokens(row: Mapping[str, Any], tokenizer: Any) -> list[tuple[str, str, str]]:
    tokens = []
    columns = (
        row[name][:MAX_TOKENS] for name in ("response_token_ids", "actor_logprobs", "teacher_logprobs")
    )
    for token, student, teacher in zip(*columns, strict=True):
        share = min(1.0, abs(teacher - student) / FULL_COLOUR_NATS)
        colour = f"rgba({PREFERRED if teacher > student else DOUBTED},{share:.2f})"
        title = f"student {np.exp(student):.3f}, teacher {np.exp(teacher):.3f}"
        tokens.append((tokenizer.decode([token], skip_special_tokens=False), colour, title))
    return tokens
