"""vLLM against transformers in fp32: log-probs before and after a weight publication."""

import asyncio
import dataclasses
import os
import re
import shutil
import threading
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
import vllm.envs
from torch._dynamo.utils import counters

import actors.engine
import actors.rollout_actor as rollout_actor
from actors.engine import PolicyEngine
from actors.rollout_actor import RolloutActor
from tests.real.conftest import reference_logprobs
from tests.videos import noise, write_video
from video_opd import ROOT
from video_opd.answers import parse_span
from video_opd.config_learner import LossConfig
from video_opd.models import vllm_engine
from video_opd.models.engine_loop import Answered, EngineLoop, Request
from video_opd.models.forward import load_model
from video_opd.models.patches import pixel_values
from video_opd.models.prompting import PromptEncoder
from video_opd.types import EncodedPrompt, Prompt, Trajectory, TrajectoryGroup
from video_opd.video.clips import plan_clip
from video_opd.weights.buckets import WeightBucket, to_buckets

KV_BLOCK_TOKENS = 128  # of vLLM on a CPU
BLOCK_TOKENS = 32  # the fewest there
TOP_K = 25  # more than vLLM tells by default
TOLERANCE = 1e-4
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def engine(config, encoder) -> PolicyEngine:
    """With small KV blocks: a tiny clip's tokens fill two."""
    loss = LossConfig(kind="opd_topk", top_k=TOP_K, top_k_of="student")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "start_vllm", partial(vllm_engine.start_vllm, block_size=BLOCK_TOKENS))
        return PolicyEngine(config.model_copy(update={"loss": loss}), encoder.pad_ids)


@pytest.fixture(scope="module")
def model(config) -> torch.nn.Module:
    return load_model(config.student, "float32").eval()


@pytest.fixture(scope="module")
def encoded(prompts, encoder) -> list[EncodedPrompt]:
    """Short prompts, and some of one video that are longer than a KV block: they use the prefix cache."""
    long = [
        dataclasses.replace(
            prompts[0], prompt_id=f"long{i}", query=f"{prompts[0].query} {'and again ' * 12} {i}"
        )
        for i in range(3)
    ]
    every: list[Prompt] = [*prompts[:6], *long]
    encoded = [encoder.encode(p) for p in every]
    assert min(len(e.token_ids) for e in encoded[6:]) > KV_BLOCK_TOKENS + 20
    return encoded


def sampled(engine, model, encoded, seed: int, temperature: float) -> list[np.ndarray]:
    """float[4, tokens]: log-probs of the engine and of the policy; the latter's mean and variance."""
    found, seeds = [], range(seed, seed + len(encoded))
    for prompt, (answer,) in zip(encoded, engine.generate(encoded, seeds), strict=True):
        exact = reference_logprobs(model, prompt, answer.token_ids, temperature)
        p = np.exp(exact)
        mean = (p * exact).sum(-1)
        variance = (p * np.square(exact - mean[:, None])).sum(-1)
        of_tokens = exact[np.arange(len(answer.token_ids)), answer.token_ids]
        assert answer.top_k_ids.shape == (len(of_tokens), TOP_K) and answer.top_k_ids.dtype == np.int32
        told = np.take_along_axis(exact, answer.top_k_ids.astype(int), 1)
        likeliest = np.abs(told - np.sort(exact, axis=1)[:, ::-1][:, :TOP_K]).max() < TOLERANCE / temperature
        assert likeliest or np.abs(answer.logprobs - of_tokens).max() > TOLERANCE, "of other weights, neither"
        found.append(np.stack([answer.logprobs, of_tokens, mean, variance]))
    return found


def max_gap(engine, model, encoded, seed: int, temperature: float = 1.0) -> float:
    return max(np.abs(a - b).max() for a, b, *_ in sampled(engine, model, encoded, seed, temperature))


def functions_compiled(worker: Any = None) -> int:
    """By torch's compiler, in this process."""
    return sum(counters["frames"].values())


def test_logprobs_match_transformers_before_and_after_a_publication(engine, model, encoded):
    compiled = functions_compiled()
    assert max_gap(engine, model, encoded, seed=1) < TOLERANCE
    assert functions_compiled() == compiled
    assert max_gap(engine, model, encoded, seed=2) < TOLERANCE, "with the prefix cache warm"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert max_gap(engine, model, encoded, seed=3) > 100 * TOLERANCE, (
        "the new weights must differ enough to be noticed"
    )
    buckets = list(
        to_buckets([(n, p.detach().clone()) for n, p in model.named_parameters()], 1, bucket_bytes=1 << 17)
    )
    sent = [part.tobytes() for bucket in buckets for part in bucket.parts]
    engine.load_weights(1, buckets)
    assert [part.tobytes() for bucket in buckets for part in bucket.parts] == sent, (
        "memory that is shared is not written to"
    )
    for bucket in buckets:
        for part in bucket.parts:
            part.fill(255)
    assert max_gap(engine, model, encoded, seed=4) < TOLERANCE, (
        "nor kept: what is written there later changes nothing"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    engine.start_weight_update()  # of a transfer that another actor's death prevents
    engine.load_weights(2, list(to_buckets(model.named_parameters(), 2, bucket_bytes=1 << 30)))
    assert max_gap(engine, model, encoded, seed=5) < TOLERANCE


def test_log_probs_at_a_temperature_are_those_of_the_distribution_that_is_sampled(
    engine, model, config, encoded, monkeypatch
):
    """A greedy answer is that of temperature 1, log-probs too."""
    greedy = engine.generate(encoded, None)
    monkeypatch.setattr(engine, "_config", config.rollout.model_copy(update={"temperature": 0.1}))
    of_tokens = np.concatenate(sampled(engine, model, encoded, 6, 0.1), axis=1)
    assert np.abs(of_tokens[0] - of_tokens[1]).max() < TOLERANCE
    _, logprobs, mean, variance = of_tokens
    assert len(mean) > 50
    assert abs((logprobs - mean).sum()) < 3 * np.sqrt(variance.sum())
    at_1 = np.concatenate(sampled(engine, model, encoded, 6, 1.0), axis=1)
    assert abs((at_1[1] - at_1[2]).sum()) > 6 * np.sqrt(at_1[3].sum()), "sampled at 1, it would be seen"
    for (expected,), (answer,) in zip(greedy, engine.generate(encoded, None), strict=True):
        assert answer.token_ids.tolist() == expected.token_ids.tolist()
        assert np.abs(answer.logprobs - expected.logprobs).max() < TOLERANCE


def test_sampling_is_seeded_and_greedy_is_the_argmax(engine, encoded):
    first, second, other = (
        [a.token_ids.tolist() for (a,) in engine.generate(encoded, [s] * len(encoded))] for s in (11, 11, 12)
    )
    assert first == second
    assert first != other
    two = engine.generate(encoded[:1], [11], 2)[0]
    assert [a.token_ids.tolist() for a in two] == [first[0], other[0]]
    greedy = [a for (a,) in engine.generate(encoded, None)]
    sampled = [a for (a,) in engine.generate(encoded, [11] * len(encoded))]
    assert all(g.logprobs[0] >= s.logprobs[0] - 1e-6 for g, s in zip(greedy, sampled, strict=True))
    cold, outputs = engine.add(engine.render(encoded[0]), 11, 4, 1e-3), {}
    while cold.name not in outputs:
        outputs |= {output.request_id: output for output in engine.step()}
    four = [c.token_ids.tolist() for c in engine.completions(encoded[0], outputs[cold.name])]
    assert four == [greedy[0].token_ids.tolist()] * 4, "its own temperature, not the config's"


def test_the_videos_of_several_prompts_are_processed_once_and_as_bytes(engine, encoded):
    """encoded[6:] are of one video."""
    other = next(e for e in encoded if e.frames_digest != encoded[6].frames_digest)
    rendered = [engine.render(e).vllm_input for e in (*encoded[6:], other)]
    (items, names) = zip(
        *((r["mm_kwargs"]["video"][0], r["mm_hashes"]["video"][0]) for r in rendered), strict=True
    )
    assert items[0]["pixel_values_videos"].data.dtype == torch.uint8, "no float32 patches travel"
    assert items[1] is items[0] and items[2] is items[0] and items[3] is not items[0]
    assert len({*names[:3]}) == 1 and names[3] != names[0]
    moved = dict(
        encoded[6].video_metadata, frames_indices=[i + 4 for i in encoded[6].video_metadata["frames_indices"]]
    )
    later = dataclasses.replace(encoded[6], video_metadata=moved)
    assert engine.render(later).vllm_input["mm_hashes"]["video"][0] != names[0], (
        "its timestamps are other text"
    )


def answered_by(engine, encoder, prompts: list[Prompt], request: Request) -> dict[str, Answered]:
    """Through a loop of the engine's own: by prompt id."""
    loop = EngineLoop(lambda: engine, 64)

    async def sample() -> dict[str, Answered]:
        results = [r async for r in loop.sample(encoder, prompts, lambda _: request)]
        return {r.prompt.prompt_id: r for r in results if isinstance(r, Answered)}

    try:
        return asyncio.run(sample())
    finally:
        loop.close()


def cached_tokens(prompts: list[EncodedPrompt], num_answers: int) -> dict[str, int]:
    """Whole blocks that each answer's prompt has in common with an earlier one of its clip, by prompt id."""
    found = dict.fromkeys([p.prompt_id for p in prompts], 0)
    earlier: list[EncodedPrompt] = []
    for prompt in [p for p in prompts for _ in range(num_answers)]:
        of_clip = [e.token_ids for e in earlier if e.frames_digest == prompt.frames_digest]
        ids = prompt.token_ids[:-1]  # the last token is always computed
        equal = [np.cumprod(e[: len(ids)] == ids[: len(e)]).sum() for e in of_clip]
        found[prompt.prompt_id] += max(equal, default=0) // BLOCK_TOKENS * BLOCK_TOKENS
        earlier.append(prompt)
    return found


@pytest.mark.parametrize("is_tight", [False, True], ids=["all in one step", "a clip a step"])
def test_a_clip_that_several_prompts_and_answers_share_is_computed_once(
    engine, model, config, prompts, is_tight, monkeypatch
):
    """Tokens and pixels. Tight: a pass has room for one video, as a GPU's for one of thousands of tokens.

    Then vLLM begins prompts of the next clip up to their video, if they enter, and computes it for each.
    """
    asked = config.prompt.model_copy(update={"video_first": True})
    encoder = PromptEncoder(config.student, asked, config.video)
    some = [
        dataclasses.replace(p, prompt_id=f"{p.prompt_id} {q}", query=f"{q} is {p.query}")
        for p in prompts[10:16:2]
        for q in ("now", "then", "late")
    ]
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    schedule, vision_passes = scheduler.schedule, []

    def watched(*arguments: Any) -> Any:
        output = schedule(*arguments)
        vision_passes.extend(output.scheduled_encoder_inputs)
        return output

    monkeypatch.setattr(scheduler, "schedule", watched)
    request = Request(3, 4)
    if is_tight:
        request = Request(None)  # on a CPU a seeded prompt cannot be computed in parts
        monkeypatch.setattr(PolicyEngine, "tokens_a_pass", 128)
        monkeypatch.setattr(scheduler, "max_num_encoder_input_tokens", 13)
    engine._drop_computed()
    found = answered_by(engine, encoder, some, request)
    encoded = [encoder.encode(p) for p in some]
    hits = {name: answered.cache_hits for name, answered in found.items()}
    expected = cached_tokens(encoded, request.num_answers)
    assert {name: h.num_cached_tokens for name, h in hits.items()} == expected
    num_clips = len({e.frames_digest for e in encoded})
    assert num_clips > 1 and min(sorted(expected.values())[num_clips:]) > 0
    assert len(vision_passes) == num_clips
    assert sum(not h.was_clip_processed for h in hits.values()) <= num_clips
    for prompt in encoded:
        for completion in found[prompt.prompt_id].completions:
            ids = completion.token_ids
            exact = reference_logprobs(model, prompt, ids)[np.arange(len(ids)), ids]
            assert np.abs(exact - completion.logprobs).max() < TOLERANCE


def hold_back(monkeypatch, actor: RolloutActor, prompts: list[Prompt]) -> None:
    """The n-th of these prompts is encoded once n commands, here publications, wait for the engine."""
    queued = [threading.Event() for _ in prompts]
    held = {p.prompt_id: event for p, event in zip(prompts, queued, strict=True)}
    encode, command = PromptEncoder.encode, actor._loop.command

    def encode_in_turn(self: PromptEncoder, prompt: Prompt, *options: Any) -> EncodedPrompt:
        assert prompt.prompt_id not in held or held[prompt.prompt_id].wait(TIMEOUT_S)
        return encode(self, prompt, *options)

    async def command_and_tell(*arguments: Any) -> Any:
        asyncio.get_running_loop().call_soon(next(e for e in queued if not e.is_set()).set)
        return await command(*arguments)

    monkeypatch.setattr(PromptEncoder, "encode", encode_in_turn)
    monkeypatch.setattr(actor._loop, "command", command_and_tell)


async def as_reference(bucket: WeightBucket) -> WeightBucket:
    """Is awaited as Ray's reference to it is."""
    return bucket


def test_overlapping_calls_with_publications_between_sample_each_answer_from_its_one_version(
    engine, model, config, encoder, prompts, monkeypatch
):
    """Its log-probs are those of a transformers forward with that version's weights."""
    monkeypatch.setattr(actors.engine, "PolicyEngine", lambda *_: engine)
    monkeypatch.setattr(rollout_actor, "start_role_log", lambda *_: None)
    sizes = {"rollouts_per_prompt": 2, "max_num_seqs": 6, "prompts_per_result": 1}
    actor = RolloutActor(
        "actor", config.model_copy(update={"rollout": config.rollout.model_copy(update=sizes)})
    )
    torch.manual_seed(5)
    named = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights = {-1: named} | {
        v: {n: p + torch.randn_like(p) * 0.05 for n, p in named.items()} for v in (20, 21)
    }

    async def publish(version: int) -> None:
        buckets = to_buckets(weights[version].items(), version, bucket_bytes=1 << 30)
        await actor.load_weights(version, cast(Any, [as_reference(b) for b in buckets]))

    hold_back(monkeypatch, actor, [prompts[7], prompts[12]])

    async def sampled(some: list[Prompt], publishes: int | None = None, after: int = -1) -> list[Trajectory]:
        """`publishes` a version when the first result of version `after` is here."""
        found, publication = [], None
        async for results in actor.rollout(some):
            found += [t for r in results if isinstance(r, TrajectoryGroup) for t in r.trajectories]
            if publishes and publication is None and found[-1].policy_version == after:
                publication = asyncio.ensure_future(publish(publishes))
        await (publication or asyncio.sleep(0))
        return found

    async def overlapping() -> list[list[Trajectory]]:
        calls = [
            sampled(prompts[:8], publishes=20),
            sampled(prompts[8:12]),
            sampled([*prompts[4:9], prompts[12]], publishes=21, after=20),
        ]
        return await asyncio.gather(*calls)

    calls = asyncio.run(overlapping())
    monkeypatch.undo()
    assert [len(found) for found in calls] == [16, 8, 12]
    seen = [t for found in calls for t in found]
    of_calls = [{t.policy_version for t in found} for found in calls]
    assert -1 in of_calls[0] and len(of_calls[0]) > 1, "the version changed within a call"
    assert of_calls[2] >= {20, 21} and {-1, 20, 21} == set().union(*of_calls)
    encoded = {p.prompt_id: encoder.encode(p) for p in prompts}
    gaps: dict[int, list[float]] = {}
    for of in weights:
        model.load_state_dict(weights[of], strict=False)
        for t in seen:
            ids = t.response_token_ids
            exact = reference_logprobs(model, encoded[t.prompt_id], ids)[np.arange(len(ids)), ids]
            gap = float(np.abs(exact - t.actor_logprobs).max())
            gaps.setdefault(of == t.policy_version, []).append(gap)
    assert max(gaps[True]) < TOLERANCE < np.median(gaps[False]) / 100
    model.load_state_dict(named, strict=False)
    asyncio.run(publish(-1))
    actor._loop.close()


def test_video_pads_are_never_sampled_even_when_the_model_wants_them(engine, model, encoded, encoder):
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    prompt = encoded[0]
    with (
        torch.no_grad()
    ):  # the head is tied to the embedding: point the pads' rows along the last hidden state
        hidden = model.model(
            input_ids=torch.tensor(prompt.token_ids[None].astype(np.int64)),
            mm_token_type_ids=torch.tensor(prompt.token_types[None].astype(np.int64)),
            pixel_values_videos=pixel_values([prompt], "cpu"),
            video_grid_thw=torch.tensor([prompt.video_grid_thw]),
        ).last_hidden_state[0, -1]
        model.get_input_embeddings().weight[list(encoder.pad_ids)] = 3 * hidden / hidden.norm()
        wanted = model.lm_head(hidden).softmax(-1)[list(encoder.pad_ids)].sum()
    of_first = reference_logprobs(model, prompt, np.zeros(1, np.int32))[0]
    engine.load_weights(3, list(to_buckets(model.named_parameters(), 3, bucket_bytes=1 << 30)))
    (answers,) = engine.generate([prompt], [0], 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(original[name])
    engine.load_weights(4, list(to_buckets(model.named_parameters(), 4, bucket_bytes=1 << 30)))
    assert wanted > 0.9, "without the ban the first token would be a pad"
    assert not any(np.isin(answer.token_ids, encoder.pad_ids).any() for answer in answers)
    assert all(abs(a.logprobs[0] - of_first[a.token_ids[0]]) < TOLERANCE for a in answers)


def test_blank_video_hides_the_clip_and_nothing_else(prompts, encoder):
    shown, blank = encoder.encode(prompts[0]), encoder.encode(prompts[0], blank_video=True)
    assert (shown.token_ids == blank.token_ids).all()
    assert blank.frames.std() == 0
    assert shown.frames.std() > 0
    assert shown.fingerprint != blank.fingerprint
    assert parse_span("no answer") is None


def test_a_response_has_the_tag_of_the_thought_that_its_prompt_opened(config, encoder, tmp_path):
    """As with Qwen3-VL-Thinking: the model writes the end of the thought alone, or is cut before it."""
    assert encoder.written("5 - 6") == "5 - 6"
    folder = shutil.copytree(
        config.student, tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors")
    )
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\n", "assistant\n<think>\n"))
    written = PromptEncoder(folder, config.prompt, config.video).written
    assert written("5 - 6") == "<think>\n5 - 6" and parse_span(written("5 - 6")) is None
    assert parse_span(written("5 - 6</think>7 - 8")) == (7.0, 8.0)


def test_cuts_and_variable_rates_are_shown_to_vllm_as_to_transformers(
    engine, config, prompts, encoder, tmp_path
):
    """generate raises where vLLM expands a prompt into other ids: its timestamps are those of the encoder."""
    write_video(tmp_path / "even.mp4", noise(48), rate=4)
    write_video(tmp_path / "uneven.mp4", noise(48), times_ms=np.cumsum([0, *[100, 400] * 23, 100]))
    cut = plan_clip("cut", tmp_path / "even.mp4", config.video, 32, cut_s=(3.25, 9.0))
    uneven = plan_clip("uneven", tmp_path / "uneven.mp4", config.video, 32)
    assert cut.start_s == 3.25 and uneven.frame_times_s is not None
    encoded = [
        encoder.encode(dataclasses.replace(prompts[0], prompt_id=c.clip_id, clip=c)) for c in (cut, uneven)
    ]
    engine.generate(encoded, None)
    for prompt, clip in zip(encoded, (cut, uneven), strict=True):
        text = encoder.tokenizer.decode(prompt.token_ids)
        pairs = clip.timestamps_s.reshape(-1, 2).mean(1)
        assert re.findall(r"<\s*([\d.]+)\s*seconds\s*>", text) == [f"{t:.1f}" for t in pairs]


def test_an_engine_in_two_shards_samples_as_one_process_does_before_and_after_a_publication(
    engine, model, config, encoded, encoder, tmp_path, monkeypatch
):
    """Last, since its end ends the other engine too. Shards are processes; on GPUs Ray starts them."""
    (tmp_path / "sitecustomize.py").write_text("import video_opd")  # a CUDA torchvision beside a CPU torch
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")
    vllm.envs.disable_envs_cache()  # of the engine that this process has already
    ended = threading.Event()
    monkeypatch.setattr("video_opd.models.vllm_engine._end_process", ended.set)
    two = config.model_copy(update={"rollout": config.rollout.model_copy(update={"tensor_parallel": 2})})
    shards = PolicyEngine(two, encoder.pad_ids)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    for version in (5, 6):
        buckets = list(to_buckets(weights.items(), version, bucket_bytes=1 << 17))
        assert len(buckets) > 2
        engine.load_weights(version, buckets)
        if version > 5:  # the first are those of the folder
            shards.load_weights(version, buckets)
        one, same = (e.generate(encoded, [version] * len(encoded)) for e in (engine, shards))
        for (expected,), (answer,) in zip(one, same, strict=True):
            assert answer.token_ids.tolist() == expected.token_ids.tolist()
            assert np.abs(answer.logprobs - expected.logprobs).max() < TOLERANCE
        weights = {n: w + torch.randn_like(w) * 0.02 for n, w in weights.items()}
    assert shards._llm.collective_rpc(functions_compiled) == [0, 0]
    shards._llm.llm_engine.model_executor.workers[1].proc.kill()
    assert ended.wait(60), "an actor that lost a shard ends, and is replaced"
