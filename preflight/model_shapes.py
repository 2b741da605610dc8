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

from preflight.quantization import Quantization, read_quantization
from video_opd.errors import ModelError
from video_opd.hub import model_name
from video_opd.models.model_files import SUPPORTED, read_json, vision_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

VOCAB_PADDING = 64  # of vLLM's VocabParallelEmbedding
WINDOW_PIXELS = {"qwen2_5_vl": 112, "qwen3_vl": 0}  # defaults in transformers' vision configs; 0: no windows
FULL_BLOCKS = (7, 15, 23, 31)  # without windows, in Qwen2.5-VL

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

    @property
    def heads(self) -> int:
        return self.query // self.head_dim

    @property
    def key_heads(self) -> int:
        return self.key // self.head_dim


@dataclass(frozen=True, kw_only=True)
class VisionShapes:
    """The vision tower and its mergers."""

    depth: int
    hidden: int
    intermediate: int
    heads: int
    output: int  # width of what the language model gets
    patch: tuple[int, int, int, int]  # channels, frames, height, width
    merge: int  # patches a side of one video token
    positions: int  # learnt position embeddings; 0: none
    deepstack: int  # further outputs, each with a merger of its own
    window: int  # patches a side that attend to each other; 0: all of a frame pair, as in full_blocks
    full_blocks: int

    @property
    def patches_a_token(self) -> int:
        return self.merge**2

    @property
    def values_a_token(self) -> int:
        """Pixel values of one video token."""
        return self.patches_a_token * prod(self.patch)


@dataclass(frozen=True)
class ModelShapes:
    """What the memory of a model depends on."""

    name: str  # base name of its folder
    model_type: str
    committed: bool  # from configs/shapes, as there is no model folder
    text: TextShapes
    vision: VisionShapes
    fp8: Quantization | None = None

    @property
    def is_qwen3(self) -> bool:
        return self.model_type == "qwen3_vl"

    @property
    def size_multiple(self) -> int:
        """Pixels a side of one video token."""
        return self.vision.patch[-1] * self.vision.merge


def find_shapes(folder: str | Path, committed: Path) -> ModelShapes:
    """The shapes of a model folder; if it does not exist, of `committed`/NAME.json. Raises ModelError.

    X-GRPO has the shapes of X-Instruct, from which it was trained."""
    folder, name = Path(folder), model_name(folder)
    if folder.exists():
        return read_shapes(folder)
    path = committed / f"{name.replace('-GRPO', '-Instruct')}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in committed.glob("*.json")))
        why = f"does not exist, and it is none of the models with committed shapes ({known})"
        raise ModelError(f"{folder} {why}: name a model folder or one of these")
    return parse_shapes(read_json(path), name, str(path), committed=True)


def read_shapes(folder: str | Path) -> ModelShapes:
    """The shapes in a model folder's config.json. Raises ModelError."""
    path = Path(folder) / "config.json"
    return parse_shapes(read_json(path), model_name(folder), str(path))


def parse_shapes(config: Mapping[str, Any], name: str, source: str, committed: bool = False) -> ModelShapes:
    """Shapes in a config.json; `source` names it in errors. Raises ModelError.

    The language model's keys are at its top (older Qwen2.5-VL) or in text_config."""
    try:
        if (model_type := config["model_type"]) not in SUPPORTED:
            raise ModelError(f"{source}: model_type {model_type!r} is not supported; use one of {SUPPORTED}")
        text, vision = config.get("text_config", config), vision_config(config)
        heads, side = text["num_attention_heads"], vision["patch_size"]
        merge = vision["spatial_merge_size"]
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        channels = vision.get("in_channels", vision.get("in_chans", 3))
        text_shapes = TextShapes(
            vocab_size=text["vocab_size"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            head_dim=head_dim,
            query=heads * head_dim,
            key=text["num_key_value_heads"] * head_dim,
            tied_head=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        )
        vision_shapes = VisionShapes(
            depth=vision["depth"],
            hidden=vision["hidden_size"],
            intermediate=vision["intermediate_size"],
            heads=vision["num_heads"],
            output=vision["out_hidden_size"],
            patch=(channels, vision.get("temporal_patch_size", 2), side, side),
            merge=merge,
            positions=vision.get("num_position_embeddings", 0),
            deepstack=len(vision.get("deepstack_visual_indexes", ())),
            window=vision.get("window_size", WINDOW_PIXELS[model_type]) // (side * merge) * merge,
            full_blocks=sum(i < vision["depth"] for i in vision.get("fullatt_block_indexes", FULL_BLOCKS)),
        )
        fp8 = read_quantization(config, source)
        return ModelShapes(name, model_type, committed, text_shapes, vision_shapes, fp8)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(f"{source} lacks {error}: the model folder is damaged") from error


@cache
def parameters(shapes: ModelShapes) -> Parameters:
    """Every parameter of the model."""
    tower = _vision(shapes.vision, shapes.is_qwen3)
    return _under("model.visual", tower) | _text(shapes.text, shapes.is_qwen3)


def model_bytes(shapes: ModelShapes, e: int, part: str = "") -> int:
    """Bytes of the weights as an engine holds them: e a number, but about one where a folder has FP8.

    part: of the parameters whose names start so."""
    of, fp8 = {n: s for n, s in parameters(shapes).items() if n.startswith(part)}, shapes.fp8
    converted = {n: s for n, s in of.items() if fp8 and fp8.converts(n, s)}
    rest = e * (count(of) - count(converted))
    return rest + sum(fp8.num_bytes(s) for s in converted.values()) if fp8 else rest


def can_shard(shapes: ModelShapes, shards: int) -> bool:
    """Whether vLLM can divide the model: it needs as many heads, and rows of each layer, in every shard.

    Key heads may also be copied (vllm/model_executor/layers/linear.py, QKVParallelLinear). A shard has whole
    blocks of FP8 scales (validate_fp8_block_shape in layers/quantization/utils/fp8_utils.py)."""
    text, vision = shapes.text, shapes.vision
    vocabulary = -(-text.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
    whole = (text.heads, vision.heads, text.intermediate, vision.intermediate, vocabulary)
    if any(size % shards for size in whole) or (text.key_heads % shards and shards % text.key_heads):
        return False
    block = (shapes.fp8 and shapes.fp8.block) or (1, 1)
    widths = (text.query // shards, text.head_dim, text.intermediate // shards)
    return all(width % side == 0 for width in widths for side in block)


def count(of: Parameters) -> int:
    """Numbers in all of them."""
    return sum(prod(shape) for shape in of.values())


def _under(prefix: str, of: Parameters) -> Parameters:
    return {f"{prefix}.{name}": shape for name, shape in of.items()}


def _repeated(prefix: str, times: int, of: Parameters) -> Parameters:
    return {f"{prefix}.{i}.{name}": shape for i in range(times) for name, shape in of.items()}


def _modules(weights: Parameters, bias: bool) -> Parameters:
    """The weight, and with `bias` also the bias, of modules whose weights have these shapes."""
    biases = {f"{name}.bias": shape[:1] for name, shape in weights.items()} if bias else {}
    return {f"{name}.weight": shape for name, shape in weights.items()} | biases


def _gated_mlp(hidden: int, intermediate: int) -> Parameters:
    up, down = (intermediate, hidden), (hidden, intermediate)
    return {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}


def _text(t: TextShapes, qwen3: bool) -> Parameters:
    """Qwen3 normalises queries and keys of each head; Qwen2.5 has biases on them instead."""
    norms = {"input_layernorm": (t.hidden,), "post_attention_layernorm": (t.hidden,)}
    if qwen3:
        norms |= {"self_attn.q_norm": (t.head_dim,), "self_attn.k_norm": (t.head_dim,)}
    widths = {"q": t.query, "k": t.key, "v": t.key}
    inputs: Parameters = {f"self_attn.{name}_proj": (width, t.hidden) for name, width in widths.items()}
    output: Parameters = {"self_attn.o_proj": (t.hidden, t.query)}
    layer = _modules(_gated_mlp(t.hidden, t.intermediate) | output | norms, bias=False)
    layers = _repeated("layers", t.layers, layer | _modules(inputs, bias=not qwen3))
    model = {"embed_tokens.weight": (t.vocab_size, t.hidden), "norm.weight": (t.hidden,)}
    head = {} if t.tied_head else {"lm_head.weight": (t.vocab_size, t.hidden)}
    return _under("model.language_model", model | layers) | head


def _vision(v: VisionShapes, qwen3: bool) -> Parameters:
    """Qwen2.5's tower has a gated MLP, norms without biases, one merger and no learnt positions."""
    h, i, merged = v.hidden, v.intermediate, v.hidden * v.patches_a_token
    block: Parameters = {"attn.qkv": (3 * h, h), "attn.proj": (h, h)}
    norms: Parameters = {"norm1": (h,), "norm2": (h,)}
    tower: Parameters = {"patch_embed.proj.weight": (h, *v.patch)}
    if qwen3:
        block |= {"mlp.linear_fc1": (i, h), "mlp.linear_fc2": (h, i)}
        merger: Parameters = {"linear_fc1": (merged, merged), "linear_fc2": (v.output, merged)}
        deepstack = _modules(merger | {"norm": (merged,)}, bias=True)
        tower |= {"patch_embed.proj.bias": (h,), "pos_embed.weight": (v.positions, h)}
        tower |= _under("merger", _modules(merger | {"norm": (h,)}, bias=True))
        tower |= _repeated("deepstack_merger_list", v.deepstack, deepstack)
    else:
        block |= _gated_mlp(h, i)
        tower |= {"merger.ln_q.weight": (h,)}
        tower |= _modules({"merger.mlp.0": (merged, merged), "merger.mlp.2": (v.output, merged)}, bias=True)
    return tower | _repeated("blocks", v.depth, _modules(block, bias=True) | _modules(norms, bias=qwen3))
