"""Which layers LoRA may adapt, before anything starts."""

import pytest

from preflight.adapters import check_targets, linear_layers, slot_numbers
from preflight.inputs import SHAPES, make_draft
from preflight.memory import actors_memory, support_memory, vllm_memory, workload_of_budget
from preflight.model_shapes import count, find_shapes, parameters
from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_file import load_config
from video_opd.errors import ConfigError

CONFIG = ROOT / "configs" / "qwen3vl_8b.yaml"
MODELS = ("Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct")
VISION = r".*\.attn\.(qkv|proj)"


IN_STORE = "learner.weight_transfer=object_store"


def make(*overrides: str) -> Config:
    return load_config(CONFIG, ["learner.lora_rank=16", *overrides])


def refusal(model: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_targets(make(*overrides), find_shapes(model, SHAPES))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", MODELS)
def test_targets_that_name_no_layer_to_adapt_are_refused(model):
    def of(pattern: str, *more: str) -> str:
        return refusal(model, f"learner.lora_targets={pattern}", *more)

    assert "names no linear layer" in of(".*nothing")
    assert "model.language_model.embed_tokens, which is no linear layer" in of(r".*embed_tokens|.*q_proj")
    assert "patch_embed.proj, which is no linear layer" in of(r".*proj")
    assert "layers.0.self_attn, which is no linear layer" in of(r".*layers\.\d+\.self_attn")
    assert "reaches frozen layers alone" in of(VISION)
    open_tower = "learner.freeze_vision=false"
    assert "blocks.0.attn.qkv, but actors adapt the language model's" in of(VISION, open_tower)
    check_targets(
        make(f"learner.lora_targets={VISION}", open_tower, "learner.lora_publish=merged"),
        find_shapes(model, SHAPES),
    )
    check_targets(make("learner.lora_targets='.*[a-z]_proj|.*attn.qkv'"), find_shapes(model, SHAPES))


def test_a_head_is_adapted_if_it_is_merged_and_not_the_embedding():
    head = "learner.lora_targets=lm_head"
    assert "reaches lm_head, but actors adapt" in refusal("Qwen3-VL-8B-Instruct", head)
    check_targets(make(head, "learner.lora_publish=merged"), find_shapes("Qwen3-VL-8B-Instruct", SHAPES))
    tied = refusal("Qwen3-VL-2B-Instruct", head, "learner.lora_publish=merged")
    assert "lm_head, which is no linear layer" in tied


def test_a_dry_run_refuses_them():
    with pytest.raises(ConfigError, match="names no linear layer"):
        make_draft(make("learner.lora_targets=.*nothing"))


def test_an_actor_and_the_store_hold_adapters_in_place_of_a_second_set_of_weights():
    shapes = find_shapes("Qwen3-VL-8B-Instruct", SHAPES)
    config, whole = make("learner.lora_rank=12"), make("learner.lora_publish=merged", IN_STORE)
    work, gpu = workload_of_budget(config.video, shapes), 80 << 30
    stored, stored_whole = (
        support_memory(c, shapes)[-1].host.held["published weights"] for c in (config, whole)
    )
    of_layers = sum(sum(s) for n, s in linear_layers(shapes).items() if "language_model.layers" in n)
    assert stored == 2 * 12 * of_layers and stored_whole == 2 * count(parameters(shapes))
    assert slot_numbers(shapes, config.learner) == 16 * of_layers
    adapted, plain = (vllm_memory(c, c.rollout, shapes, work, gpu) for c in (config, whole))
    assert adapted.held["adapter slot"] == 2 * 16 * of_layers and "adapter slot" not in plain.held
    assert sum(adapted.held.values()) == sum(plain.held.values()), "vLLM gives the KV cache what is left"
    assert actors_memory(config, shapes, work, gpu).host.held["adapter"] == stored
