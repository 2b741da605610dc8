"""The splits on which the start lacks skills, and what start and teacher answer there."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from demo import gaps, pretrain
from demo.clips import COLOURS, MAX_SPOILED_IOU, SHAPES
from demo.gaps import GAP_COLOURS, GAP_SHAPES, MODELS, Split, ensure_gaps, overrides, second_task, skill_of
from video_opd.answers import parse_span
from video_opd.config_file import load_demo
from video_opd.datasets import read_prompts
from video_opd.grounding import best_iou, temporal_iou
from video_opd.models.forward import generate, load_model
from video_opd.models.prompting import PromptEncoder
from video_opd.types import Prompt, Span

TINY = {
    "train": gaps.SPLITS["train"]._replace(seed=21, num_clips=8),
    "validation": Split(22, 2, ("solved", "gap")),
    "eval": Split(23, 24, ("solved", "gap")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The three splits, small."""
    folder = tmp_path_factory.mktemp("gaps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps, "SPLITS", TINY)
        assert ensure_gaps(folder) == ["train", "validation", "eval"]
    return folder


def prompts_of(folder: Path, *choice) -> tuple[list[Prompt], list[Prompt]]:
    """Those of training and of the evaluation."""
    config = load_demo(overrides(folder, *choice))
    train, held_out = (
        read_prompts(data, config.video, 32) for data in (config.data.sources[""], config.data.eval)
    )
    return train, held_out


def truth_of(prompt: Prompt) -> Span:
    assert prompt.answer_spans_s
    return prompt.answer_spans_s[0]


def test_a_prompt_asks_for_an_object_of_its_skill(folder):
    train, held_out = prompts_of(folder, "clean", "eval")
    clips = dict.fromkeys(prompt.clip.clip_id for prompt in train)
    assert [skill_of(clip) for clip in clips] == list(TINY["train"].skills)
    for prompt in train + held_out:
        _, colour, shape, *_ = prompt.query.split()
        is_gap = colour in GAP_COLOURS or shape in GAP_SHAPES
        assert skill_of(prompt.prompt_id) == "faint" or is_gap == (skill_of(prompt.prompt_id) == "gap")
    assert {skill_of(p.prompt_id) for p in held_out} == {"solved", "gap"}
    with pytest.raises(ValueError, match="train00001:2"):
        skill_of("train00001:2")


def test_a_share_of_the_training_labels_is_wrong_and_nothing_else_differs(folder):
    clean, held_out = prompts_of(folder, "clean", "validation")
    wrong, same = prompts_of(folder, "wrong", "validation")
    assert [truth_of(p) for p in held_out] == [truth_of(p) for p in same]
    assert [(p.prompt_id, p.query) for p in clean] == [(p.prompt_id, p.query) for p in wrong]
    pairs = [(truth_of(a), truth_of(b)) for a, b in zip(clean, wrong, strict=True)]
    moved = [(a, b) for a, b in pairs if a != b]
    assert len(moved) == round(0.3 * len(pairs)) > 0
    assert all(temporal_iou(a, b) < MAX_SPOILED_IOU for a, b in moved)
    assert gaps.mixture(folder / "train")["wrong labels"] == len(moved)
    in_eval = [skill_of(p.prompt_id) for p in prompts_of(folder, "clean", "eval")[1]]
    counts = {"solved": in_eval.count("solved"), "gap": in_eval.count("gap"), "wrong labels": 0}
    assert gaps.mixture(folder / "eval") == counts


def test_the_same_split_gives_the_same_files_and_only_what_is_missing_is_written(
    folder, tmp_path, monkeypatch
):
    def digests(split: Path) -> dict[str, str]:
        files = sorted(p for p in split.rglob("*") if p.is_file() and p.name != "VERSION")
        return {str(p.relative_to(split)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    gaps.write_gaps(tmp_path / "train", TINY["train"])
    assert digests(tmp_path / "train") == digests(folder / "train")
    monkeypatch.setattr(gaps, "SPLITS", {"train": Split(21, 2, ("gap",))})
    (tmp_path / "train" / "VERSION").write_text("of other code")
    assert ensure_gaps(tmp_path) == ["train"] and ensure_gaps(tmp_path) == []
    assert {skill_of(p.name) for p in (tmp_path / "train" / "videos").iterdir()} == {"gap"}


def test_the_pool_is_mostly_solved_and_the_held_out_splits_half():
    """As docs/data.md states."""
    shares = {}
    for name, split in gaps.SPLITS.items():
        rng = np.random.default_rng(split.seed)
        drawn = [gaps._draw(skill, i, rng) for i, skill in enumerate(split.skills * 20)]
        assert all(len(clip.events) == 2 for clip in drawn if skill_of(clip.clip_id) == "gap")
        asked = [skill_of(clip.clip_id) for clip in drawn for _ in clip.asked]
        shares[name] = {skill: asked.count(skill) / len(asked) for skill in sorted(set(asked))}
    assert shares["train"] == pytest.approx({"faint": 0.16, "gap": 0.25, "solved": 0.59}, abs=0.06)
    for held_out in ("validation", "eval"):
        assert shares[held_out] == pytest.approx({"gap": 0.5, "solved": 0.5}, abs=0.1)


def test_a_question_of_the_second_task_has_one_answer_and_no_gap():
    rng, asked = np.random.default_rng(0), set()
    for number in range(100):
        clip = gaps._draw("gap" if number % 2 else "solved", number, rng)
        for question, answer in gaps._questions(clip):
            _, wanted, *_, named = question.split()
            of_named = [e for e in clip.events if named in (e.colour, e.shape)]
            assert [e.colour if wanted == "colour" else e.shape for e in of_named] == [answer]
            asked |= {named, answer}
    assert asked == {*COLOURS, *SHAPES} - {*GAP_COLOURS, *GAP_SHAPES}


def test_pretraining_learns_from_the_states_of_video_tokens_and_from_both_tasks(folder, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "BATCH", 4)
    monkeypatch.setattr(pretrain, "VALIDATE_EVERY", 1)
    config = load_demo(overrides(folder, "clean", "eval"))
    encoder = PromptEncoder(config.student, config.prompt, config.video)
    asking, held_out = gaps.question_encoder(Path(config.student), config), config.data.eval
    examples = pretrain.build_examples(read_prompts(held_out, config.video, 32)[:4], encoder)
    clips = {e.prompt.clip.clip_id for e in examples}
    questions = gaps.read_questions(folder / "eval", held_out, config.video)
    asked = [q for q in questions if q.prompt.clip.clip_id in clips][:4]
    examples += pretrain.second_examples(asked, asking, examples)
    recipe = pretrain.RECIPES["start"]._replace(stop_after=1, steps=1)
    pretrain.train(recipe, examples, examples, encoder)
    line = capsys.readouterr().out
    assert line.startswith("step 1 answer loss") and "second task" in line and "nan" not in line


def test_the_start_answers_the_second_task_which_the_student_never_saw(folder):
    with (folder / "eval" / "questions.csv").open() as file:
        assert len(list(csv.DictReader(file))) > 20
    assert second_task(MODELS / "start", folder) > 0.75
    assert second_task(MODELS / "student", folder) == 0


def test_the_start_lacks_what_the_teacher_can(folder):
    config = load_demo(overrides(folder, "clean", "eval"))
    prompts = read_prompts(config.data.eval, config.video, 32)
    miou = {}
    for name in ("student", "teacher"):
        path = str(getattr(config, name))
        encoder, model = PromptEncoder(path, config.prompt, config.video), load_model(path, "float32").eval()
        limits = {"max_tokens": 16, "pad_id": encoder.tokenizer.pad_token_id, "banned_ids": encoder.pad_ids}
        answers = generate(model, [encoder.encode(p) for p in prompts], **limits)
        spans = [parse_span(encoder.tokenizer.decode(ids)) for (ids,) in answers]
        for skill in ("solved", "gap"):
            of_skill = [i for i, p in enumerate(prompts) if skill_of(p.prompt_id) == skill]
            miou[name, skill] = np.mean([best_iou(spans[i], [truth_of(prompts[i])]) for i in of_skill])
    assert miou["student", "solved"] > 0.7 and miou["teacher", "gap"] > 0.85
    assert miou["student", "gap"] < miou["student", "solved"] - 0.2
