"""Every parameter of a Qwen-VL model, from its config.json alone: what memory is planned by."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from video_opd.errors import ModelError
from video_opd.models.model_files import read_json

KINDS = ("qwen3_vl", "qwen2_5_vl")
Parameters = dict[str, tuple[int, ...]]
"""Parameter name, as transformers has it -> shape. Tied heads are not there twice."""


@dataclass(frozen=True, kw_only=True)
class TextShapes:
    """The language model."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied_head: bool

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class VisionShapes:
    """The vision tower and its mergers."""

    depth: int
    hidden: int
    intermediate: int
    output: int  # width of what it hands to the language model
    patch_size: int
    merge: int  # patches a side of one video token
    temporal_patch: int  # frames of one video token
    channels: int
    positions: int  # learnt position embeddings; 0: none
    deepstack: int  # further outputs, each with a merger of its own

    @property
    def patch_values(self) -> int:
        """Pixel values of one patch."""
        return self.channels * self.temporal_patch * self.patch_size**2

    @property
    def patches_a_token(self) -> int:
        return self.merge**2


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """What the memory of a model depends on."""

    name: str  # base name of its folder
    model_type: str
    committed: bool  # the shapes are the copy in configs/shapes: there was no model folder
    text: TextShapes
    vision: VisionShapes

    @property
    def size_multiple(self) -> int:
        """Pixels a side of one video token."""
        return self.vision.patch_size * self.vision.merge


def find_shapes(folder: str | Path, committed: Path) -> ModelShapes:
    """The shapes of a model folder; where there is none, of `committed`/NAME.json of the same name. Raises ModelError."""
    folder = Path(folder)
    if folder.exists():
        return read_shapes(folder)
    path = committed / f"{folder.name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in committed.glob("*.json")))
        raise ModelError(
            f"{folder} does not exist, and shapes are known of {known} alone: name a model folder or one of these"
        )
    return parse_shapes(read_json(path), folder.name, str(path), committed=True)


def read_shapes(folder: str | Path) -> ModelShapes:
    """The shapes in a model folder's config.json. Raises ModelError."""
    path = Path(folder) / "config.json"
    return parse_shapes(read_json(path), Path(folder).name, str(path))


def parse_shapes(config: Mapping[str, Any], name: str, source: str, committed: bool = False) -> ModelShapes:
    """Shapes of a config.json's tree, the language model's keys at its top (older Qwen2.5-VL) or in text_config.

    `source` names the file in errors. Raises ModelError.
    """
    try:
        if config["model_type"] not in KINDS:
            raise ModelError(
                f"{source}: no shapes are known of model_type {config['model_type']!r}; use one of {KINDS}"
            )
        text, vision = config.get("text_config", config), config["vision_config"]
        heads = text["num_attention_heads"]
        return ModelShapes(
            name=name,
            model_type=config["model_type"],
            committed=committed,
            text=TextShapes(
                vocab_size=text["vocab_size"],
                hidden=text["hidden_size"],
                intermediate=text["intermediate_size"],
                layers=text["num_hidden_layers"],
                heads=heads,
                kv_heads=text["num_key_value_heads"],
                head_dim=text.get("head_dim") or text["hidden_size"] // heads,
                tied_head=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            ),
            vision=VisionShapes(
                depth=vision["depth"],
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                output=vision["out_hidden_size"],
                patch_size=vision["patch_size"],
                merge=vision["spatial_merge_size"],
                temporal_patch=vision.get("temporal_patch_size", 2),
                channels=vision.get("in_channels", vision.get("in_chans", 3)),
                positions=vision.get("num_position_embeddings", 0),
                deepstack=len(vision.get("deepstack_visual_indexes", ())),
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source} lacks {error}: the model folder is damaged") from error


def parameters(shapes: ModelShapes) -> Parameters:
    """Every parameter of the model, vision tower first."""
    tower = (
        _qwen3_vision(shapes.vision) if shapes.model_type == "qwen3_vl" else _qwen2_5_vision(shapes.vision)
    )
    return {f"model.visual.{n}": s for n, s in tower.items()} | _text(
        shapes.text, shapes.model_type == "qwen3_vl"
    )


def count(of: Parameters) -> int:
    """Numbers in all of them."""
    return sum(prod(shape) for shape in of.values())


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Parameters:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _layer_norm(name: str, width: int) -> Parameters:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _text(t: TextShapes, qwen3: bool) -> Parameters:
    """Qwen3 normalises queries and keys by head; Qwen2.5 has biases on them instead."""
    model = "model.language_model"
    all_of: Parameters = {f"{model}.embed_tokens.weight": (t.vocab_size, t.hidden)}
    for i in range(t.layers):
        layer = f"{model}.layers.{i}"
        for part, width in (("q", t.query), ("k", t.key), ("v", t.key)):
            all_of |= _linear(f"{layer}.self_attn.{part}_proj", t.hidden, width, bias=not qwen3)
        all_of |= _linear(f"{layer}.self_attn.o_proj", t.query, t.hidden, bias=False)
        if qwen3:
            all_of |= {f"{layer}.self_attn.{part}_norm.weight": (t.head_dim,) for part in "qk"}
        for part in ("gate", "up"):
            all_of |= _linear(f"{layer}.mlp.{part}_proj", t.hidden, t.intermediate, bias=False)
        all_of |= _linear(f"{layer}.mlp.down_proj", t.intermediate, t.hidden, bias=False)
        all_of |= {f"{layer}.{norm}_layernorm.weight": (t.hidden,) for norm in ("input", "post_attention")}
    all_of |= {f"{model}.norm.weight": (t.hidden,)}
    return all_of if t.tied_head else all_of | {"lm_head.weight": (t.vocab_size, t.hidden)}


def _qwen3_vision(v: VisionShapes) -> Parameters:
    patch = (v.hidden, v.channels, v.temporal_patch, v.patch_size, v.patch_size)
    tower: Parameters = {"patch_embed.proj.weight": patch, "patch_embed.proj.bias": (v.hidden,)}
    tower |= {"pos_embed.weight": (v.positions, v.hidden)}
    for i in range(v.depth):
        block = f"blocks.{i}"
        tower |= _layer_norm(f"{block}.norm1", v.hidden) | _layer_norm(f"{block}.norm2", v.hidden)
        tower |= _linear(f"{block}.attn.qkv", v.hidden, 3 * v.hidden) | _linear(
            f"{block}.attn.proj", v.hidden, v.hidden
        )
        tower |= _linear(f"{block}.mlp.linear_fc1", v.hidden, v.intermediate)
        tower |= _linear(f"{block}.mlp.linear_fc2", v.intermediate, v.hidden)
    merged = v.hidden * v.patches_a_token
    mergers = {"merger": v.hidden} | {f"deepstack_merger_list.{i}": merged for i in range(v.deepstack)}
    for name, normalised in mergers.items():
        tower |= _layer_norm(f"{name}.norm", normalised)
        tower |= _linear(f"{name}.linear_fc1", merged, merged) | _linear(
            f"{name}.linear_fc2", merged, v.output
        )
    return tower


def _qwen2_5_vision(v: VisionShapes) -> Parameters:
    tower: Parameters = {
        "patch_embed.proj.weight": (v.hidden, v.channels, v.temporal_patch, v.patch_size, v.patch_size)
    }
    for i in range(v.depth):
        block = f"blocks.{i}"
        tower |= {f"{block}.{norm}.weight": (v.hidden,) for norm in ("norm1", "norm2")}
        tower |= _linear(f"{block}.attn.qkv", v.hidden, 3 * v.hidden) | _linear(
            f"{block}.attn.proj", v.hidden, v.hidden
        )
        for part in ("gate", "up"):
            tower |= _linear(f"{block}.mlp.{part}_proj", v.hidden, v.intermediate)
        tower |= _linear(f"{block}.mlp.down_proj", v.intermediate, v.hidden)
    merged = v.hidden * v.patches_a_token
    tower |= {"merger.ln_q.weight": (v.hidden,)}
    return tower | _linear("merger.mlp.0", merged, merged) | _linear("merger.mlp.2", merged, v.output)
