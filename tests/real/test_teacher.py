"""Both teacher engines against plain transformers: log-probs, top-K, predictions; and teacher = student."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from teacher_service.calls import Reply
from teacher_service.engine import TransformersEngine, VllmEngine, Wanted
from teacher_service.replica import TeacherReplica
from tests.attention import compare, compare_first_tokens
from tests.real.conftest import reference_logprobs, scored_groups
from video_opd.config import Config
from video_opd.config_learner import LossConfig
from video_opd.config_teachers import TeacherModel
from video_opd.models.forward import load_head, load_model
from video_opd.models.policy import Policy
from video_opd.models.prompting import PromptEncoder, without_video
from video_opd.types import Prompt

K = 5
TOLERANCE = 1e-4
T = 0.7  # temperature of the policy


@pytest.fixture(scope="module")
def teacher_encoder(config) -> PromptEncoder:
    return PromptEncoder(config.teacher, config.prompt, config.video)


@pytest.fixture(scope="module", params=[TransformersEngine, VllmEngine], ids=["transformers", "vllm"])
def engine(request, config, teacher_encoder):
    how = Wanted(top_k=K), 0, teacher_encoder, False, T
    return request.param(config.teacher, config.teacher_pool, *how)


@pytest.fixture(scope="module")
def cases(prompts, teacher_encoder):
    """Prompts of different lengths with responses of different lengths."""
    rng = np.random.default_rng(0)
    encoded = [teacher_encoder.encode(p) for p in prompts[:10]]
    return encoded, [rng.integers(0, 400, n).astype(np.int32) for n in rng.integers(1, 12, len(encoded))]


def test_scores_match_transformers(engine, config, cases):
    model = load_model(config.teacher, "float32").eval()
    for prompt, response, (logprobs, top_k, _, entropy) in zip(*cases, engine.score(*cases), strict=True):
        exact = reference_logprobs(model, prompt, response, T)
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
            exact = reference_logprobs(model, prompt, np.asarray([*ids, 0], np.int32))[-1]
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


def test_logprobs_on_grey_frames_are_plain_transformers_and_leave_what_is_wanted(
    engine, config, prompts, cases, teacher_encoder
):
    model = load_model(config.teacher, "float32").eval()
    asked, responses = prompts[:4], cases[1][:4]
    grey = [without_video(p) for p in cases[0][:4]]
    for prompt, encoded, response, found in zip(
        asked, cases[0], responses, engine.logprobs(grey, responses), strict=False
    ):
        unseen = teacher_encoder.encode(prompt, frames=np.full_like(encoded.frames, 128))
        assert np.array_equal(unseen.token_ids, encoded.token_ids), "the same times"
        exact = reference_logprobs(model, unseen, response, T)[np.arange(len(response)), response]
        assert np.abs(found - exact).max() < TOLERANCE
    assert engine.score(*(c[:1] for c in cases))[0].top_k is not None


@contextmanager
def replica_of(config: Config, folder: str, micro_batch: int, video_first: bool) -> Iterator[Any]:
    """With its tower's patches of each pass, as `seen`, and no clip in its cache."""
    prompt = config.prompt.model_copy(update={"video_first": video_first})
    parts: dict[str, Any] = {"video": config.video.model_copy(update={"cache_dir": folder}), "prompt": prompt}
    parts["teacher_pool"] = config.teacher_pool.model_copy(update={"micro_batch": micro_batch})
    parts["rollout"] = config.rollout.model_copy(update={"temperature": T})
    parts["loss"] = config.loss.model_copy(update={"visual_weight": 0.5})
    replica: Any = TeacherReplica(config.model_copy(update=parts), config.teacher_models[0])
    assert replica._engine.temperature == T
    replica._engine.wanted, replica.seen = Wanted(top_k=K, hidden=True), []
    tower = replica._engine._model.model.visual
    tower.register_forward_pre_hook(lambda _, inputs: replica.seen.append(len(inputs[0])))
    yield replica
    replica._thread.shutdown()


def of_two_clips(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Three queries for each of two clips, those of a clip apart from each other."""
    of_clips = list({p.clip.video_path: p for p in prompts}.values())[:2]
    queries = ("the red square is visible", "the blue circle is there and gone", "red")
    return [replace(p, prompt_id=f"{p.prompt_id} {q}", query=q) for q in queries for p in of_clips]


@pytest.mark.parametrize("video_first", [True, False])
def test_a_replica_computes_once_what_prompts_of_a_clip_share_and_scores_and_answers_as_alone(
    config, prompts, tmp_path, video_first
):
    """With the video after the question, prompts of a clip share its features."""
    asked = of_two_clips(prompts)

    responses: dict[str, np.ndarray] = {}

    async def answered(replica: Any) -> tuple[Reply, Reply]:
        groups = [g.group for g in scored_groups(asked, replica._encoder, seed=0, rollouts=2)]
        responses.update({t.trajectory_id: t.response_token_ids for g in groups for t in g.trajectories})
        return await replica.score(groups), await replica.predict(asked, 2, 0.0)

    with replica_of(config, f"{tmp_path}/a", 12, video_first) as replica:
        together, predicted = asyncio.run(answered(replica))
        encoded = [replica._encoder.encode(p) for p in asked]
        assert replica._encoder.frame_cache.num_decodes == 2
        patches = [int(np.prod(e.video_grid_thw)) for e in encoded[:2]]
        pairs = zip(asked, encoded, strict=True)
        grey = [replica._encoder.encode(p, frames=np.full_like(e.frames, 128)) for p, e in pairs]
        of_grey = sum({e.video_grid_thw: n for e, n in zip(encoded, patches, strict=False)}.values())
        assert replica.seen == [sum(patches), of_grey, sum(patches)], "a pass each"
        model = load_model(config.teacher, "float32").eval()
        compare_first_tokens(replica._engine._model, encoded, replica._encoder.tokenizer.pad_token_id)
    with replica_of(config, f"{tmp_path}/b", 1, video_first) as replica:
        alone, predicted_alone = asyncio.run(answered(replica))
    assert predicted.results == predicted_alone.results
    assert [answers[0].prompt_id for answers in predicted.results] == [p.prompt_id for p in asked]
    assert all(len(answers) == 2 and answers[0] == answers[1] for answers in predicted.results)
    assert alone.computed_tokens == alone.separate_tokens == together.separate_tokens
    num_video_tokens = sum(np.count_nonzero(e.token_types) for e in encoded[:2])
    saved = alone.computed_tokens - together.computed_tokens
    assert saved > (5 * num_video_tokens if video_first else 0)
    unseen = [prompt for prompt in grey for _ in range(2)]
    for ours, theirs, prompt in zip(flat(together), flat(alone), unseen, strict=True):
        response = responses[ours.trajectory_id]
        exact = reference_logprobs(model, prompt, response, T)[np.arange(len(response)), response]
        assert np.abs(ours.grey_logprobs - exact).max() < TOLERANCE
        assert np.abs(ours.grey_logprobs - ours.teacher_logprobs).max() > 100 * TOLERANCE
        assert (ours.trajectory_id, ours.top_k.ids.tolist()) == (
            theirs.trajectory_id,
            theirs.top_k.ids.tolist(),
        )
        for name in ("teacher_logprobs", "hidden", "entropy", "grey_logprobs"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours.top_k.logprobs, theirs.top_k.logprobs, atol=1e-5)


def flat(reply: Reply) -> list[Any]:
    return [scores for of_group in reply.results for scores in of_group]


def test_a_teacher_that_is_the_student_gives_no_signal_and_a_teacher_scores_the_students_top_k(
    config, prompts, encoder, teacher_encoder
):
    from actors.engine import PolicyEngine

    encoded = [encoder.encode(p) for p in prompts[:8]]
    parts: dict[str, Any] = {"rollout": config.rollout.model_copy(update={"temperature": T})}
    parts["loss"] = LossConfig(kind="opd_topk", top_k=K, top_k_of="student")
    policy = PolicyEngine(config.model_copy(update=parts), encoder.pad_ids)
    answers = [row[0] for row in policy.generate(encoded, list(range(8)))]
    check_given(config, [teacher_encoder.encode(p) for p in prompts[:8]], answers, teacher_encoder)
    for kind in (TransformersEngine, VllmEngine):
        teacher = kind(config.student, config.teacher_pool, Wanted(), 0, encoder, temperature=T)
        scores = teacher.score(encoded, [a.token_ids for a in answers])
        signal = np.concatenate([s.logprobs - a.logprobs for s, a in zip(scores, answers, strict=True)])
        assert len(signal) >= 8
        assert np.abs(signal).max() < TOLERANCE
        assert all(s.top_k is None and s.hidden is None for s in scores)


def check_given(config, encoded, answers, teacher_encoder) -> None:
    """The teacher's log-probs of the student's likeliest tokens, and these tokens, are transformers'."""
    how = Wanted(top_k=K, is_given=True), 0, teacher_encoder, False, T
    engine = TransformersEngine(config.teacher, config.teacher_pool, *how)
    responses, given = [a.token_ids for a in answers], [a.top_k_ids for a in answers]
    for of_answer in given:
        of_answer.flags.writeable = False  # as from Ray's object store
    student, teacher = (load_model(path, "float32").eval() for path in (config.student, config.teacher))
    scored = engine.score(encoded, responses, None, given)
    for prompt, answer, scores in zip(encoded, answers, scored, strict=True):
        own, exact = (reference_logprobs(m, prompt, answer.token_ids, T) for m in (student, teacher))
        assert scores.top_k is not None
        ids = scores.top_k.ids
        assert ids.tolist() == answer.top_k_ids.tolist() and ids.shape == (len(answer.token_ids), K)
        assert all(len({*row}) == K for row in ids.tolist())
        likeliest = np.sort(own, axis=1)[:, ::-1][:, :K]
        assert np.abs(np.take_along_axis(own, ids.astype(int), 1) - likeliest).max() < TOLERANCE
        assert np.abs(np.take_along_axis(exact, ids.astype(int), 1) - scores.top_k.logprobs).max() < TOLERANCE
    outside = [t not in row for a in answers for t, row in zip(a.token_ids, a.top_k_ids, strict=True)]
    assert any(outside), "the sampled token need not be among them"


def test_shipped_hidden_states_and_the_head_read_from_the_folder_give_the_teachers_distribution(
    config, cases, teacher_encoder
):
    engine = TransformersEngine(config.teacher, config.teacher_pool, Wanted(hidden=True), 0, teacher_encoder)
    head, model = load_head(config.teacher, "float32"), load_model(config.teacher, "float32").eval()
    for prompt, response, scores in zip(*cases, engine.score(*cases), strict=True):
        ours = Policy(1.0, teacher_encoder.pad_ids, "cpu")(torch.from_numpy(scores.hidden).matmul(head.T))
        ours = ours.log_softmax(-1).numpy()
        assert np.abs(ours - reference_logprobs(model, prompt, response)).max() < TOLERANCE


def test_the_student_that_sees_more_scores_the_same_tokens_after_its_own_prompt(config, prompts, encoder):
    """Cropped, at twice the rate and after another text: plain transformers on what it says that it sees."""
    view: Any = {"prompt": {"template": "Event: {query}. When?"}, "video": {"fps": 2 * config.video.fps}}
    groups = [g.group for g in scored_groups(prompts[:3], encoder, seed=0)]
    found: dict[str, list[np.ndarray]] = {}
    for name, own in {"plain": {}, "crop": {"crop_margin_frac": 0.25}, "more": view}.items():
        replica: Any = TeacherReplica(config, TeacherModel(name=name, model=config.student, **own))
        reply = asyncio.run(replica.score(groups))
        found[name] = [scores.teacher_logprobs for scores in flat(reply)]
        encoded = [replica._encoder.encode(p) for p in prompts[:3]]
        model, responses = replica._engine._model, [g.trajectories[0].response_token_ids for g in groups]
        for prompt, response, logprobs in zip(encoded, responses, found[name], strict=True):
            exact = reference_logprobs(model, prompt, response)[np.arange(len(response)), response]
            assert np.abs(logprobs - exact).max() < TOLERANCE
        texts = [encoder.tokenizer.decode(e.token_ids) for e in encoded]
        assert all(("Event: " in text) == (name == "more") for text in texts)
        for prompt, text in zip(prompts, texts, strict=False):
            ((start, end),) = prompt.answer_spans_s
            wide = max(0.25 * (end - start), (config.video.min_frames / config.video.fps - (end - start)) / 2)
            times = [float(t) for t in re.findall(r"<([\d.]+) seconds>", text)]
            inside = [start - wide - 0.05 <= t <= end + wide + 0.05 for t in times]
            assert times and all(inside) == (name == "crop"), (name, times, start, end)
        answers = asyncio.run(replica.predict(prompts[:1], 1, 0.0)).results[0]
        hidden = replica._encoder.encode(replace(prompts[0], answer_spans_s=None))
        assert answers[0].text == replica._engine.predict([hidden], 1, 0.0, replica._max_tokens)[0][0], (
            "it is not cropped"
        )
        replica._thread.shutdown()
    for name in ("crop", "more"):
        difference = np.concatenate(found[name]) - np.concatenate(found["plain"])
        assert np.abs(difference).max() > 1000 * TOLERANCE
