"""LoRA adapters as PEFT folders: users and vLLM read them; the actors get the tensors in buckets."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from video_opd.config_learner import LearnerConfig
from video_opd.hub import is_hub_model

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of the language models; those that LoRA may reach in actors."""
PREFIX = "base_model.model."
"""Before a layer's name in PEFT's files; vLLM renames what follows as it does names of weights."""


def vllm_options(learner: LearnerConfig) -> dict[str, Any]:
    """Options of vllm.LLM for one adapter at a time."""
    rank, layers = learner.lora_slot_rank, list(LAYERS)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, "lora_target_modules": layers}


def write_adapter(folder: Path, named: dict[str, torch.Tensor], learner: LearnerConfig, base: str) -> None:
    """Writes a new PEFT folder. named: A[r, inputs] and B[outputs, r] of each layer, by PEFT's names.

    base: the model without adapters, a folder or a model of the hub. vLLM and PEFT scale B A by
    lora_alpha / lora_rank.
    """
    layers = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in named})
    name, _, commit = base.partition("@") if is_hub_model(base) else (base, "", "")
    config: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": name, "target_modules": layers}
    config |= {"revision": commit} if commit else {}
    config |= {"r": learner.lora_rank, "lora_alpha": learner.lora_alpha, "inference_mode": True}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
