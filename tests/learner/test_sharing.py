"""Updates whose sequences share passes are those of one sequence at a time; a clip costs once a step."""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo.models import Size, build_model, build_processor
from learner.adapters import choose_trained
from learner.diagnostics import TimestampTokens
from learner.engine import LearnerEngine
from learner.vision_cache import VisionCache
from tests.fakes import make_clip, make_prompt
from tests.real.conftest import SIZES, scored_groups
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.models.forward import (
    ResponseLogits,
    ResponseLoss,
    VideoLLM,
    collate,
    load_model,
    token_logprobs,
)
from video_opd.models.policy import Policy
from video_opd.models.prompting import PromptEncoder
from video_opd.types import ScoredGroup
from video_opd.video import frame_cache

QUERIES = {"a": 3, "b": 1}  # of each clip
LR = 1e-3
OBJECTIVES = {
    "opd": ("loss.center=batch",),
    "opd_topk": (),
    "opd_full": (),
    "grpo": ("loss.kl_coef=0.5",),
    "off_policy_rkd": (),
    "off_policy_fkd": (),
    "sft": (),
}


class Plain:
    """In place of DeepSpeed's engine: AdamW in this process, on the gradients of all passes."""

    def __init__(self, model: Any, config: Config):
        self.module = ResponseLoss(model, config.learner.logit_rows)
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), LR)
        self.gradients: dict[str, torch.Tensor] = {}
        self.get_global_grad_norm = lambda: 1.0
        self._is_last = False

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        self._is_last = is_last

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        if self._is_last:
            self.gradients = {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}
            self.optimizer.step()
            self.optimizer.zero_grad()


class Rank:
    """The only rank of a learner."""

    def __init__(self, config: Config, student: VideoLLM, encoder: PromptEncoder):
        self.model = deepcopy(student)
        choose_trained(self.model, config.learner)
        self.deepspeed = Plain(self.model, config)
        heads = torch.randn(
            2, len(encoder.tokenizer), SIZES["teacher"].hidden, generator=torch.manual_seed(0)
        )
        self._engine: Any = object.__new__(LearnerEngine)
        self._engine.__dict__.update(
            {"_config": config, "_rank": 0, "_world_size": 1, "_device": "cpu", "_encoder": encoder}
            | {"_engine": self.deepspeed, "_vision": VisionCache.of(self.model, config.learner)}
            | {"_is_time": TimestampTokens(encoder.tokenizer), "_teacher_heads": {}}
            | {"_policy": Policy(config.learner_temperature, encoder.pad_ids, "cpu")}
        )
        if config.loss.needs.teacher == "hidden":
            self._engine._teacher_heads = dict(zip(("teacher", "other"), heads, strict=True))

    def update(self, groups: list[ScoredGroup], step: int = 0) -> dict[str, float]:
        metrics, failed = self._engine.update(groups, step)
        assert not failed
        return metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, processor = tmp_path_factory.mktemp("student"), build_processor()
    model = build_model(Size(hidden=64, layers=2, vision_hidden=32), processor.tokenizer, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def student(folder) -> VideoLLM:
    return load_model(str(folder), "float32")


@pytest.fixture(scope="module")
def decoded() -> Iterator[Counter[str]]:
    """How often each clip was decoded: nothing is kept on the disk."""
    counts: Counter[str] = Counter()

    def read_frames(clip, _):
        counts[clip.clip_id] += 1
        rng = np.random.default_rng(ord(clip.clip_id))
        return rng.integers(0, 256, (len(clip.frame_indices), *clip.frame_size, 3), np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_cache, "read_frames", read_frames)
        patch.setattr(frame_cache, "video_stamp", lambda _: "")
        patch.setattr(frame_cache.FrameCache, "_store", lambda *_: None)
        yield counts


@pytest.fixture(scope="module")
def encoder(folder, decoded, tmp_path_factory) -> PromptEncoder:
    config = load_demo([f"video.cache_dir={tmp_path_factory.mktemp('frames')}", "prompt.video_first=true"])
    return PromptEncoder(folder, config.prompt, config.video)


def make_config(kind: str, *options: str) -> Config:
    return load_demo(
        [
            *("prompt.video_first=true", f"loss.kind={kind}", "loss.clamp=null", "learner.warmup_frac=0"),
            *("rollout.rollouts_per_prompt=2", f"learner.lr={LR}", "learner.logit_rows=7"),
            *OBJECTIVES[kind],
            *options,
        ]
    )


def make_groups(config: Config, encoder: PromptEncoder, seed: int = 0) -> list[ScoredGroup]:
    """The first query of each clip, then the second, of two teachers in turn."""
    asked = sorted((number, clip) for clip, queries in QUERIES.items() for number in range(queries))
    prompts = [
        replace(make_prompt(f"{clip}{number}"), clip=make_clip(clip), query=f"the {number} is visible")
        for number, clip in asked
    ]
    needs = config.loss.needs
    groups = scored_groups(
        prompts, encoder, seed, rollouts=2 if needs.rollouts else 1, sampled=needs.rollouts
    )
    for i, group in enumerate(groups):
        scores = [replace(s, teacher_id=("teacher", "other")[i % 2]) for s in group.scores]
        rewards = group.rewards if needs.rewards else None
        scores = scores if needs.teacher != "none" else []
        groups[i] = replace(group, scores=tuple(scores), rewards=rewards)
    return groups


SEPARATE, SHARED = "learner.micro_batch=1", ("learner.micro_batch=6", "learner.tree_tokens=160")


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_loss_gradient_and_ratios_are_those_of_one_sequence_at_a_time(student, encoder, kind):
    """And the tokens of separate sequences are counted as they are, for the ground truth too."""
    groups = make_groups(make_config(kind), encoder)
    ranks = [Rank(make_config(kind, *sharing), student, encoder) for sharing in ([SEPARATE], SHARED)]
    separate, shared = (rank.update(groups) for rank in ranks)
    rows = [(g.group.prompt, t) for g in groups for t in g.group.trajectories]
    num_tokens = sum(len(encoder.encode(p).token_ids) + len(t.response_token_ids) for p, t in rows)
    assert separate["learner/computed_tokens"] == separate["learner/separate_tokens"] == num_tokens
    assert separate["learner/num_tokens"] == sum(len(t.response_token_ids) for _, t in rows)
    assert shared.pop("learner/computed_tokens") < 0.8 * separate.pop("learner/computed_tokens")
    assert shared == pytest.approx(separate, rel=1e-5, abs=1e-6)
    expected, found = (rank.deepspeed.gradients for rank in ranks)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        gap = (gradient - expected[name]).norm()
        assert gap < 1e-5 * expected[name].norm() or gap < 1e-7, name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_papers_loss_is_a_mean_over_responses_of_sums_over_tokens(student, encoder, temperature):
    """Eq. 6 of arXiv 2602.02994, with rho from one sequence at a time."""
    how = "loss.reduction=sequence", f"rollout.temperature={temperature}"
    config = make_config("opd", "loss.center=none", *how, *SHARED)
    groups = make_groups(config, encoder)
    of_responses = []
    for group in groups:
        encoded = encoder.encode(group.group.prompt)
        for t, scores in zip(group.group.trajectories, group.scores, strict=True):
            batch = collate([encoded], [t.response_token_ids], encoder.tokenizer.pad_token_id)
            with torch.no_grad():
                logits = ResponseLogits(student)(batch).double() / temperature
            logits[:, list(encoder.pad_ids)] = -torch.inf
            now = token_logprobs(logits, batch.targets).numpy()
            reward = scores.teacher_logprobs.astype(float) - t.actor_logprobs
            of_responses.append(np.sum(np.exp(now - t.actor_logprobs) * reward))
    found = Rank(config, student, encoder).update(groups)["learner/loss"]
    assert found == pytest.approx(-np.mean(of_responses), rel=1e-5)


@pytest.mark.parametrize(("micro_batch", "frozen", "seen"), [(1, True, 2), (2, True, 2), (2, False, 4)])
def test_a_clip_is_decoded_once_a_step_and_seen_once_by_a_frozen_tower(
    student, encoder, decoded, micro_batch, frozen, seen
):
    """A trained tower sees it in each pass: 8 rows of 2 clips, two in each."""
    more = f"learner.micro_batch={micro_batch}", f"learner.freeze_vision={str(frozen).lower()}"
    config = make_config("opd", *more)
    groups, rank = make_groups(config, encoder), Rank(config, student, encoder)
    clips: list[int] = []  # of each of the tower's passes
    tower = rank.model.model.visual
    tower.register_forward_pre_hook(lambda *given: clips.append(len(given[-1]["grid_thw"])), with_kwargs=True)
    decoded.clear()
    for step in range(2):
        rank.update(groups, step)
    assert decoded == Counter({clip: 2 for clip in QUERIES})
    assert sum(clips) == 2 * seen
