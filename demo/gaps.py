"""A demo under the paper's conditions: a start that lacks skills, a pool that is mostly easy, wrong labels.

The start (`demo/models/start`) cannot read the names of GAP_COLOURS and GAP_SHAPES; other queries it mostly
solves. It also answers a second task, so that forgetting can be measured.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from demo.clips import (
    DEFAULT_LEVELS,
    LEVELS,
    SPLIT_FILES,
    Drawn,
    Event,
    digest_of,
    draw_events,
    in_sight,
    in_turn,
    spoil,
    truth_of,
    whole_folder,
    write_csv,
    write_labels,
    write_videos,
)
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_data import DatasetConfig, VideoConfig
from video_opd.config_file import load_demo
from video_opd.datasets import read_prompts
from video_opd.models.forward import generate, load_model
from video_opd.models.prompting import PromptEncoder
from video_opd.types import Prompt

MODELS = ROOT / "demo" / "models"
GAP_COLOURS, GAP_SHAPES = ("white", "magenta"), ("pole",)
Skill = Literal["solved", "gap", "faint"]
"""Of a prompt: the start can read the query, or cannot; faint: the teacher itself is bad."""
WRONG_LABELS = "wrong.txt"  # the training split's annotations with wrong labels
QUESTION = "{query}?"  # the second task's template
MAX_ANSWER_TOKENS, BATCH = 4, 64


class Split(NamedTuple):
    """Clips whose prompts have these skills, in turn."""

    seed: int
    num_clips: int
    skills: tuple[Skill, ...]
    spoil_frac: float = 0.0  # of all prompts, in WRONG_LABELS


_POOL: tuple[Skill, ...] = ("solved", "gap", "solved", "faint", "solved", "gap", "solved", "solved")
SPLITS = {
    "train": Split(11, 1200, _POOL, spoil_frac=0.3),
    "validation": Split(12, 100, ("solved", "gap")),
    "eval": Split(13, 160, ("solved", "gap")),
}
PRETRAIN = Split(14, 2000, ("solved",))


class Question(NamedTuple):
    """Of the second task: a clip's prompt and its one-word answer."""

    prompt: Prompt
    answer: str


def skill_of(prompt_id: str) -> Skill:
    """The skill that a prompt of these splits asks for."""
    for skill in get_args(Skill):
        if prompt_id.startswith(skill):
            return cast(Skill, skill)
    raise ValueError(f"{prompt_id} is no prompt of the splits that demo/gaps.py writes")


def _is_gap(event: Event) -> bool:
    return event.colour in GAP_COLOURS or event.shape in GAP_SHAPES


def _draw(skill: Skill, number: int, rng: np.random.Generator) -> Drawn:
    """A clip with at least one object that asks for the skill; its prompts ask for all such objects.

    An object of a gap is never alone: whoever cannot read its name has to guess.
    """
    level = "faint" if skill == "faint" else DEFAULT_LEVELS[rng.integers(len(DEFAULT_LEVELS))]
    while True:
        events = draw_events(LEVELS[level], rng)
        asked = [e for e in in_sight(events) if skill == "faint" or _is_gap(e) == (skill == "gap")]
        if asked and (skill != "gap" or len(events) > 1):
            return Drawn(f"{skill}{number:05d}", events, asked)


def _questions(clip: Drawn) -> Iterator[tuple[str, str]]:
    """The second task's questions about a clip's solved objects, and the answers, where there is just one."""
    for event in in_sight(clip.events):
        others = [other for other in clip.events if other is not event]
        if _is_gap(event) or event.opacity < 1:
            continue
        if all(other.shape != event.shape for other in others):
            yield f"Which colour is the {event.shape}", event.colour
        if all(other.colour != event.colour for other in others):
            yield f"Which shape is the {event.colour}", event.shape


def write_gaps(folder: Path, split: Split) -> None:
    """Writes a split with clean labels, the same with wrong ones, and the second task's questions.

    The folder appears whole or not at all; the same split gives the same files.
    """
    rng = np.random.default_rng([split.seed, 2602_02994])
    skills = enumerate(in_turn(split.skills, split.num_clips))
    with whole_folder(folder) as temporary:
        clips = write_videos(temporary, (_draw(skill, number, rng) for number, skill in skills), rng)
        write_labels(temporary, clips, truth_of(clips))
        labels = spoil(truth_of(clips), split.spoil_frac, np.random.default_rng([split.seed, 1]))
        write_labels(temporary, clips, labels, WRONG_LABELS)
        rows = ((clip.clip_id, *question) for clip in clips for question in _questions(clip))
        write_csv(temporary / "questions.csv", ("id", "question", "answer"), rows)


def ensure_gaps(folder: Path) -> list[str]:
    """Writes the splits that are missing, or made by other code; returns their names."""
    code, written = digest_of(Path(__file__), Path(__file__).with_name("clips.py")), []
    for name, split in SPLITS.items():
        stamp = folder / name / "VERSION"
        version = f"{code} {split}"
        if not stamp.is_file() or stamp.read_text() != version:
            write_gaps(folder / name, split)
            stamp.write_text(version)
            written.append(name)
    return written


def mixture(folder: Path) -> dict[str, int]:
    """Prompts of each skill in a split's folder, and wrong labels."""
    lines = (folder / "annotations.txt").read_text().splitlines()
    wrong = (folder / WRONG_LABELS).read_text().splitlines()
    differing = sum(clean != other for clean, other in zip(lines, wrong, strict=True))
    return {**Counter(map(skill_of, lines)), "wrong labels": differing}


def overrides(
    folder: Path, labels: Literal["clean", "wrong"], held_out: Literal["validation", "eval"]
) -> list[str]:
    """What turns configs/demo.yaml into a run of the start on these splits, key=value."""
    folder = folder.resolve()
    values = {"student": MODELS / "start", "teacher": MODELS / "teacher"}
    for part, split in {"train": "train", "eval": held_out}.items():
        values |= {f"data.{part}.{key}": folder / split / name for key, name in SPLIT_FILES.items()}
    if labels == "wrong":
        values["data.train.annotations"] = folder / "train" / WRONG_LABELS
    return [f"{key}={value}" for key, value in values.items()]


def read_questions(folder: Path, dataset: DatasetConfig, video: VideoConfig) -> list[Question]:
    """The second task on the clips of a split's folder."""
    clips = {prompt.clip.clip_id: prompt.clip for prompt in read_prompts(dataset, video, 32)}
    questions = []
    with (folder / "questions.csv").open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            names = {"prompt_id": f"{row['id']}:{number}", "query": row["question"]}
            prompt = Prompt(clip=clips[row["id"]], answer_spans_s=None, **names)
            questions.append(Question(prompt, row["answer"]))
    return questions


def question_encoder(model_folder: Path, config: Config) -> PromptEncoder:
    """The encoder of the second task's prompts."""
    asking = config.prompt.model_copy(update={"template": QUESTION})
    return PromptEncoder(model_folder, asking, config.video)


def second_task(model_folder: Path, folder: Path) -> float:
    """Share of right answers of a model folder to the second task on the evaluation split, greedy."""
    config = load_demo(overrides(folder, "clean", "eval"))
    questions = read_questions(folder / "eval", config.data.eval, config.video)
    encoder, model = question_encoder(model_folder, config), load_model(str(model_folder), "float32").eval()
    tokenizer, num_right = encoder.tokenizer, 0
    limits = {
        "max_tokens": MAX_ANSWER_TOKENS,
        "banned_ids": encoder.pad_ids,
        "pad_id": tokenizer.pad_token_id,
    }
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        answers = generate(model, [encoder.encode(q.prompt) for q in part], **limits)
        pairs = zip(answers, part, strict=True)
        num_right += sum(tokenizer.decode(ids) == question.answer for (ids,), question in pairs)
    return num_right / len(questions)
