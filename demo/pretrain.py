"""Trains the tiny teacher and student from seeds on ground-truth answers: the models that are committed.

An auxiliary head, thrown away afterwards, learns at every video token what it shows and what is asked for; without it
tiny models stay on a plateau for hundreds of steps.
"""

import argparse
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from demo.clips import COLOURS, DEFAULT_LEVELS, SHAPES, write_split
from demo.models import STUDENT, TEACHER, Size, build_model, build_processor
from video_opd.config_data import DatasetConfig
from video_opd.config_file import load_config
from video_opd.datasets import read_prompts
from video_opd.grounding import evaluate
from video_opd.models.forward import ResponseLogits, VideoLLM, collate, generate
from video_opd.models.prompting import PromptEncoder, parse_span
from video_opd.types import EncodedPrompt, Prediction, Prompt, Span

NUM_CLIPS, NUM_VALIDATION_CLIPS = 5000, 100  # of the pretraining split; validation decides when to stop
NUM_LABELS = len(COLOURS) * len(SHAPES) + 1  # of one kind: every object, and the asked one
VIDEO = 2  # transformers' token type of a video token


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: a cosine over `steps`, of which the first `stop_after` are done."""

    size: Size
    seed: int
    steps: int
    lr: float
    stop_after: int
    batch: int = 32
    validate_every: int = 25


RECIPES = {
    "teacher": Recipe(size=TEACHER, seed=0, steps=1800, lr=2e-3, stop_after=1800),
    "student": Recipe(size=STUDENT, seed=1, steps=1800, lr=2e-3, stop_after=300),
}


@dataclass(frozen=True)
class Example:
    """An encoded prompt with its answer and its auxiliary labels."""

    encoded: EncodedPrompt
    answer: np.ndarray  # int32[N], end token included
    labels: np.ndarray  # float32[video tokens, 5 * NUM_LABELS]


def build_examples(prompts: list[Prompt], encoder: PromptEncoder) -> list[Example]:
    by_clip: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_clip.setdefault(prompt.clip.clip_id, []).append(prompt)
    pixels: dict[str, np.ndarray] = {}
    examples = []
    for prompt in prompts:
        encoded = encoder.encode(prompt)
        shared = pixels.setdefault(prompt.clip.clip_id, encoded.pixel_values)
        object.__setattr__(
            encoded, "pixel_values", shared
        )  # one copy of the pixels for all queries of a clip
        examples.append(
            Example(
                encoded, encoder.answer_ids(_answer(prompt)), _labels(prompt, by_clip[prompt.clip.clip_id])
            )
        )
    return examples


def _answer(prompt: Prompt) -> Span:
    assert prompt.answer_spans_s, "the demo labels every prompt"
    return prompt.answer_spans_s[0]


def _object(prompt: Prompt) -> int:
    """Which (colour, shape) a prompt asks for; the demo's queries read 'the red square is visible'."""
    _, colour, shape, *_ = prompt.query.split()
    return list(COLOURS).index(colour) * len(SHAPES) + SHAPES.index(shape)


def _labels(asked: Prompt, prompts: list[Prompt]) -> np.ndarray:
    """float32[video tokens, 5 * NUM_LABELS]: what the auxiliary head learns of a clip, when `asked` is the question.

    Five kinds: visible in the token's first frame, in its second, just appeared, just disappeared (each for every object,
    then for the asked one), and which object is asked for. Without the last one a tiny model long answers for any object.
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
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").unflatten(
        -1, (5, NUM_LABELS)
    )
    return losses[:, :4, :-1].mean() + losses[:, :4, -1].mean() + 4 * losses[:, 4].mean()


def validate(model: VideoLLM, examples: list[Example], prompts: list[Prompt], encoder: PromptEncoder) -> dict:
    model.eval()
    predictions = []
    for i in range(0, len(examples), 64):
        answers = generate(
            model,
            [e.encoded for e in examples[i : i + 64]],
            max_tokens=16,
            pad_id=encoder.tokenizer.pad_token_id,
            banned_ids=encoder.pad_ids,
        )
        for prompt, (ids,) in zip(prompts[i : i + 64], answers, strict=True):
            text = encoder.tokenizer.decode(ids)
            predictions.append(Prediction(prompt_id=prompt.prompt_id, text=text, span_s=parse_span(text)))
    model.train()
    return evaluate(predictions, prompts)


def train(
    recipe: Recipe,
    examples: list[Example],
    validation: tuple[list[Example], list[Prompt]],
    encoder: PromptEncoder,
):
    """Cross-entropy on answers plus the auxiliary head; cosine learning rate. Returns the model."""
    model = build_model(recipe.size, encoder.tokenizer, recipe.seed)
    head = torch.nn.Linear(recipe.size.hidden, examples[0].labels.shape[1])
    logits_of = ResponseLogits(model)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01)
    hidden: list[torch.Tensor] = []
    model.model.language_model.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state))
    order, started = random.Random(recipe.seed), time.monotonic()
    for step in range(recipe.stop_after):
        rate = min(1.0, (step + 1) / 100) * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        chosen = order.sample(examples, recipe.batch)
        batch = collate(
            [e.encoded for e in chosen], [e.answer for e in chosen], encoder.tokenizer.pad_token_id
        )
        hidden.clear()
        answer_loss = torch.nn.functional.cross_entropy(logits_of(batch), batch.targets)
        labels = torch.from_numpy(np.concatenate([e.labels for e in chosen]))
        auxiliary = _auxiliary_loss(head(hidden[0][batch.token_types == VIDEO]), labels)
        optimizer.zero_grad()
        (answer_loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % recipe.validate_every == 0:
            metrics = validate(model, *validation, encoder)
            hidden.clear()
            print(
                f"step {step + 1} answer loss {answer_loss.item():.3f} auxiliary {auxiliary.item():.3f} "
                f"validation mIoU {metrics['miou']:.3f} R1@0.7 {metrics['r1@0.7']:.3f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return model


def pretrain(names: list[str], out: Path, data: Path) -> None:
    config = load_config(Path(__file__).parent.parent / "configs" / "demo.yaml")
    torch.set_num_threads(1)
    if not (data / "pretrain").is_dir():
        write_split(data / "pretrain", "pretrain", NUM_CLIPS, DEFAULT_LEVELS)
    split = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    dataset = DatasetConfig.model_validate({k: str(data / "pretrain" / v) for k, v in split.items()})
    processor = build_processor()
    processor_folder = out / ".processor"
    processor.save_pretrained(processor_folder)
    encoder = PromptEncoder(processor_folder, config.prompt, config.video)
    prompts = read_prompts(dataset, config.video, 32)
    examples = build_examples(prompts, encoder)
    held_out = {f"pretrain{i:05d}" for i in range(NUM_VALIDATION_CLIPS)}
    pairs = list(zip(examples, prompts, strict=True))
    validation = [p for p in pairs if p[1].clip.clip_id in held_out]
    training = [e for e, p in pairs if p.clip.clip_id not in held_out]
    print(f"{len(training)} training examples, {len(validation)} for validation", flush=True)
    for name in names:
        print(f"{name}: {RECIPES[name]}", flush=True)
        model = train(
            RECIPES[name], training, ([e for e, _ in validation], [p for _, p in validation]), encoder
        )
        temporary = out / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        shutil.rmtree(out / name, ignore_errors=True)
        temporary.rename(out / name)
    shutil.rmtree(processor_folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    here = Path(__file__).parent
    parser.add_argument("names", nargs="*", default=list(RECIPES), help="models to train")
    parser.add_argument("--out", type=Path, default=here / "models", help="folder of the model folders")
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of the clips")
