"""What an attention implementation needs on the node that computes it."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from video_opd.config_data import Attention

# As transformers 5.19 asks (utils/import_utils.py): module, distribution. Without them it would fetch a
# kernel from the Hugging Face hub and run it, if the package `kernels` is installed.
PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
LEAST_FLASH_2 = (2, 3, 3)


def missing_for(attention: Attention) -> str | None:
    """The distribution that this machine lacks for it; None: it has all."""
    if attention not in PACKAGES:
        return None
    module, distribution = PACKAGES[attention]
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return distribution
    if attention == "flash_attention_2" and _numbers(found) < LEAST_FLASH_2:
        return f"{distribution}>={'.'.join(map(str, LEAST_FLASH_2))}"
    return None if find_spec(module) else distribution


def _numbers(release: str) -> tuple[int, ...]:
    """2.8.0.post2 -> (2, 8, 0)."""
    return tuple(int(part) for part in release.split(".")[:3] if part.isdigit())
