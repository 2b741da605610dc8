"""LoRA adapters in a real vLLM engine: an actor samples from what the learner computes with."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import get_args

import pytest
import torch
from vllm.config.lora import MaxLoRARanks
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from actors.engine import PolicyEngine
from learner.adapters import merge, merged_parameters
from preflight.adapters import adapters
from preflight.inputs import SHAPES
from preflight.model_shapes import find_shapes
from tests.real.adapters import LORA, adapted, gaps, published
from tests.real.conftest import DEMO
from video_opd.config_file import load_config
from video_opd.config_learner import LORA_RANKS, LearnerConfig
from video_opd.errors import WeightsLostError
from video_opd.models.forward import load_model, without_settings
from video_opd.weights.adapters import LAYERS, PREFIX

VLLM = {
    "Qwen2.5-VL-7B-Instruct": Qwen2_5_VLForConditionalGeneration,
    "Qwen3-VL-8B-Instruct": Qwen3VLForConditionalGeneration,
}

TOLERANCE = 1e-5
SMALLEST = 3 / 64  # |weight|: its neighbours in bfloat16 are 2**-12 away or more


@pytest.fixture(scope="module")
def student(models, tmp_path_factory) -> Path:
    """The student with weights of bfloat16, none so near 0 that a tiny update would show in it."""
    folder = shutil.copytree(models / "student", tmp_path_factory.mktemp("adapters") / "student")
    model = load_model(str(folder), "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            sign = torch.where(parameter < 0, -1.0, 1.0)
            parameter.copy_((sign * parameter.abs().clamp(min=SMALLEST)).bfloat16())
    with without_settings(model):
        model.save_pretrained(folder)
    return folder


def test_an_update_that_merged_weights_would_lose_is_sampled_from(
    student, overrides, prompts, encoder, tmp_path, monkeypatch
):
    """Versions follow each other, also back to an earlier one; one that is not whole changes nothing."""
    config = load_config(DEMO, [*overrides, f"student={student}", *LORA, "learner.bucket_bytes=2000"])
    long = dataclasses.replace(prompts[0], prompt_id="long", query=f"{prompts[0].query} {'and again ' * 12}")
    encoded = [encoder.encode(p) for p in [*prompts[:4], long]]
    assert len(encoded[-1].token_ids) > 128, "of more than one block of the prefix cache"
    base = load_model(config.student, "float32").eval()
    models = [adapted(config, "bfloat16", b, seed) for seed, b in enumerate((8e-5, 1e-3))]
    whole = dict(base.named_parameters())
    for name, parts, scaling in merged_parameters(models[0]):
        assert torch.equal(merge(parts, scaling).float(), whole[name]), "nothing is left of the update"
    versions = [published(model, number, config) for number, model in enumerate(models)]
    assert len(versions[0]) > 3
    models = [model.float() for model in models]  # the values that are published; the engine is in float32
    engine = PolicyEngine(config, encoder.pad_ids)
    assert gaps(engine, [base], encoded).max() < TOLERANCE, "before the first publication"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for number in (0, 1, 0):
        engine.load_weights(number, versions[number])
        own, other, of_base = gaps(engine, [models[number], models[1 - number], base], encoded).max(1)
        assert own < TOLERANCE and other > 10 * TOLERANCE and of_base > 10 * TOLERANCE
    with pytest.raises(WeightsLostError):
        engine.load_weights(1, versions[1][:-1])
    assert gaps(engine, models[:1], encoded).max() < TOLERANCE
    assert not list(tmp_path.iterdir()), "no folder of an adapter is left"


@pytest.mark.parametrize(("model", "of_vllm"), VLLM.items())
def test_vllm_finds_the_layer_of_every_adapter(model, of_vllm):
    mapper = of_vllm.hf_to_vllm_mapper.get_rename_mapper()
    names = [
        n.removesuffix(".lora") for n in adapters(find_shapes(model, SHAPES), LearnerConfig(lora_rank=16))
    ]
    assert len(names) % len(LAYERS) == 0 and {n.rpartition(".")[2] for n in names} == {*LAYERS}
    for name in names:
        found, is_a = parse_fine_tuned_lora_name(f"{PREFIX}{name}.lora_B.weight", mapper)
        assert found == name.replace("model.language_model.", "language_model.model.") and not is_a


def test_ranks_are_vllms():
    assert get_args(MaxLoRARanks) == LORA_RANKS
    ranks = [LearnerConfig(lora_rank=r).lora_slot_rank for r in (1, 2, 16, 17, 512)]
    assert ranks == [1, 8, 16, 32, 512]
