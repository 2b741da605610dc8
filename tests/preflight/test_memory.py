"""The memory model against published totals and against real tensors."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

from demo.models import Size, build_model, build_tokenizer
from learner.adapters import checkpoint_layers, choose_trained
from learner.loss import ResponseTokens, loss_per_token
from preflight import memory
from preflight.activations import (
    logit_copies,
    score_bytes,
    text_layer_passing,
    text_layer_saved,
    video_bytes,
    vision_block_passing,
    vision_block_saved,
)
from preflight.inputs import SHAPES
from preflight.memory import (
    DTYPE_BYTES,
    RoleMemory,
    Workload,
    actors_memory,
    answering_phases,
    kv_bytes_per_token,
    learner_memory,
    learner_phases,
    split_clips,
    teacher_memory,
)
from preflight.model_shapes import ModelShapes, count, find_shapes, model_bytes, parameters, parse_shapes
from preflight.packing import Attended, TreeSize, largest_pass, pass_of
from preflight.zero import REDUCE_BUCKET, gradient_bytes, optimizer_bytes, trained, weight_bytes
from tests.learner.test_batching import build, clip_of, clips_of_prompts, plans, rows
from tests.live_bytes import LiveBytes
from video_opd.config_file import load_demo
from video_opd.config_learner import LearnerConfig, LossConfig
from video_opd.config_teachers import TeacherConfig
from video_opd.errors import ModelError
from video_opd.models.forward import ResponseBatch, ResponseLoss, by_chunks, collate, prefilled, token_entropy
from video_opd.models.policy import Policy
from video_opd.models.qwen_vl import adapt
from video_opd.models.trees import Packing
from video_opd.types import EncodedPrompt, Patching

PUBLISHED = {  # parameters, billions
    "Qwen3-VL-2B-Instruct": 2.13,
    "Qwen3-VL-4B-Instruct": 4.44,
    "Qwen3-VL-8B-Instruct": 8.77,
    "Qwen3-VL-32B-Instruct": 33.4,
    "Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen2.5-VL-72B-Instruct": 73.4,
    "Qwen2.5-VL-72B-Instruct-FP8-Dynamic": 73.4,
    "Qwen3-VL-32B-Instruct-FP8": 33.4,
}
PATCHING = Patching(mean=(0.5,) * 3, std=(0.5,) * 3, patch_size=16, merge_size=2, temporal_patch_size=2)
SIZE = Size(hidden=128, layers=4, vision_hidden=256, vision_layers=8)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return build_model(SIZE, tokenizer, seed=0)


def shapes_of(model):
    return parse_shapes(model.config.to_dict(), "tiny", "tiny")


def batch_of(
    num_clips: int = 2, branches: int = 1, pairs: int = 8, own: int = 0, text: int = 100, response: int = 20
) -> ResponseBatch:
    """Sequences about clips of pairs x 4 x 4 video tokens: `text` tokens, of which `own` are not shared."""
    tokenizer = build_tokenizer()
    names = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")
    start, video, end = (tokenizer.vocab[name] for name in names)
    frame_pair, types = [start, *[video] * 16, end], [0, *[2] * 16, 0]
    prompts, responses = [], []
    for clip in range(num_clips):
        frames = np.random.default_rng(clip).integers(0, 256, (2 * pairs, 128, 128, 3), np.uint8)
        for branch in range(branches):
            ids = [5] * 4 + frame_pair * pairs + [7] * (text - own) + [8 + branch] * own
            shown = [0] * 4 + types * pairs + [0] * text
            prompts.append(encoded(str(clip), ids, shown, frames, (pairs, 8, 8)))
            responses.append(np.full(response, 30 + branch, np.int32))
    return collate(prompts, responses, pad_id=0)


def encoded(
    clip: str, ids: list[int], types: list[int], frames: np.ndarray, grid: tuple[int, int, int]
) -> EncodedPrompt:
    return EncodedPrompt(
        prompt_id="made up",
        token_ids=np.array(ids, np.int32),
        unexpanded_token_ids=[],
        frames=frames,
        frames_digest=clip,
        patching=Patching(
            mean=(0.5,) * 3, std=(0.5,) * 3, patch_size=16, merge_size=2, temporal_patch_size=2
        ),
        video_metadata={},
        video_grid_thw=grid,
        token_types=np.array(types, np.int32),
        second_per_grid=None,
        fingerprint="",
    )


def sizes_of(batch: ResponseBatch) -> list[TreeSize]:
    return [
        TreeSize(t.prefix, t.prefix**2, len(t.members), sum(t.branches), sum(n * n for n in t.branches))
        for t in batch.trees
    ]


# --- shapes ---


def test_shapes_are_committed_for_every_published_model():
    assert {p.stem for p in SHAPES.glob("*.json")} == PUBLISHED.keys()


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_committed_shapes_have_the_published_number_of_parameters(name, billions):
    shapes = find_shapes(f"/nowhere/{name}", SHAPES)
    assert shapes.committed and count(parameters(shapes)) == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_is_the_one_that_transformers_makes(name, tmp_path):
    """The same names and shapes, at two layers of each tower; the others repeat them."""
    tree = json.loads((SHAPES / f"{name}.json").read_text())
    tree["text_config"]["num_hidden_layers"] = tree["vision_config"]["depth"] = 2
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with torch.device("meta"):
        real = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert parameters(find_shapes(tmp_path, SHAPES)) == {
        n: tuple(p.shape) for n, p in real.named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "block", "published"),
    [
        (
            "Qwen2.5-VL-7B-Instruct",
            None,
            10.06e9,
        ),  # safetensors of RedHatAI/Qwen2.5-VL-7B-Instruct-FP8-Dynamic
        ("Qwen3-VL-8B-Instruct", None, 9.87 * 2**30),  # of mbehr90/Qwen3-VL-8B-Instruct-fp8
        ("Qwen3-VL-8B-Instruct", [128, 128], 9.87 * 2**30),
    ],
)
def test_fp8_weights_take_the_bytes_of_published_folders(name, block, published):
    tree = json.loads((SHAPES / f"{name}.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "channel"}
    own = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": scheme}}}
    own["ignore"] = ["lm_head", "re:.*visual.*"]
    if block:
        own = {"quant_method": "fp8", "weight_block_size": block, "modules_to_not_convert": ["model.visual"]}
    planned = model_bytes(parse_shapes(tree | {"quantization_config": own}, name, name), 2)
    assert planned == pytest.approx(published, rel=0.002)


def test_fp8_converts_the_linear_layers_that_are_not_kept():
    fp8 = find_shapes("Qwen3-VL-32B-Instruct-FP8", SHAPES)
    assert fp8.fp8
    converted = {n for n, s in parameters(fp8).items() if fp8.fp8.converts(n, s)}
    layers = [n for n, s in parameters(fp8).items() if ".layers." in n and len(s) == 2]
    assert len(layers) == 7 * 64 and converted == set(layers)
    assert fp8.fp8.num_bytes((300, 200)) == 300 * 200 + 4 * 3 * 2


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", None])
def test_other_quantized_folders_are_named(method):
    tree = json.loads((SHAPES / "Qwen3-VL-2B-Instruct.json").read_text())
    with pytest.raises(ModelError, match=rf"there: weights quantized by {method!r} .*: use FP8 or bfloat16"):
        parse_shapes(tree | {"quantization_config": {"quant_method": method}}, "there", "there")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_older_folders_leave_out_is_what_transformers_takes(name, tmp_path):
    """Such as the vision depth: configs hold only what differs from a default."""
    tree = json.loads((SHAPES / f"{name}.json").read_text())
    default = AutoConfig.for_model(tree["model_type"]).vision_config.to_dict()
    vision = {k: v for k, v in tree["vision_config"].items() if k in default and default[k] != v}
    (tmp_path / "config.json").write_text(json.dumps(tree | {"vision_config": vision}))
    assert parameters(find_shapes(tmp_path, SHAPES)) == parameters(find_shapes(f"/nowhere/{name}", SHAPES))


def test_an_unknown_model_that_is_not_here_is_one_line():
    with pytest.raises(
        ModelError,
        match=r"8B-Instrukt does not exist, and it is none of the models with committed shapes \(Qwen2",
    ) as caught:
        find_shapes("/nowhere/Qwen3-VL-8B-Instrukt", SHAPES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"vision_config": None},
        {"text_config": {}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        {"quantization_config": "fp8"},
    ],
)
def test_a_damaged_config_is_named(tmp_path, change):
    tree = json.loads((SHAPES / "Qwen3-VL-2B-Instruct.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=r"config\.json"):
        find_shapes(tmp_path, SHAPES)


# --- exact formulas ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze_vision": False},
        {"lora_rank": 4},
        {"lora_rank": 4, "lora_targets": r".*\.attn\.(qkv|proj)"},
    ],
)
def test_what_is_trained_is_what_the_learner_trains(model, options):
    learner = LearnerConfig(**options)
    if "lora_targets" in options:
        learner = learner.model_copy(update={"freeze_vision": False})
    shapes = shapes_of(model)
    choose_trained(model, learner)
    assert count(trained(shapes, learner)) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_parameter_bytes_are_exact(model, dtype):
    model = model.to(getattr(torch, dtype))
    learner = LearnerConfig(dtype=dtype, zero_stage=0)
    assert weight_bytes(shapes_of(model), learner) == {"weights": sum(p.nbytes for p in model.parameters())}


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@torch.no_grad()
def test_kv_bytes_per_token_are_exact(model, dtype):
    model, cache = model.to(getattr(torch, dtype)), DynamicCache()
    model(input_ids=torch.tensor([[5] * 37]), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert held == 37 * kv_bytes_per_token(shapes_of(model), dtype)


def test_adam_keeps_the_bytes_that_are_planned_for(model):
    learner = LearnerConfig(dtype="float32", zero_stage=0, freeze_vision=True)
    shapes = shapes_of(model)
    choose_trained(model, learner)
    parameters_ = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters_)
    for parameter in parameters_:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(
        state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    planned = optimizer_bytes(count(trained(shapes, learner)), learner)
    assert planned == {"optimizer moments": moments, "float32 masters": 0}
    assert gradient_bytes(trained(shapes, learner), learner) == {
        "gradients": sum(p.nbytes for p in parameters_)
    }


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 4), (2, 4), (3, 4)])
def test_zero_stages_divide_what_they_partition(stage, ranks, dtype):
    shapes, e = find_shapes("Qwen3-VL-8B-Instruct", SHAPES), DTYPE_BYTES[dtype]
    learner = LearnerConfig(zero_stage=stage, world_size=ranks, freeze_vision=False, dtype=dtype)
    n = count(parameters(shapes))
    are_copied = dtype == "bfloat16" or stage in (1, 2)  # in float32 the weights are the masters
    assert optimizer_bytes(n, learner) == {
        "optimizer moments": 8 * n // ranks,
        "float32 masters": 4 * n // ranks if are_copied else 0,
    }
    gradients = gradient_bytes(parameters(shapes), learner)
    assert gradients["gradients"] == (4 * n // ranks if stage >= 2 else e * n)
    assert weight_bytes(shapes, learner)["weights"] == e * n // (ranks if stage == 3 else 1)


def test_beside_a_bucket_is_its_copy_or_a_larger_gradient():
    learner = LearnerConfig(zero_stage=3, world_size=4, grad_accum_dtype="bfloat16")
    small, large = {"w": (1000, 1000)}, {"w": (1000, 1000), "head": (152_000, 5120)}
    of_bucket = [gradient_bytes(of, learner)["gradient buckets"] for of in (small, large)]
    assert of_bucket == [2 * (REDUCE_BUCKET + 10**6), 2 * (REDUCE_BUCKET + 152_000 * 5120)]


@pytest.mark.parametrize(
    ("options", "gradients", "bucket"),
    [
        ({"zero_stage": 0}, 2, 0),
        ({"zero_stage": 1}, 2, 2 + 2),
        ({"zero_stage": 2}, 4 / 4, 2 + 2 + 4 / 4),
        ({"zero_stage": 3}, 4 / 4, 2 + 2 + 4 / 4),
        ({"zero_stage": 3, "grad_accum_dtype": "bfloat16"}, 2 / 4, 2 + 2),
        ({"zero_stage": 3, "dtype": "float32"}, 4 / 4, 4 + 4),
        ({"zero_stage": 2, "deepspeed": {"communication_data_type": "fp32"}}, 4 / 4, 4 + 4),
        ({"zero_stage": 1, "deepspeed": {"zero_optimization": {"overlap_comm": True}}}, 2, 2 * 2 + 2),
        ({"zero_stage": 1, "deepspeed": {"zero_optimization": {"overlap_comm": "auto"}}}, 2, 2 + 2),
    ],
)
def test_gradients_take_the_bytes_that_they_are_added_in(options, gradients, bucket):
    """A bucket has a copy while it is reduced. A part of it, this rank's, is converted."""
    given = options.get("deepspeed", {})
    zero = given.get("zero_optimization", {}) | {"reduce_bucket_size": 40}
    deepspeed = given | {"zero_optimization": zero}
    learner = LearnerConfig(**{"world_size": 4, **options, "deepspeed": deepspeed})
    planned = gradient_bytes({f"w{i}": (10,) for i in range(100)}, learner)
    assert planned["gradients"] == 1000 * gradients and planned.get("gradient buckets", 0) == 40 * bucket


def test_offloaded_states_are_planned_on_the_host_and_nowhere_else():
    shapes = find_shapes("Qwen3-VL-8B-Instruct", SHAPES)
    work = Workload(8192, 8192, 9000, 1 << 20)

    def memory(stage: Any, zero: dict[str, Any]) -> RoleMemory:
        learner = LearnerConfig(world_size=4, zero_stage=stage, deepspeed={"zero_optimization": zero})
        config = load_demo().model_copy(update={"learner": learner})
        return learner_memory(config, shapes, None, work)

    part = count(trained(shapes, LearnerConfig())) // 4
    to_cpu = {"offload_optimizer": {"device": "cpu"}}
    for stage, on_host in ((1, 8 + 4 + 4 + 2 + 2 + 4), (2, 8 + 4 + 4 + 2 + 4), (3, 8 + 4 + 4 + 4)):
        plain, offloaded = memory(stage, {}), memory(stage, to_cpu)
        assert plain.device and offloaded.device
        moved = {"optimizer moments", "float32 masters"} | ({"gradients"} if stage == 3 else set())
        assert plain.device.held.keys() - offloaded.device.held.keys() == moved
        assert offloaded.device.phases["optimizer step"] == {"float32 gradients and roots": 0}
        more = sum(offloaded.host.held.values()) - sum(plain.host.held.values())
        at_once = 4 * min(part, 10**9) if stage == 3 else 0
        assert more == pytest.approx(on_host * part + at_once, abs=8)
    weights = memory(3, {"offload_param": {"device": "cpu"}})
    assert weights.device and weights.device.held["weights"] == 0
    assert weights.host.held["offloaded weights"] == 2 * count(parameters(shapes)) // 4


def test_a_learners_host_takes_its_share_while_it_loads_and_its_states_on_a_resume():
    shapes = find_shapes("Qwen3-VL-8B-Instruct", SHAPES)
    work, part = Workload(8192, 8192, 9000, 1 << 20), count(trained(shapes, LearnerConfig())) // 4
    plain, float32 = LearnerConfig(world_size=4), LearnerConfig(world_size=4, dtype="float32")
    for learner, states in ((plain, 12), (float32, 8)):
        host = learner_memory(load_demo().model_copy(update={"learner": learner}), shapes, None, work).host
        assert host.phases["loading"] == {"from files": pytest.approx(states * part, abs=8)}
    zero = {"offload_optimizer": {"device": "cpu"}}
    offloaded = LearnerConfig(world_size=4, deepspeed={"zero_optimization": zero})
    adapters = LearnerConfig(world_size=4, lora_rank=16)
    masters, largest_tensor = 4 * part, 2 * 151936 * 4096
    for learner, read in ((offloaded, masters), (adapters, largest_tensor)):
        host = learner_memory(load_demo().model_copy(update={"learner": learner}), shapes, None, work).host
        assert host.phases["loading"]["from files"] == pytest.approx(read, abs=8)


def test_prompts_on_the_host_are_frames_without_float32_pixels_and_what_vllm_processed():
    """By hand, for clips of 64 MiB: video.feed_bytes, 1 GiB, is 16 of them."""
    shapes, clip, gib = find_shapes("Qwen3-VL-8B-Instruct", SHAPES), 64 << 20, 1 << 30
    work = Workload(8192, 8192, 9000, clip)

    def host(role: Any, work: Workload, *overrides: str) -> dict[str, int]:
        config = load_demo(["groups_per_step=40", "rollout.prompts_per_call=10", *overrides])
        args = (config, shapes, None, work) if role is learner_memory else (config, shapes, work, 80 * gib)
        return role(*args).host.held

    rank = host(learner_memory, work, "learner.micro_batch=2")
    assert rank["decoded frames"] == (2 + 1 + 16) * clip, "a micro-batch, the next prompt, the feed"
    assert rank["uploaded frames"] == 2 * clip and "processed clips" not in rank
    assert host(learner_memory, work, "groups_per_step=8")["decoded frames"] == 8 * clip, "all of an update"
    busy = host(actors_memory, work, "max_policy_lag=0", "rollout.max_num_seqs=9", "rollout.num_actors=2")
    assert busy["decoded frames"] == busy["processed clips"] == 20 * clip, "two calls"
    few = host(actors_memory, work, "max_policy_lag=0", "rollout.prompts_per_call=2", "rollout.num_actors=10")
    assert (few["decoded frames"], few["processed clips"]) == (4 * clip, gib), "vLLM's cache fills in a pass"
    whole = ("curriculum.group_by_video=true", "rollout.max_num_seqs=9", "rollout.num_actors=2")
    videos = host(actors_memory, work, "max_policy_lag=0", *whole)
    assert videos["decoded frames"] == 40 * clip, "all prompts in flight, on one actor at worst"
    small = host(actors_memory, replace(work, clip_bytes=1000, num_clips=200))
    assert small["processed clips"] == 200_000, "no more than all clips"
    sizes = ["teacher_pool.max_batch_requests=3", "teacher_pool.micro_batch=4"]
    scores = host(teacher_memory, work, *sizes)
    assert scores["decoded frames"] == (4 + 6 + 16) * clip and scores["uploaded frames"] == 4 * clip
    by_vllm = host(teacher_memory, work, *sizes, "teacher_pool.engine=vllm")
    assert by_vllm["processed clips"] == 26 * clip and "uploaded frames" not in by_vllm


# --- activations, against the tensors of real passes ---


TREES = {  # clips, sequences of each, and lengths
    "alone": {"num_clips": 2},
    "long prefix": {"num_clips": 2, "branches": 4, "own": 10},
    "short prefix": {"num_clips": 2, "branches": 4, "own": 10, "pairs": 1, "text": 30, "response": 60},
}


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_trees_attend_as_they_are_planned_to(kind, attention):
    batch = batch_of(**TREES[kind])
    packing = Packing(batch.trees, attention, 2, torch.float32, torch.device("cpu"))
    causal = masked = joined = 0
    for length, call in zip(packing.sizes, packing.calls, strict=True):
        prefix, mask = call.prefix, call.mask
        before = 0 if prefix is None else packing.sizes[prefix]
        joined += before + length if before else 0
        if mask is None:
            causal += length**2 + 2 * length * before
        else:
            assert mask.shape[2:] == ((2 if attention == "sdpa" else 1) * length, before + length)
            masked += length * (before + length)
    assert pass_of(sizes_of(batch), 0, attention).attended == Attended(causal, masked, joined)
    assert bool(joined) == (kind != "alone")
    assert bool(masked) == (attention == "eager" or (attention == "sdpa" and kind != "alone"))


def test_no_pass_has_more_than_the_largest():
    """Trees at random, of all sizes that micro_batch and tree_tokens let through."""
    rng, reached = np.random.default_rng(0), 0.0
    for _ in range(3000):
        longest, sequences = int(rng.integers(2, 1000)), int(rng.integers(1, 17))
        most = None if rng.random() < 0.2 else int(rng.integers(1, 3 * longest))
        trees, left, attention = [], sequences, rng.choice(["sdpa", "eager", "flash_attention_2"])
        while left:
            number = int(rng.integers(1, left + 1))
            length = longest if rng.random() < 0.5 else int(rng.integers(1, longest + 1))
            branch = int(length * rng.random() ** 2)
            sizes = rng.integers(branch // 2, branch + 1, number) if rng.random() < 0.5 else [branch] * number
            prefix = length - branch
            if number == 1:
                sizes, prefix = [0], length
            squared = sum(int(n) ** 2 for n in sizes)
            trees.append(TreeSize(prefix, prefix**2, number, int(sum(sizes)), squared))
            left -= number
        while len(trees) > 1 and most and sum(t.tokens for t in trees) > most:
            trees.pop()
        of_trees = pass_of(trees, 0, attention)
        if of_trees.tokens > max(most or of_trees.tokens, longest):
            continue
        bound = largest_pass(sequences, longest, 0, attention, most)
        assert of_trees.tokens <= bound.tokens
        for name in ("causal", "masked", "joined"):
            assert getattr(of_trees.attended, name) <= getattr(bound.attended, name), (name, trees, bound)
        reached = max(reached, of_trees.attended.joined / max(bound.attended.joined, 1))
    assert reached > 0.9, "the bound is met"


def test_sdpa_keeps_scores_in_float32_on_a_gpu_where_no_fused_kernel_takes_fewer_key_heads():
    """The rule of torch 2.13 and transformers; a CPU has a fused kernel for it."""
    grouped = find_shapes("Qwen3-VL-8B-Instruct", SHAPES)
    alike = replace(grouped, text=replace(grouped.text, key=grouped.text.query))

    def of(attended: Attended, shapes: ModelShapes = grouped, **options: Any) -> tuple[int, int]:
        return score_bytes(shapes, LearnerConfig(**options), attended)

    alone, under_mask, joined = Attended(10_000), Attended(0, 10_000), Attended(0, 0, 100)
    assert of(alone, dtype="float32") == (4 * 32 * 10_000, 0)
    assert of(alone, dtype="float32", num_gpus=0) == (0, 0)
    assert of(alone, alike, dtype="float32") == of(alone) == (0, 0)
    assert of(under_mask, dtype="float32") == (0, 4 * 4 * 10_000), "four heads of a key head are rows"
    assert of(under_mask) == (0, 4 * 2 * 10_000) and of(under_mask, alike) == (0, 2 * 10_000)
    assert of(under_mask, attn_implementation="eager") == (6 * 32 * 10_000, 2 * 10_000)
    assert of(joined) == of(joined, attn_implementation="flash_attention_2") == (2 * 2 * 1024 * 100, 0)
    assert of(joined, attn_implementation="eager") == (2 * 2 * (4096 + 1024) * 100, 0)


@pytest.mark.parametrize(("kind", "num_answers"), [("alone", 1), ("long prefix", 1), ("short prefix", 2)])
@torch.no_grad()
def test_the_peak_of_answers_whose_prompts_are_computed_once(model, kind, num_answers):
    adapt(model, "sdpa")
    batch = batch_of(**TREES[kind] | {"response": 0})
    features = model.model.get_video_features(batch.pixel_values, batch.video_grid_thw)
    num_tokens = num_answers * sum(tree.num_separate_tokens for tree in batch.trees)
    pool, of = TeacherConfig(dtype="float32", num_gpus=0), pass_of(sizes_of(batch), 0, "sdpa")
    phases = answering_phases(pool, shapes_of(model), of, num_tokens)
    with LiveBytes() as live:
        given = prefilled(model, replace(batch, video_features=features), num_answers)
        held = live.now
    assert given["input_ids"].shape == (num_answers * len(batch.lengths), 1)
    cache = phases["answering"]["KV cache"]
    assert held == pytest.approx(cache, rel=0.05), "the packed cache is gone"
    peaks = sum(phases["prompts to answer"].values()), cache * (1 + 1 / SIZE.layers)
    assert live.peak == pytest.approx(max(peaks), rel=0.1)


def test_a_whole_video_may_be_one_call_of_an_actor_and_a_call_may_be_one_prompt():
    shapes, clip = find_shapes("Qwen3-VL-8B-Instruct", SHAPES), 64 << 20

    def decoded(*overrides: str) -> int:
        sizes = "max_policy_lag=0", "rollout.num_actors=2", "rollout.max_num_seqs=9"
        config = load_demo(["groups_per_step=100", "rollout.prompts_per_call=2", *sizes, *overrides])
        work = Workload(8192, 8192, 9000, clip)
        return actors_memory(config, shapes, work, 80 << 30).host.held["decoded frames"] // clip

    by_video = "curriculum.group_by_video=true"
    assert decoded() == 9 + 25 + 16, "25 calls of two under way, 16 clips of the feed"
    assert decoded(by_video) == 9 + 50 + 16, "50 calls of one"
    small = "groups_per_step=10", "rollout.num_actors=10"
    assert decoded(*small) == 2 * 2 and decoded(*small, by_video) == 10, "all of a step"


@given(clips_of_prompts, st.integers(1, 6), st.none() | st.integers(14, 80))
def test_features_of_no_more_clips_are_kept_than_are_planned_for(clips, micro_batch, tree_tokens):
    """Those of earlier passes that later ones need. Of up to 32 tokens of a sequence 13 are its own."""
    learner = LearnerConfig(micro_batch=micro_batch, tree_tokens=tree_tokens, zero_stage=2)
    groups = build(clips)
    (plan,) = plans(groups, learner)
    passes = [{clip_of(row) for row in of_pass} for of_pass in plan.micro_batches]
    kept = [set().union(*passes[: i + 1]) & set().union(*passes[i + 1 :]) for i in range(len(passes))]
    sizes = [f"groups_per_step={len(rows(plan))}", "rollout.max_response_tokens=9", "prompt.video_first=true"]
    config = load_demo(sizes).model_copy(update={"learner": learner})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "TEXT_TOKENS", 4)
        planned = split_clips(config, 19 + 13)
    assert max(map(len, kept)) <= planned


def test_kept_features_count_where_the_tower_is_frozen_and_whole():
    shapes, work = find_shapes("Qwen3-VL-8B-Instruct", SHAPES), Workload(8192, 8192, 9000, 1 << 20)

    def kept(**options: Any) -> int:
        learner = LearnerConfig(**{"zero_stage": 2, "micro_batch": 7, **options})
        config = load_demo(["groups_per_step=32", "prompt.video_first=true", "rollout.max_model_len=16000"])
        device = learner_memory(config.model_copy(update={"learner": learner}), shapes, None, work).device
        assert device
        return device.held.get("features kept", 0)

    a_clip = 8192 * 4096 * 4 * 2
    assert kept() == 4 * a_clip, "4 clips of 8 prompts each are more than 7"
    assert kept(tree_tokens=9000) == kept(micro_batch=1) == 16 * a_clip, "or 16 clips of two"
    assert kept(zero_stage=3) == kept(freeze_vision=False) == 0 < kept(zero_stage=3, vision_cache_bytes=1)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("kind", TREES)
def test_what_layers_keep_for_the_backward_pass(model, kind, dtype):
    model, e = model.to(getattr(torch, dtype)).train(), DTYPE_BYTES[dtype]
    shapes, batch = shapes_of(model), batch_of(**TREES[kind])
    with LiveBytes() as live:
        result = ResponseLoss(model, 512)(
            batch, lambda logits, _: (logits.logsumexp(-1),), len(batch.targets)
        )
        kept = live.now
    del result
    of = pass_of(sizes_of(batch), 0, "sdpa")
    scores, masks = score_bytes(shapes, LearnerConfig(dtype=dtype, num_gpus=0), of.attended)
    layers = SIZE.layers * (of.tokens * text_layer_saved(shapes, e) + scores)
    blocks = len(batch.pixel_values) * SIZE.vision_layers * vision_block_saved(shapes, e)
    assert kept == pytest.approx(layers + masks + blocks, rel=0.15)


CHECKPOINTED = [(c, d, "sdpa", "alone") for c in (False, True) for d in DTYPE_BYTES]


@pytest.mark.parametrize(
    ("checkpointing", "dtype", "attention", "kind"),
    [
        *CHECKPOINTED,
        (False, "bfloat16", "eager", "alone"),
        (False, "bfloat16", "sdpa", "short prefix"),
        *[(c, "float32", "sdpa", "long prefix") for c in (False, True)],
    ],
)
def test_the_peak_of_a_learners_pass(tokenizer, dtype, checkpointing, attention, kind):
    """Forward and backward beside whole gradients, as from an update's second micro-batch on."""
    size = Size(hidden=128, layers=8, vision_hidden=64)
    model = build_model(size, tokenizer, seed=0).to(getattr(torch, dtype)).train()
    model.set_attn_implementation(attention)
    more_text = {"text": 400} if kind == "alone" else {}
    shapes, batch = shapes_of(model), batch_of(**TREES[kind] | more_text)
    options: dict[str, Any] = {"gradient_checkpointing": checkpointing, "attn_implementation": attention}
    learner = LearnerConfig(dtype=dtype, zero_stage=0, num_gpus=0, micro_batch=len(batch.lengths), **options)
    choose_trained(model, learner)
    if checkpointing:
        checkpoint_layers(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with LiveBytes() as live:
        loss, *_ = ResponseLoss(model, 512)(
            batch, lambda logits, _: (logits.logsumexp(-1),), len(batch.targets)
        )
        loss.sum().backward()
    demo = load_demo([f"rollout.max_response_tokens={max(batch.lengths)}", "rollout.max_model_len=16000"])
    of = pass_of(sizes_of(batch), len(batch.pixel_values) // 4, attention)
    phases = learner_phases(demo.model_copy(update={"learner": learner}), shapes, of)
    planned = max(sum(phases[p].values()) - phases[p]["pixels"] for p in ("loss", "backward"))
    assert live.peak == pytest.approx(planned, rel=0.25)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@torch.no_grad()
def test_the_peak_of_passes_that_keep_nothing(model, dtype):
    model, e = model.to(getattr(torch, dtype)), DTYPE_BYTES[dtype]
    shapes, batch = shapes_of(model), batch_of()
    pixels = batch.pixel_values.to(getattr(torch, dtype))
    with LiveBytes() as live:
        model.model.get_video_features(pixels, batch.video_grid_thw)
    features = video_bytes(shapes, e, len(pixels) // 4)["video features"]
    assert live.peak - features == pytest.approx(len(pixels) * vision_block_passing(shapes, e), rel=0.15)
    embeddings = torch.randn(2, 512, SIZE.hidden, dtype=pixels.dtype)
    with LiveBytes() as live:
        model.model.language_model(
            inputs_embeds=embeddings, use_cache=False, position_ids=torch.arange(512).expand(3, 2, 512)
        )
    assert live.peak + embeddings.nbytes == pytest.approx(1024 * text_layer_passing(shapes, e), rel=0.1)


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(kind=k)
        for k in ("opd", "opd_topk", "opd_full", "grpo", "off_policy_rkd", "off_policy_fkd", "sft")
    ]
    + [
        LossConfig(kind="opd_full", divergence="jsd"),
        LossConfig(kind="opd_full", divergence="forward"),
        LossConfig(kind="opd_full", forward_kl_entropy=1.0),
        LossConfig(kind="opd_topk", divergence="jsd"),
        LossConfig(kind="opd_topk", forward_kl_entropy=1.0),
    ],
    ids=lambda loss: f"{loss.kind}-{loss.divergence}-{loss.forward_kl_entropy}",
)
@pytest.mark.parametrize(("chunk", "temperature"), [(64, 1.0), (16, 1.0), (64, 0.9)])
def test_copies_of_the_logits_at_the_peak_of_every_loss(loss, chunk, temperature):
    rows, vocabulary, hidden = 64, 20_000, 16
    policy = Policy(temperature, (1, 2), "cpu")
    head = torch.nn.Linear(hidden, vocabulary, bias=False)
    tokens = ResponseTokens(
        targets=torch.zeros(rows, dtype=torch.int64),
        actor_logprobs=torch.zeros(rows),
        advantage=torch.ones(rows),
        top_k=(torch.arange(32).expand(rows, 32), torch.full((rows, 32), -5.0)),
        teacher_logprobs=torch.zeros(rows),
        teacher_logits=lambda which: policy(torch.zeros(rows, hidden)[which] @ head.weight.detach().T),
        is_forward=torch.arange(rows) % 2 > 0 if loss.forward_kl_entropy else None,
    )

    def of_rows(logits: torch.Tensor, which: slice) -> tuple[torch.Tensor, ...]:
        logits = policy(logits)
        return *loss_per_token(loss, logits, tokens, which), token_entropy(logits.detach())

    with LiveBytes() as live:
        by_chunks(head, torch.randn(rows, hidden, requires_grad=True), of_rows, chunk, rows)[
            0
        ].sum().backward()
    most = 4 * chunk * vocabulary * logit_copies(loss)
    gradient_of_head = head.weight.nbytes
    assert live.peak <= 1.02 * most + gradient_of_head
    assert live.peak >= 0.98 * most or chunk < rows  # of several chunks, the recomputation leaves some out
