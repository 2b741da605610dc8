"""Facts of a model folder, read without loading the model: checks before anything starts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import ModelError

SUPPORTED = ("qwen3_vl", "qwen2_5_vl")
# transformers 5.19's defaults (configuration_qwen3_vl.py, configuration_qwen2_5_vl.py): folders that older
# versions wrote leave out values that equal them.
_VISION = {"num_heads": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584}
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_vl": _VISION
    | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16}
    | {"num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24)},
    "qwen2_5_vl": _VISION | {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "patch_size": 14},
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class ModelInfo:
    """The facts that a run is planned by."""

    path: str
    model_type: str
    size_multiple: int  # pixels per side of one video token: patch_size * spatial_merge_size
    shapes: dict[str, Any]  # the architecture: what must agree between a checkpoint and a model


def read_model_info(folder: str | Path, trust_remote_code: bool = False) -> ModelInfo:
    """Reads config.json. Raises ModelError if the type is not supported or the model brings its own code."""
    files = Path(folder)
    config = read_json(files / "config.json")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED:
        raise ModelError(f"{folder}: model_type {model_type!r} is not supported; use one of {SUPPORTED}")
    check_attends_to_all(folder, config.get("text_config", config))
    for path in [] if trust_remote_code else sorted(files.glob("*config.json")):
        if read_json(path).get("auto_map"):  # transformers would import Python files of the folder or a hub
            why = f"{path} has an auto_map, which names Python code that comes with the model"
            choice = (
                "remove it to use transformers' own class, or trust that code with trust_remote_code=true"
            )
            raise ModelError(f"{why}: {choice}")
    if not list(files.glob("*.safetensors")):
        pickled = sorted(p.name for p in files.iterdir() if p.name.endswith(_PICKLES))
        why = f", only {pickled[0]}, which could run code when it is read" if pickled else ""
        raise ModelError(f"{folder} has no safetensors weights{why}: download or convert the model first")
    try:
        vision = vision_config(config)
        text = config.get("text_config", config)  # Qwen2.5-VL's first files are flat
        text_keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        shapes = {"model_type": model_type, **{f"text.{k}": text[k] for k in text_keys}}
        shapes |= {f"vision.{k}": vision[k] for k in ("depth", "hidden_size", "patch_size")}
        multiple = vision["patch_size"] * vision["spatial_merge_size"]
    except KeyError as error:
        raise ModelError(f"{folder}/config.json lacks {error}: the model folder is damaged") from error
    return ModelInfo(str(folder), model_type, multiple, shapes)


def check_attends_to_all(folder: str | Path, text: Mapping[str, Any]) -> None:
    """Raises ModelError if layers attend to a window alone: packed trees do not (video_opd/models/trees.py).

    text: of a config.json, or of transformers' configuration.
    """
    num_windowed = text.get("num_hidden_layers", 0) - text.get("max_window_layers", 80)  # 80: transformers'
    if kinds := text.get("layer_types"):
        num_windowed = kinds.count("sliding_attention")
    has_window = text.get("use_sliding_window") and text.get("sliding_window", 4096) is not None
    if has_window and num_windowed > 0:
        why = f"{num_windowed} layers with sliding windows, which are not supported"
        raise ModelError(f"{folder}/config.json has {why}: use a model with use_sliding_window=false")


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision tower's part of a config.json of a supported type, whole. Raises KeyError without one."""
    return _VISION_DEFAULTS[config["model_type"]] | dict(config["vision_config"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except OSError as error:
        why = f"{path} cannot be read ({error.strerror})"
        raise ModelError(f"{why}: name a transformers model folder") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON of a model ({error}): the model folder is damaged") from error
    return value


def _read_tokenizer(folder: str | Path) -> tuple[dict[str, int], dict[str, Any]]:
    """What decides the ids of a text: the vocabulary with added tokens, and the rest. Raises ModelError."""
    tree = read_json(Path(folder) / "tokenizer.json")
    try:
        vocabulary = tree["model"]["vocab"] | {t["content"]: t["id"] for t in tree.get("added_tokens", [])}
        merges = tree["model"].get("merges", [])
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    except (KeyError, TypeError) as error:
        why = f"{folder}/tokenizer.json has no vocabulary ({error!r})"
        raise ModelError(f"{why}: the model folder is damaged") from error
    return vocabulary, {k: tree.get(k) for k in ("normalizer", "pre_tokenizer")} | {"merges": merges}


def check_same_tokenizer(student: str | Path, teacher: str | Path) -> None:
    """Raises ModelError unless both models map every text to the same ids (docs/algorithm.md).

    Compares vocabulary, merges and added tokens, not vocab_size, which only tells how embeddings are padded.
    """
    (ours, our_rest), (theirs, their_rest) = _read_tokenizer(student), _read_tokenizer(teacher)
    tokens = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    examples = ", ".join(f"{t!r}: {ours.get(t)} / {theirs.get(t)}" for t in tokens[:3])
    differ = [f"{len(tokens)} tokens differ ({examples})"] if tokens else []
    differ += [f"{part} differ" for part in our_rest if our_rest[part] != their_rest[part]]
    if differ:
        models = f"student {student} and teacher {teacher} have different tokenizers"
        raise ModelError(f"{models}: {', '.join(differ)}: use a teacher of the same family")
