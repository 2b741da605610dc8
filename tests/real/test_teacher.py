"""Both teacher engines against plain transformers: log-probs, top-K, predictions; and teacher = student."""

import numpy as np
import pytest
import torch

from teacher_service.engine import TransformersEngine, VllmEngine, Wanted
from tests.attention import compare
from tests.real.conftest import reference_logprobs
from video_opd.models.forward import load_head, load_model
from video_opd.models.prompting import PromptEncoder

K = 5
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def teacher_encoder(config) -> PromptEncoder:
    return PromptEncoder(config.teacher, config.prompt, config.video)


@pytest.fixture(scope="module", params=[TransformersEngine, VllmEngine], ids=["transformers", "vllm"])
def engine(request, config, teacher_encoder):
    return request.param(config.teacher, config.teacher_pool, Wanted(top_k=K), 0, teacher_encoder)


@pytest.fixture(scope="module")
def cases(prompts, teacher_encoder):
    """Prompts of different lengths with responses of different lengths."""
    rng = np.random.default_rng(0)
    encoded = [teacher_encoder.encode(p) for p in prompts[:10]]
    return encoded, [rng.integers(0, 400, n).astype(np.int32) for n in rng.integers(1, 12, len(encoded))]


def test_scores_match_transformers(engine, config, cases):
    model = load_model(config.teacher, "float32").eval()
    for prompt, response, (logprobs, top_k, _, entropy) in zip(*cases, engine.score(*cases), strict=True):
        exact = reference_logprobs(model, prompt, response)
        assert logprobs.shape == (len(response),)
        assert np.abs(logprobs - exact[np.arange(len(response)), response]).max() < TOLERANCE
        if entropy is not None:  # vLLM does not give it
            assert np.abs(entropy + (np.exp(exact) * exact).sum(-1)).max() < TOLERANCE
        assert top_k.ids.shape == top_k.logprobs.shape == (len(response), K)
        assert np.abs(top_k.logprobs - np.sort(exact, axis=1)[:, ::-1][:, :K]).max() < TOLERANCE
        assert np.abs(np.take_along_axis(exact, top_k.ids.astype(int), 1) - top_k.logprobs).max() < TOLERANCE


def test_every_attention_implementation_computes_the_same(config, cases, teacher_encoder, monkeypatch):
    compare(config.teacher, cases[0][:3], teacher_encoder, monkeypatch)


def test_greedy_predictions_follow_the_argmax(engine, config, cases, teacher_encoder):
    model = load_model(config.teacher, "float32").eval()
    encoded = cases[0][:4]
    for prompt, (text,) in zip(encoded, engine.predict(encoded, 1, 0.0, 6), strict=True):
        ids: list[int] = []
        for _ in range(6):  # one token at a time, from the whole distribution
            exact = reference_logprobs(model, prompt, np.asarray([*ids, 0], np.int32))[-1].copy()
            exact[list(teacher_encoder.pad_ids)] = -np.inf
            token = int(exact.argmax())
            if token in model.generation_config.eos_token_id:
                break
            ids.append(token)
        assert text == teacher_encoder.tokenizer.decode(ids, skip_special_tokens=True)


def test_the_transformers_engine_knows_the_teachers_entropy(engine, cases):
    known = [s.entropy is not None for s in engine.score(*cases)]
    assert all(known) if isinstance(engine, TransformersEngine) else not any(known)


def test_several_answers_are_sampled_for_each_prompt(engine, cases):
    answers = engine.predict(cases[0][:3], 4, 1.0, 8)
    assert [len(row) for row in answers] == [4, 4, 4]
    assert all(len(set(row)) > 1 for row in answers), "answers at temperature 1 differ"


def test_a_teacher_that_is_the_student_gives_no_signal(config, prompts, encoder):
    from actors.engine import PolicyEngine

    encoded = [encoder.encode(p) for p in prompts[:8]]
    policy = PolicyEngine(config, encoder.pad_ids)
    answers = [row[0] for row in policy.generate(encoded, list(range(8)))]
    for kind in (TransformersEngine, VllmEngine):
        teacher = kind(config.student, config.teacher_pool, Wanted(), 0, encoder)
        scores = teacher.score(encoded, [a.token_ids for a in answers])
        signal = np.concatenate([s.logprobs - a.logprobs for s, a in zip(scores, answers, strict=True)])
        assert len(signal) >= 8
        assert np.abs(signal).max() < TOLERANCE
        assert all(s.top_k is None and s.hidden is None for s in scores)


def test_shipped_hidden_states_and_the_head_read_from_the_folder_give_the_teachers_distribution(
    config, cases, teacher_encoder
):
    engine = TransformersEngine(config.teacher, config.teacher_pool, Wanted(hidden=True), 0, teacher_encoder)
    head, model = load_head(config.teacher, "float32"), load_model(config.teacher, "float32").eval()
    for prompt, response, scores in zip(*cases, engine.score(*cases), strict=True):
        ours = torch.from_numpy(scores.hidden).matmul(head.T).log_softmax(-1).numpy()
        assert np.abs(ours - reference_logprobs(model, prompt, response)).max() < TOLERANCE
