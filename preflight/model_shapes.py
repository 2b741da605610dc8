"""Every parameter of a Qwen-VL model, from its config.json alone; memory is planned from them.

By formula, since importing transformers' classes takes 2 CPU seconds and 140 MiB of every driver.
tests/preflight/test_memory.py compares each name and shape with those classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from video_opd.errors import ModelError
from video_opd.models.model_files import SUPPORTED, read_json

Parameters = dict[str, tuple[int, ...]]
"""Parameter name in transformers -> shape. A tied head is not listed."""


@dataclass(frozen=True, kw_only=True)
class TextShapes:
    """The language model."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    head_dim: int
    query: int  # width of all query heads together
    key: int  # width of all key heads together, and of all value heads
    tied_head: bool


@dataclass(frozen=True, kw_only=True)
class VisionShapes:
    """The vision tower and its mergers."""

    depth: int
    hidden: int
    intermediate: int
    output: int  # width of what the language model gets
    patch: tuple[int, int, int, int]  # channels, frames, height, width
    merge: int  # patches a side of one video token
    positions: int  # learnt position embeddings; 0: none
    deepstack: int  # further outputs, each with a merger of its own

    @property
    def patch_values(self) -> int:
        """Pixel values of one patch."""
        return prod(self.patch)

    @property
    def patches_a_token(self) -> int:
        return self.merge**2


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """What the memory of a model depends on."""

    name: str  # base name of its folder
    model_type: str
    committed: bool  # from configs/shapes, as there is no model folder
    text: TextShapes
    vision: VisionShapes

    @property
    def is_qwen3(self) -> bool:
        return self.model_type == "qwen3_vl"

    @property
    def size_multiple(self) -> int:
        """Pixels a side of one video token."""
        return self.vision.patch[-1] * self.vision.merge


def find_shapes(folder: str | Path, committed: Path) -> ModelShapes:
    """The shapes of a model folder; if it does not exist, of `committed`/NAME.json. Raises ModelError."""
    folder = Path(folder)
    if folder.exists():
        return read_shapes(folder)
    path = committed / f"{folder.name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in committed.glob("*.json")))
        raise ModelError(
            f"{folder} does not exist, and it is none of the models with committed shapes ({known}): "
            "name a model folder or one of these"
        )
    return parse_shapes(read_json(path), folder.name, str(path), committed=True)


def read_shapes(folder: str | Path) -> ModelShapes:
    """The shapes in a model folder's config.json. Raises ModelError."""
    path = Path(folder) / "config.json"
    return parse_shapes(read_json(path), Path(folder).name, str(path))


def parse_shapes(config: Mapping[str, Any], name: str, source: str, committed: bool = False) -> ModelShapes:
    """Shapes in a config.json, the language model's keys at its top (older Qwen2.5-VL) or in text_config.

    `source` names the file in errors. Raises ModelError.
    """
    try:
        if (model_type := config["model_type"]) not in SUPPORTED:
            raise ModelError(f"{source}: model_type {model_type!r} is not supported; use one of {SUPPORTED}")
        text, vision = config.get("text_config", config), config["vision_config"]
        heads, side = text["num_attention_heads"], vision["patch_size"]
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        channels = vision.get("in_channels", vision.get("in_chans", 3))
        return ModelShapes(
            name=name,
            model_type=model_type,
            committed=committed,
            text=TextShapes(
                vocab_size=text["vocab_size"],
                hidden=text["hidden_size"],
                intermediate=text["intermediate_size"],
                layers=text["num_hidden_layers"],
                head_dim=head_dim,
                query=heads * head_dim,
                key=text["num_key_value_heads"] * head_dim,
                tied_head=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            ),
            vision=VisionShapes(
                depth=vision["depth"],
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                output=vision["out_hidden_size"],
                patch=(channels, vision.get("temporal_patch_size", 2), side, side),
                merge=vision["spatial_merge_size"],
                positions=vision.get("num_position_embeddings", 0),
                deepstack=len(vision.get("deepstack_visual_indexes", ())),
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source} lacks {error}: the model folder is damaged") from error


@cache
def parameters(shapes: ModelShapes) -> Parameters:
    """Every parameter of the model, vision tower first."""
    tower = _vision(shapes.vision, shapes.is_qwen3)
    return _under("model.visual", tower) | _text(shapes.text, shapes.is_qwen3)


def count(of: Parameters) -> int:
    """Numbers in all of them."""
    return sum(prod(shape) for shape in of.values())


def _under(prefix: str, of: Parameters) -> Parameters:
    return {f"{prefix}.{name}": shape for name, shape in of.items()}


def _repeated(prefix: str, times: int, of: Parameters) -> Parameters:
    return {f"{prefix}.{i}.{name}": shape for i in range(times) for name, shape in of.items()}


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Parameters:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name: str, width: int, bias: bool = False) -> Parameters:
    return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {})


def _gated_mlp(hidden: int, intermediate: int, bias: bool) -> Parameters:
    mlp = _linear("gate_proj", hidden, intermediate, bias) | _linear("up_proj", hidden, intermediate, bias)
    return _under("mlp", mlp | _linear("down_proj", intermediate, hidden, bias))


def _text(t: TextShapes, qwen3: bool) -> Parameters:
    """Qwen3 normalises queries and keys of each head; Qwen2.5 has biases on them instead."""
    layer = _gated_mlp(t.hidden, t.intermediate, bias=False)
    for part, width in (("q", t.query), ("k", t.key), ("v", t.key)):
        layer |= _linear(f"self_attn.{part}_proj", t.hidden, width, bias=not qwen3)
    layer |= _linear("self_attn.o_proj", t.query, t.hidden, bias=False)
    if qwen3:
        layer |= _norm("self_attn.q_norm", t.head_dim) | _norm("self_attn.k_norm", t.head_dim)
    layer |= _norm("input_layernorm", t.hidden) | _norm("post_attention_layernorm", t.hidden)
    model = {"embed_tokens.weight": (t.vocab_size, t.hidden)} | _norm("norm", t.hidden)
    head = {} if t.tied_head else {"lm_head.weight": (t.vocab_size, t.hidden)}
    return _under("model.language_model", model | _repeated("layers", t.layers, layer)) | head


def _vision(v: VisionShapes, qwen3: bool) -> Parameters:
    """Qwen2.5's tower has a gated MLP, norms without biases, one merger and no learnt positions."""
    block = _linear("attn.qkv", v.hidden, 3 * v.hidden) | _linear("attn.proj", v.hidden, v.hidden)
    block |= _norm("norm1", v.hidden, bias=qwen3) | _norm("norm2", v.hidden, bias=qwen3)
    merged = v.hidden * v.patches_a_token
    tower: Parameters = {"patch_embed.proj.weight": (v.hidden, *v.patch)}
    if not qwen3:
        tower |= _norm("merger.ln_q", v.hidden) | _linear("merger.mlp.0", merged, merged)
        tower |= _linear("merger.mlp.2", merged, v.output)
        return tower | _repeated("blocks", v.depth, block | _gated_mlp(v.hidden, v.intermediate, bias=True))
    block |= _linear("mlp.linear_fc1", v.hidden, v.intermediate)
    block |= _linear("mlp.linear_fc2", v.intermediate, v.hidden)
    merger = _linear("linear_fc1", merged, merged) | _linear("linear_fc2", merged, v.output)
    tower |= {"patch_embed.proj.bias": (v.hidden,), "pos_embed.weight": (v.positions, v.hidden)}
    tower |= _under("merger", merger | _norm("norm", v.hidden, bias=True))
    tower |= _repeated("deepstack_merger_list", v.deepstack, merger | _norm("norm", merged, bias=True))
    return tower | _repeated("blocks", v.depth, block)
