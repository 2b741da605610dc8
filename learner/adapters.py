"""LoRA on the student (arXiv 2106.09685): adapters in its layers, alone for actors, merged for exports."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer

from video_opd.config_learner import LearnerConfig
from video_opd.errors import ConfigError
from video_opd.models.forward import VideoLLM
from video_opd.weights.adapters import PREFIX

Parts = tuple[str, list[torch.nn.Parameter], float]
"""A name in the plain model, [weight] or [weight, A, B], and their scaling: what merge() takes."""

_ADAPTER = "default"
VISION_PREFIX = "model.visual."


def choose_trained(model: VideoLLM, learner: LearnerConfig) -> None:
    """Trains adapters only with lora_rank, else all weights; never those of a frozen vision tower."""
    if learner.lora_rank:
        add_adapters(model, learner)
    if learner.freeze_vision:
        for name, parameter in model.named_parameters():
            if name.startswith(VISION_PREFIX):
                parameter.requires_grad_(False)


def checkpoint_layers(model: VideoLLM) -> None:
    """Layers keep their inputs alone, and compute forward again before they go backward.

    transformers also makes every embedding ask for a gradient, that of a frozen Qwen2.5-VL tower's patches
    too: the tower would go backward for nothing. Only reentrant checkpoints need it."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def add_adapters(model: VideoLLM, learner: LearnerConfig) -> None:
    """Puts adapters into the layers that match lora_targets. Raises ConfigError if none does."""
    config = LoraConfig(
        r=learner.lora_rank,
        lora_alpha=learner.lora_alpha,  # pyright: ignore[reportArgumentType]  # peft takes fractions
        target_modules=learner.lora_targets,
        lora_dropout=0.0,  # the trained policy must be the one that the actors sample from
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        targets = f"learner.lora_targets={learner.lora_targets!r}"
        raise ConfigError(f"{targets} takes no adapters: {error}") from error


def adapter_parameters(model: VideoLLM) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in PEFT's files, A or B) of each adapter that is trained; the others add nothing: B is 0."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield PREFIX + name.replace(f".{_ADAPTER}.weight", ".weight"), parameter


def merged_parameters(model: VideoLLM) -> Iterator[Parts]:
    """Each parameter of the plain model, to be merged with its adapter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in model.named_parameters():
        owner, _, rest = name.partition(".base_layer.")
        if owner in layers and rest == "weight":
            layer = layers[owner]
            factors: list[Any] = [layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight]
            yield f"{owner}.weight", [parameter, *factors], layer.scaling[_ADAPTER]
        elif ".lora_A." not in name and ".lora_B." not in name:
            yield name.replace(".base_layer.", "."), [parameter], 1.0


def merge(parameters: Sequence[torch.Tensor], scaling: float) -> torch.Tensor:
    """W, or W + scaling B A, computed in float32 and rounded once to W's dtype."""
    weight, *factors = (p.detach() for p in parameters)
    if not factors:
        return weight
    a, b = factors
    return (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype)
