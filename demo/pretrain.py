"""Trains the tiny models from seeds on ground-truth answers: teacher, student and start, as committed.

An auxiliary head, thrown away afterwards, learns what each video token shows and what is asked for. Without
it tiny models stay on a plateau for hundreds of steps.
"""

import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from demo.clips import COLOURS, DEFAULT_LEVELS, SHAPES, SPLIT_FILES, write_split
from demo.gaps import (
    GAP_COLOURS,
    GAP_SHAPES,
    MODELS,
    PRETRAIN,
    Question,
    question_encoder,
    read_questions,
    write_gaps,
)
from demo.models import STUDENT, TEACHER, Size, build_model, build_processor
from video_opd.config import Config
from video_opd.config_data import DatasetConfig
from video_opd.config_file import load_demo
from video_opd.datasets import read_prompts
from video_opd.grounding import evaluate
from video_opd.models.forward import ResponseLogits, VideoLLM, collate, generate, load_model
from video_opd.models.prompting import PromptEncoder
from video_opd.models.trees import packed_places
from video_opd.types import EncodedPrompt, Prediction, Prompt, Span

NUM_CLIPS, NUM_VALIDATION_CLIPS = 5000, 100  # of the pretraining split; validation decided when to stop
NUM_LABELS = len(COLOURS) * len(SHAPES) + 1  # of one kind: every object, and the asked one
VIDEO = 2  # transformers' token type of a video token
STEPS, LR, BATCH, VALIDATE_EVERY = 1800, 2e-3, 32, 100


class Recipe(NamedTuple):
    """How one model is trained: the first `stop_after` steps of a cosine schedule."""

    size: Size
    seed: int
    stop_after: int
    steps: int = STEPS  # of the schedule
    has_gaps: bool = False  # it begins with the student, forgets names, and has the clips of demo/gaps.py


RECIPES = {
    "teacher": Recipe(TEACHER, 0, stop_after=STEPS),
    "student": Recipe(STUDENT, 1, stop_after=300),
    "start": Recipe(STUDENT, 2, stop_after=500, steps=500, has_gaps=True),
}


class Example(NamedTuple):
    """An encoded prompt with its answer and its auxiliary labels."""

    prompt: Prompt
    encoded: EncodedPrompt
    answer: np.ndarray  # int32[N], end token included
    labels: np.ndarray  # float32[video tokens, 5 * NUM_LABELS]; no rows: the second task has none


def build_examples(prompts: Sequence[Prompt], encoder: PromptEncoder) -> list[Example]:
    """One example for each prompt, in order; all queries of a clip share one copy of its frames."""
    of_clip: defaultdict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        of_clip[prompt.clip.clip_id].append(prompt)
    frames: dict[str, np.ndarray] = {}
    examples = []
    for prompt in prompts:
        clip_id, encoded = prompt.clip.clip_id, encoder.encode(prompt)
        encoded = replace(encoded, frames=frames.setdefault(clip_id, encoded.frames))
        answer = encoder.answer_ids([_answer(prompt)])
        examples.append(Example(prompt, encoded, answer, _labels(prompt, of_clip[clip_id])))
    return examples


def second_examples(
    questions: Sequence[Question], encoder: PromptEncoder, examples: Sequence[Example]
) -> list[Example]:
    """One example for each question about the clips of `examples`, whose frames they share."""
    frames = {example.prompt.clip.clip_id: example.encoded.frames for example in examples}
    of_questions = []
    for prompt, word in questions:
        encoded = replace(encoder.encode(prompt), frames=frames[prompt.clip.clip_id])
        text = word + encoder.tokenizer.eos_token
        answer = np.asarray(encoder.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        of_questions.append(Example(prompt, encoded, answer, np.zeros((0, 5 * NUM_LABELS), np.float32)))
    return of_questions


def _answer(prompt: Prompt) -> Span:
    assert prompt.answer_spans_s, "the demo labels every prompt"
    return prompt.answer_spans_s[0]


def _object(prompt: Prompt) -> int:
    """Index of the (colour, shape) that a prompt asks for; a query reads 'the red square is visible'."""
    _, colour, shape, *_ = prompt.query.split()
    return list(COLOURS).index(colour) * len(SHAPES) + SHAPES.index(shape)


def _labels(asked: Prompt, prompts: Sequence[Prompt]) -> np.ndarray:
    """float32[video tokens, 5 * NUM_LABELS]: the auxiliary head's targets when `asked` is the question.

    Five kinds: visible in the token's first frame, in its second, just appeared, just disappeared (each for
    every object, then for the asked one), and which object is asked for. Without the last kind a tiny model
    answers for any object for a long time.
    """
    times = asked.clip.timestamps_s
    visible = np.zeros((len(times), NUM_LABELS), np.float32)
    for prompt in prompts:
        start, end = _answer(prompt)
        shown = (start <= times) & (times < end)
        visible[shown, _object(prompt)] = 1
        if prompt is asked:
            visible[shown, -1] = 1
    first, second = visible[::2], visible[1::2]
    before_first, before_second = (np.concatenate([np.zeros_like(v[:1]), v[:-1]]) for v in (first, second))
    question = np.zeros_like(first)
    question[:, _object(asked)] = 1
    kinds = [first, second, second * (1 - before_second), before_first * (1 - first), question]
    return np.concatenate(kinds, axis=-1)


def _auxiliary_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy; the asked object and the question weigh as much as all objects together."""
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    losses = losses.unflatten(-1, (5, NUM_LABELS))
    return losses[:, :4, :-1].mean() + losses[:, :4, -1].mean() + 4 * losses[:, 4].mean()


def validate(model: VideoLLM, examples: Sequence[Example], encoder: PromptEncoder) -> dict[str, float]:
    """mIoU and R1@m of the greedy answers, and the share of right ones to the second task, if it is there."""
    model.eval()
    limits = {"max_tokens": 16, "pad_id": encoder.tokenizer.pad_token_id, "banned_ids": encoder.pad_ids}
    predictions, is_right = [], []
    for i in range(0, len(examples), 64):
        part = examples[i : i + 64]
        answers = generate(model, [e.encoded for e in part], **limits)
        for example, (ids,) in zip(part, answers, strict=True):
            text, prompt_id = encoder.tokenizer.decode(ids), example.prompt.prompt_id
            if len(example.labels):
                spans = encoder.spans_in(text, example.prompt.style)
                predictions.append(Prediction(prompt_id=prompt_id, text=text, spans_s=spans))
            else:
                is_right.append(np.array_equal(ids, example.answer[:-1]))
    model.train()
    metrics = evaluate(predictions, [e.prompt for e in examples if len(e.labels)])
    return metrics | ({"second task": float(np.mean(is_right))} if is_right else {})


def forget(model: VideoLLM, tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> None:
    """Draws the embeddings of these words anew, so that the model cannot read them."""
    texts = [text for word in words for text in (word, f" {word}")]
    ids = sorted({i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]})
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[ids] = torch.randn(len(ids), table.shape[1]) * table.std()


def train(
    recipe: Recipe, examples: Sequence[Example], validation: Sequence[Example], encoder: PromptEncoder
) -> VideoLLM:
    """Cross-entropy on answers plus the auxiliary head; cosine learning rate."""
    model = build_model(recipe.size, encoder.tokenizer, recipe.seed)
    if recipe.has_gaps:
        model.load_state_dict(load_model(str(MODELS / "student"), "float32").state_dict())
        forget(model, encoder.tokenizer, (*GAP_COLOURS, *GAP_SHAPES))
    head = torch.nn.Linear(recipe.size.hidden, examples[0].labels.shape[1])
    logits_of = ResponseLogits(model)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    order, started = random.Random(recipe.seed), time.monotonic()
    for step in range(recipe.stop_after):
        warmup = min(1.0, (step + 1) / 100)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = LR * (warmup * cosine)
        chosen, pad_id = order.sample(examples, BATCH), encoder.tokenizer.pad_token_id
        batch = collate([e.encoded for e in chosen], [e.answer for e in chosen], pad_id)
        hidden = logits_of.hidden(replace(batch, rows=torch.arange(len(batch.places))))  # of all tokens
        answer_loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[batch.rows]), batch.targets)
        labels = torch.from_numpy(np.concatenate([e.labels for e in chosen]))
        pairs = [(at, e) for at, e in zip(packed_places(batch.trees), chosen, strict=True) if len(e.labels)]
        seen = np.concatenate([places[np.flatnonzero(e.encoded.token_types == VIDEO)] for places, e in pairs])
        auxiliary = _auxiliary_loss(head(hidden[seen]), labels)
        optimizer.zero_grad()
        (answer_loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % VALIDATE_EVERY == 0:
            metrics = validate(model, validation, encoder)
            losses = f"answer loss {answer_loss.item():.3f} auxiliary {auxiliary.item():.3f}"
            shown = {k: v for k, v in metrics.items() if k in ("miou", "r1@0.7", "second task")}
            scores = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"step {step + 1} {losses} {scores} {time.monotonic() - started:.0f} s", flush=True)
    return model


def _read(folder: Path, processor: Path, config: Config, has_gaps: bool) -> list[Example]:
    """The examples of a pretraining split, which is written if it is missing."""
    if not folder.is_dir():
        if has_gaps:
            write_gaps(folder, PRETRAIN)
        else:
            write_split(folder, "pretrain", NUM_CLIPS, DEFAULT_LEVELS)
    dataset = DatasetConfig.model_validate({key: str(folder / name) for key, name in SPLIT_FILES.items()})
    encoder = PromptEncoder(processor, config.prompt, config.video)
    examples = build_examples(read_prompts(dataset, config.video, 32), encoder)
    if has_gaps:
        questions = read_questions(folder, dataset, config.video)
        examples += second_examples(questions, question_encoder(processor, config), examples)
    return examples


def pretrain(names: Sequence[str], out: Path, data: Path) -> None:
    """Writes a model folder for each name into `out`; `data` is the folder of the clips, made if missing."""
    config = load_demo()
    torch.set_num_threads(1)
    processor, processor_folder = build_processor(), out / ".processor"
    processor.save_pretrained(processor_folder)
    encoder = PromptEncoder(processor_folder, config.prompt, config.video)
    for name in names:
        recipe = RECIPES[name]
        folder = data / ("pretrain_gaps" if recipe.has_gaps else "pretrain")
        examples = _read(folder, processor_folder, config, recipe.has_gaps)
        held_out = set(list({e.prompt.clip.clip_id: None for e in examples})[:NUM_VALIDATION_CLIPS])
        validation = [e for e in examples if e.prompt.clip.clip_id in held_out]
        training = [e for e in examples if e.prompt.clip.clip_id not in held_out]
        print(f"{name}: {recipe}, {len(training)} examples, {len(validation)} for validation", flush=True)
        model = train(recipe, training, validation, encoder)
        temporary = out / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        shutil.rmtree(out / name, ignore_errors=True)
        temporary.rename(out / name)
    shutil.rmtree(processor_folder)
