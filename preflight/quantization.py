"""Quantized model folders: what FP8 weights take, and which engine can load them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from video_opd.errors import ModelError

SCALE_BYTES = 4  # vLLM keeps float32 scales (layers/quantization/utils/fp8_utils.py)
NEVER_CONVERTED = ("embed_tokens", "pos_embed", "lm_head")  # vLLM converts only its LinearBase


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Linear weights in FP8, as vLLM's methods `fp8` and `compressed-tensors` load them."""

    block: tuple[int, int] | None  # rows and columns that share a scale; None: a row or the whole weight
    kept: tuple[str, ...]  # modules that stay in the role's dtype; "re:..." is a regular expression

    def converts(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a parameter is in FP8."""
        module, _, kind = name.removeprefix("model.").rpartition(".")
        is_linear = kind == "weight" and len(shape) == 2 and not module.endswith(NEVER_CONVERTED)
        return is_linear and not any(_covers(kept, module) for kept in self.kept)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """One byte a weight, and its scales."""
        rows, columns = self.block or (1, shape[1])
        return prod(shape) + SCALE_BYTES * ceil(shape[0] / rows) * ceil(shape[1] / columns)


def _covers(kept: str, module: str) -> bool:
    """Names have "model." in front or not, by the version of transformers that wrote them."""
    if kept.startswith("re:"):
        return any(re.match(kept[3:], name) for name in (module, f"model.{module}"))
    return f"{module}.".startswith(kept.removeprefix("model.") + ".")


def read_quantization(config: Mapping[str, Any], source: str) -> Quantization | None:
    """What config.json says of quantized weights; None: they are not. Raises ModelError.

    FP8 comes as quant_method `fp8`, or as `compressed-tensors` whose weights are all of 8-bit floats."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    method, kept = found.get("quant_method"), found.get("modules_to_not_convert") or found.get("ignore")
    weights = [group.get("weights") or {} for group in (found.get("config_groups") or {}).values()]
    if method == "fp8":
        block = found.get("weight_block_size")
    elif method == "compressed-tensors" and weights and all(map(_is_fp8, weights)):
        block = weights[0].get("block_structure") if weights[0].get("strategy") == "block" else None
        block = [int(side) for side in re.findall(r"\d+", str(block))] if block else None  # also "128x128"
    else:
        raise ModelError(f"{source}: weights quantized by {method!r} are not supported: use FP8 or bfloat16")
    return Quantization(block=(block[0], block[1]) if block else None, kept=tuple(kept or ()))


def _is_fp8(weights: Mapping[str, Any]) -> bool:
    return (weights.get("num_bits"), weights.get("type")) == (8, "float")
