"""What a GPU can do at most, and which shares of it a plan of seconds assumes."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Operations (FLOP) a second without sparsity, and bytes a second. Links: one direction."""

    bfloat16: float
    float32: float
    fp8: float  # that of bfloat16 where vLLM computes with FP8 weights in it
    memory: float
    link: float  # to the GPUs of its node
    pcie: float  # to its host
    memory_gib: float


# NVIDIA's datasheets, of the variants with NVLink (SXM): "NVIDIA A100 Tensor Core GPU" (80GB), "NVIDIA H100
# Tensor Core GPU", "NVIDIA H200 Tensor Core GPU", "NVIDIA L40S". They give links in both directions together,
# and operations of H100 and H200 with sparsity: both are halved here. The L40S has no NVLink.
DEVICES = {
    "a100": Device(312e12, 19.5e12, 312e12, 2.039e12, 300e9, 32e9, 80),
    "h100": Device(989e12, 67e12, 1979e12, 3.35e12, 450e9, 64e9, 80),
    "h200": Device(989e12, 67e12, 1979e12, 4.8e12, 450e9, 64e9, 139),
    "l40s": Device(362e12, 91.6e12, 733e12, 0.864e12, 32e9, 32e9, 44),
}
DEFAULT = "h100"  # of 80 GB, as the plan of memory
OTHER_VARIANTS = {"pcie", "nvl", "mig"}  # in names of slower ones, and of parts of one


@dataclass(frozen=True)
class Utilisation:
    """The share that is reached of a device's operations a second, and of its bytes a second."""

    prefill: float = 0.5
    training: float = 0.35
    bandwidth: float = 0.6  # of memory and links


def device_name(gpu: str) -> str | None:
    """The key in DEVICES of a GPU as its driver or torch names it; None: it is not in the table."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return None if OTHER_VARIANTS & {*words} else next((w for w in words if w in DEVICES), None)
