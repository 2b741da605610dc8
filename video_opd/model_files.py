"""What a model folder says of itself, read without loading the model: checks before anything starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import ModelError

SUPPORTED = ("qwen3_vl",)


@dataclass(frozen=True)
class ModelInfo:
    """The facts of a model folder that the run is planned by."""

    path: str
    model_type: str
    size_multiple: int  # pixels a side of one video token: patch_size * spatial_merge_size
    shapes: dict[str, Any]  # the architecture: what must agree between a checkpoint and a model


def read_model_info(folder: str | Path) -> ModelInfo:
    """Reads config.json. Raises ModelError if the folder is not a model of a supported kind."""
    config = _read_json(Path(folder) / "config.json")
    if config.get("model_type") not in SUPPORTED:
        raise ModelError(f"{folder}: model_type {config.get('model_type')!r} is not supported; use one of {SUPPORTED}")
    if not list(Path(folder).glob("*.safetensors")):
        raise ModelError(f"{folder} has no safetensors weights: download or convert the model first")
    vision, text = config["vision_config"], config["text_config"]
    shapes = {
        "model_type": config["model_type"],
        **{f"text.{k}": text[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        **{f"vision.{k}": vision[k] for k in ("depth", "hidden_size", "patch_size")},
    }
    multiple = vision["patch_size"] * vision["spatial_merge_size"]
    return ModelInfo(str(folder), config["model_type"], multiple, shapes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): name a transformers model folder") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): the model folder is damaged") from error


def check_same_tokenizer(student: str | Path, teacher: str | Path) -> None:
    """Token-level KL needs both models to map the same text to the same ids (ALGORITHM.md section 5).

    Compares vocabulary, merges and added tokens, never vocab_size, which only says how far embeddings are padded.
    """
    ours, theirs = (_read_json(Path(folder) / "tokenizer.json") for folder in (student, teacher))
    added_ours, added_theirs = ({t["content"]: t["id"] for t in j.get("added_tokens", [])} for j in (ours, theirs))
    vocabulary_ours, vocabulary_theirs = ours["model"]["vocab"] | added_ours, theirs["model"]["vocab"] | added_theirs
    different = {t for t in vocabulary_ours.keys() | vocabulary_theirs.keys() if vocabulary_ours.get(t) != vocabulary_theirs.get(t)}
    if different:
        examples = ", ".join(f"{t!r}: {vocabulary_ours.get(t)} / {vocabulary_theirs.get(t)}" for t in sorted(different)[:3])
        raise ModelError(
            f"student {student} and teacher {teacher} have different tokenizers: {len(different)} tokens differ "
            f"({examples}); use a teacher of the same family"
        )
    for part in ("pre_tokenizer", "normalizer"):
        if ours.get(part) != theirs.get(part):
            raise ModelError(f"student {student} and teacher {teacher} differ in their {part}: use a teacher of the same family")
    if ours["model"].get("merges") != theirs["model"].get("merges"):
        raise ModelError(f"student {student} and teacher {teacher} have different merges: use a teacher of the same family")
