"""What a model folder says of itself, read without loading the model: checks before anything starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import ModelError

SUPPORTED = ("qwen3_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class ModelInfo:
    """The facts of a model folder that the run is planned by."""

    path: str
    model_type: str
    size_multiple: int  # pixels a side of one video token: patch_size * spatial_merge_size
    shapes: dict[str, Any]  # the architecture: what must agree between a checkpoint and a model


def read_model_info(folder: str | Path, trust_remote_code: bool = False) -> ModelInfo:
    """Reads config.json. Raises ModelError if the folder is not a model of a supported kind, or asks to have its code run."""
    config = read_json(Path(folder) / "config.json")
    if config.get("model_type") not in SUPPORTED:
        raise ModelError(
            f"{folder}: model_type {config.get('model_type')!r} is not supported; use one of {SUPPORTED}"
        )
    if not trust_remote_code:
        _check_no_code(Path(folder))
    if not list(Path(folder).glob("*.safetensors")):
        pickled = sorted(
            p.name for p in Path(folder).iterdir() if p.name.endswith((".bin", ".pt", ".pth", ".ckpt"))
        )
        why = f", only {pickled[0]}, which could run code when it is read" if pickled else ""
        raise ModelError(f"{folder} has no safetensors weights{why}: download or convert the model first")
    try:
        vision, text = (
            config["vision_config"],
            config.get("text_config", config),
        )  # Qwen2.5-VL's first files are flat
        shapes = {
            "model_type": config["model_type"],
            **{
                f"text.{k}": text[k]
                for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
            },
            **{f"vision.{k}": vision[k] for k in ("depth", "hidden_size", "patch_size")},
        }
        multiple = vision["patch_size"] * vision["spatial_merge_size"]
    except KeyError as error:
        raise ModelError(f"{folder}/config.json lacks {error}: the model folder is damaged") from error
    return ModelInfo(str(folder), config["model_type"], multiple, shapes)


def _check_no_code(folder: Path) -> None:
    """Raises ModelError where transformers would be asked to import Python files of the folder, or of a hub."""
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith("config.json") and read_json(path).get("auto_map"):
            raise ModelError(
                f"{path} has an auto_map, which names Python code that comes with the model: take it out to have transformers' own "
                "class, or set trust_remote_code=true if you trust that code"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}): name a transformers model folder"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): the model folder is damaged") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object: the model folder is damaged")
    return value


@dataclass(frozen=True)
class _Tokenizer:
    """What decides which ids a text gets."""

    vocabulary: dict[str, int]  # added tokens included
    merges: list[tuple[str, ...]]
    rest: dict[str, Any]


def _read_tokenizer(folder: str | Path) -> _Tokenizer:
    tree = read_json(Path(folder) / "tokenizer.json")
    try:
        vocabulary = tree["model"]["vocab"] | {t["content"]: t["id"] for t in tree.get("added_tokens", [])}
        merges = [
            tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in tree["model"].get("merges", [])
        ]
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}/tokenizer.json has no vocabulary ({error!r}): the model folder is damaged"
        ) from error
    return _Tokenizer(vocabulary, merges, {k: tree.get(k) for k in ("normalizer", "pre_tokenizer")})


def check_same_tokenizer(student: str | Path, teacher: str | Path) -> None:
    """Token-level KL needs both models to map the same text to the same ids (ALGORITHM.md section 5).

    Compares vocabulary, merges and added tokens, never vocab_size, which only says how far embeddings are padded.
    """
    ours, theirs = _read_tokenizer(student), _read_tokenizer(teacher)
    models = f"student {student} and teacher {teacher}"
    tokens = ours.vocabulary.keys() | theirs.vocabulary.keys()
    different = sorted(t for t in tokens if ours.vocabulary.get(t) != theirs.vocabulary.get(t))
    if different:
        examples = ", ".join(
            f"{t!r}: {ours.vocabulary.get(t)} / {theirs.vocabulary.get(t)}" for t in different[:3]
        )
        raise ModelError(
            f"{models} have different tokenizers: {len(different)} tokens differ ({examples}); use a teacher of the same family"
        )
    parts = [k for k in ours.rest if ours.rest[k] != theirs.rest[k]] + (
        ["merges"] if ours.merges != theirs.merges else []
    )
    if parts:
        raise ModelError(
            f"{models} have tokenizers with different {' and '.join(parts)}: use a teacher of the same family"
        )
