"""Qwen2.5-VL, whose clock is in its positions: the same architecture at tiny widths through every part."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import PolicyEngine
from demo.clips import write_mp4
from teacher_service.engine import TransformersEngine, Wanted
from tests.attention import compare, compare_first_tokens
from tests.models import MERGE, PATCH, literal_positions
from tests.real.adapters import LORA, adapted, gaps, published
from tests.real.conftest import DEMO
from tests.real.runs import GROUPS
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.datasets import read_prompts
from video_opd.models.forward import ResponseLogits, collate, generate, load_model
from video_opd.models.prompting import PromptEncoder
from video_opd.types import Prompt
from video_opd.weights.buckets import to_buckets

HEIGHT, WIDTH = 56, 84  # 2 x 3 video tokens a frame pair


@pytest.fixture(scope="module")
def qwen2_5(qwen2_5_pair, tmp_path_factory) -> list[str]:
    """Overrides for the pair, on clips of more than one video token a frame."""
    folder = tmp_path_factory.mktemp("qwen2_5")
    rng = np.random.default_rng(0)
    overrides = [*qwen2_5_pair]
    for split, count in (("train", GROUPS), ("eval", 2)):
        videos = folder / split / "videos"
        videos.mkdir(parents=True)
        lines, lengths = [], ["id,length"]
        for number in range(count):
            seconds = 3 + number
            pictures = rng.integers(0, 256, (seconds * 4, HEIGHT // 7, WIDTH // 7, 3), dtype=np.uint8)
            write_mp4(videos / f"{split}{number}.mp4", np.kron(pictures, np.ones((1, 7, 7, 1), np.uint8)))
            lines.append(f"{split}{number} 0.5 {seconds - 0.5}##the red square is visible")
            lengths.append(f"{split}{number},{seconds}")
        (folder / split / "annotations.txt").write_text("\n".join(lines))
        (folder / split / "lengths.csv").write_text("\n".join(lengths))
        names = {"annotations": "annotations.txt", "lengths": "lengths.csv", "videos": "videos"}
        overrides += [f"data.{split}.{key}={folder / split / name}" for key, name in names.items()]
    return overrides


@pytest.fixture(scope="module")
def config(qwen2_5) -> Config:
    return load_config(DEMO, qwen2_5)


@pytest.fixture(scope="module")
def prompts(config) -> list[Prompt]:
    return read_prompts(config.data.train, config.video, PATCH * MERGE)


@pytest.fixture(scope="module")
def encoder(config) -> PromptEncoder:
    return PromptEncoder(config.student, config.prompt, config.video)


def test_positions_are_those_of_a_literal_reading_with_padding_on_either_side(config, prompts, encoder):
    model = load_model(config.student, "float32")
    encoded = [encoder.encode(p) for p in prompts[:3]]
    assert all(e.second_per_grid == pytest.approx(1.0) and e.video_grid_thw[1:] == (4, 6) for e in encoded), (
        "2 frames a second"
    )
    longest = max(len(e.token_ids) for e in encoded) + 4
    for left in (False, True):
        ids, mask, types = (torch.zeros(3, longest, dtype=torch.int64) for _ in range(3))
        for i, e in enumerate(encoded):
            n = len(e.token_ids)
            where = slice(longest - n, None) if left else slice(0, n)
            ids[i, where], mask[i, where], types[i, where] = (
                torch.tensor(e.token_ids),
                1,
                torch.tensor(e.token_types),
            )
        positions, ahead = model.model.get_rope_index(
            ids,
            mm_token_type_ids=types,
            video_grid_thw=torch.tensor([e.video_grid_thw for e in encoded]),
            second_per_grid_ts=torch.tensor([0.5, 1.0, 1.5]),
            attention_mask=mask,
        )
        for i, (e, seconds) in enumerate(zip(encoded, (0.5, 1.0, 1.5), strict=True)):
            literal = literal_positions(e.token_types.tolist(), e.video_grid_thw, seconds)
            assert positions[:, i, mask[i].bool()].T.tolist() == literal
            assert ahead[i].item() == max(max(p) for p in literal) + 1 - len(literal)


def test_the_teacher_scores_what_a_plain_forward_over_one_sequence_gives(config, prompts):
    """And answers are its most likely tokens. Two of the prompts share a clip."""
    how = config.prompt.model_copy(update={"video_first": True})
    encoder = PromptEncoder(config.teacher, how, config.video)
    engine = TransformersEngine(config.teacher, config.teacher_pool, Wanted(), 0, encoder)
    encoded = [encoder.encode(p) for p in (*prompts[:3], replace(prompts[0], query="the bar grows"))]
    responses = [np.asarray(ids, np.int32) for ids in ([5, 9, 3], [7], [1, 2, 3, 4, 5], [4, 6])]
    together = engine.score(encoded, responses)
    model = load_model(config.teacher, "float32").eval()
    for e, response, scores in zip(encoded, responses, together, strict=True):
        with torch.no_grad():
            batch = collate([e], [response], encoder.tokenizer.pad_token_id)
            logits = ResponseLogits(model)(batch)
        logits[:, list(encoder.pad_ids)] = -torch.inf
        alone = logits.log_softmax(-1)[torch.arange(len(response)), batch.targets]
        np.testing.assert_allclose(scores.logprobs, alone.numpy(), atol=2e-5)
    compare_first_tokens(model, encoded, encoder.tokenizer.pad_token_id)
    greedy = generate(
        model, encoded, max_tokens=5, pad_id=encoder.tokenizer.pad_token_id, banned_ids=encoder.pad_ids
    )
    for e, (answer,) in zip(encoded, greedy, strict=True):  # token by token, each from a whole forward
        for n in range(1, len(answer)):
            with torch.no_grad():
                logits = ResponseLogits(model)(collate([e], [answer[:n]], encoder.tokenizer.pad_token_id))
            logits[:, list(encoder.pad_ids)] = -torch.inf
            assert logits[-1].argmax().item() == answer[n - 1]


def test_an_actor_samples_from_adapters_in_bfloat16(qwen2_5, prompts, encoder):
    """Of the arithmetic of bfloat16 it differs from the learner, by less than the update changes."""
    more = [*LORA, "rollout.dtype=bfloat16", "learner.dtype=bfloat16"]
    config = load_config(DEMO, [*qwen2_5, *more])
    base, model = load_model(config.student, "bfloat16").eval(), adapted(config, "bfloat16", b=0.05, seed=0)
    engine = PolicyEngine(config, encoder.pad_ids)
    engine.load_weights(1, published(model, 1, config))
    encoded = [encoder.encode(p) for p in prompts[:6]]
    rendered: Any = engine.render(encoded[0]).vllm_input
    patches = rendered["mm_kwargs"]["video"][0]["pixel_values_videos"].data
    assert patches.dtype == torch.uint8, "normalised on the device"
    own, of_base = gaps(engine, [model, base], encoded).mean(1)
    assert own < 0.01 and of_base > 10 * own


def test_an_actor_samples_from_published_weights(config, prompts, encoder):
    """All tensors of the student, each changed: one that vLLM did not load would show."""
    torch.manual_seed(0)
    base, model = (load_model(config.student, "float32").eval() for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    engine = PolicyEngine(config, encoder.pad_ids)
    engine.load_weights(1, list(to_buckets(model.named_parameters(), 1, config.learner.bucket_bytes)))
    own, of_base = gaps(engine, [model, base], [encoder.encode(p) for p in prompts[:6]]).max(1)
    assert own < 1e-3 and of_base > 100 * own


def test_every_attention_implementation_computes_the_same(config, prompts, encoder, monkeypatch):
    encoded = [encoder.encode(p) for p in prompts[:3]]
    assert len({len(e.token_ids) for e in encoded}) > 1, "some are padded"
    compare(config.student, encoded, encoder, monkeypatch)
