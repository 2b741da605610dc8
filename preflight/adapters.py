"""The layers that LoRA adapts: which the configuration names, which vLLM takes, and their size."""

import re

from preflight.model_shapes import ModelShapes, Parameters, parameters
from video_opd.config import Config
from video_opd.config_learner import LearnerConfig
from video_opd.errors import ConfigError

TEXT_LAYER = "model.language_model.layers."
VISION = "model.visual."


def linear_layers(shapes: ModelShapes) -> Parameters:
    """Name -> (outputs, inputs) of every linear layer. A tied head is the embedding, so it is none."""
    weights = {n.removesuffix(".weight"): s for n, s in parameters(shapes).items() if n.endswith(".weight")}
    return {n: s for n, s in weights.items() if len(s) == 2 and "embed" not in n}


def adapters(shapes: ModelShapes, learner: LearnerConfig) -> Parameters:
    """The adapters that are trained, A and B of a layer as one: (rank, inputs + outputs)."""
    targets = {n: s for n, s in linear_layers(shapes).items() if re.fullmatch(learner.lora_targets, n)}
    trained = {n: s for n, s in targets.items() if not (learner.freeze_vision and n.startswith(VISION))}
    return {f"{n}.lora": (learner.lora_rank, sum(s)) for n, s in trained.items()}


def slot_numbers(shapes: ModelShapes, learner: LearnerConfig) -> int:
    """Numbers that an actor's vLLM reserves for an adapter, in every linear layer of the language model."""
    sizes = (sum(s) for n, s in linear_layers(shapes).items() if n.startswith(TEXT_LAYER))
    return learner.lora_slot_rank * sum(sizes)


def check_targets(config: Config, shapes: ModelShapes) -> None:
    """lora_targets must name linear layers, and none that actors could not adapt. Raises ConfigError."""
    learner, linear = config.learner, linear_layers(shapes)
    if not learner.lora_rank:
        return
    words = [name.split(".") for name in parameters(shapes)] + [["lm_head", "weight"]]
    modules = {".".join(w[:n]): None for w in words for n in range(1, len(w))}
    reached = [name for name in modules if re.fullmatch(learner.lora_targets, name)]
    setting, trained = f"learner.lora_targets={learner.lora_targets!r}", adapters(shapes, learner)
    if other := next((name for name in reached if name not in linear), None):
        raise ConfigError(f"{setting} reaches {other}, which is no linear layer of the student: narrow it")
    if not trained:
        why = "names no linear layer of the student" if not reached else "reaches frozen layers alone"
        raise ConfigError(f"{setting} {why}: see the names in its safetensors, or learner.freeze_vision")
    outside = [n.removesuffix(".lora") for n in trained if not n.startswith(TEXT_LAYER)]
    if outside and learner.publishes_adapters:
        how = "actors adapt the language model's layers alone: narrow it or set learner.lora_publish=merged"
        raise ConfigError(f"{setting} reaches {outside[0]}, but {how}")
