"""TRPV with the demo's own teacher: it drops wrong labels, and clips on which the teacher is bad."""

import csv
from pathlib import Path

import numpy as np
import pytest

from curriculum.scheduler import Scheduler
from demo.clips import DEFAULT_LEVELS, write_split
from teacher_service.engine import TransformersEngine, Wanted
from tests.real.conftest import DEMO
from video_opd.answers import parse_span
from video_opd.config import Config
from video_opd.config_file import load_config, resolve_paths
from video_opd.datasets import read_prompts
from video_opd.grounding import best_iou
from video_opd.models.prompting import PromptEncoder
from video_opd.types import Prompt

ROOT = Path(DEMO).parents[1]


@pytest.fixture(scope="module")
def config() -> Config:
    more = ["curriculum.kind=tvdf", "curriculum.dbtp=false", "groups_per_step=8", "max_policy_lag=0"]
    return resolve_paths(load_config(DEMO, more), ROOT)


def encoder_of(config: Config) -> PromptEncoder:
    return PromptEncoder(str(config.teacher), config.prompt, config.video)


@pytest.fixture(scope="module")
def engine(config) -> TransformersEngine:
    return TransformersEngine(str(config.teacher), config.teacher_pool, Wanted(), 0, encoder_of(config))


def ious_of(
    engine, config: Config, prompts: list[Prompt], truth: list, num_answers: int, temperature: float
) -> np.ndarray:
    """float64[P]: mean IoU of the teacher's answers with `truth`."""
    encoder = encoder_of(config)
    answers = engine.predict(
        [encoder.encode(p) for p in prompts], num_answers, temperature, config.rollout.max_response_tokens
    )
    return np.array(
        [
            np.mean([best_iou(parse_span(a), t) for a in of_one])
            for of_one, t in zip(answers, truth, strict=True)
        ]
    )


def test_trpv_drops_spoiled_labels_and_keeps_what_the_teacher_solves(engine, config, tmp_path, capsys):
    write_split(tmp_path / "train", "train", 120, DEFAULT_LEVELS, spoil_frac=0.3)
    paths = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
    dataset = config.data.train.model_copy(update={k: str(tmp_path / "train" / v) for k, v in paths.items()})
    prompts = read_prompts(dataset, config.video, 32)
    rows = csv.DictReader((tmp_path / "train" / "spoiled.csv").open())
    true = {int(r["line"]) - 1: ((float(r["true_start_s"]), float(r["true_end_s"])),) for r in rows}
    spoiled = np.array([i in true for i in range(len(prompts))])
    labels = [p.answer_spans_s for p in prompts]
    solved = (
        ious_of(engine, config, prompts, [true.get(i, label) for i, label in enumerate(labels)], 1, 0.0)
        >= 0.7
    )
    assert 0.25 < spoiled.mean() < 0.35 and (solved & ~spoiled).sum() > 50

    tau = ious_of(engine, config, prompts, labels, config.curriculum.num_teacher_predictions, 1.0)
    scheduler = Scheduler(prompts, config)
    scheduler.validate(tau)
    dropped = scheduler.records()["dropped"].to_numpy() != ""
    caught, kept = dropped[spoiled].mean(), 1 - dropped[~spoiled & solved].mean()
    with capsys.disabled():
        print(
            f"\nTRPV drops {caught:.1%} of {spoiled.sum()} spoiled prompts and keeps {kept:.1%} of the "
            f"{(~spoiled & solved).sum()} good ones that the teacher solves"
        )
    assert caught >= 0.9
    assert kept >= 0.8


def test_the_teacher_is_bad_on_faint_clips_and_trpv_finds_them(engine, config, tmp_path, capsys):
    ious = {}
    for level in ("shape", "faint"):
        write_split(tmp_path / level, "train", 20, (level,))
        paths = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
        dataset = config.data.train.model_copy(
            update={k: str(tmp_path / level / v) for k, v in paths.items()}
        )
        prompts = read_prompts(dataset, config.video, 32)
        ious[level] = ious_of(engine, config, prompts, [p.answer_spans_s for p in prompts], 4, 1.0)
    with capsys.disabled():
        print("\nteacher's mean IoU:", {level: round(float(tau.mean()), 3) for level, tau in ious.items()})
    assert ious["shape"].mean() > 0.85
    assert ious["faint"].mean() < 0.5
    assert (ious["faint"] < config.curriculum.teacher_threshold).mean() > 0.5
