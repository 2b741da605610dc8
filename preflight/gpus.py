"""The GPUs of a machine, as its driver describes them."""

import ctypes
import math
import runpy
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi describes it."""

    name: str
    memory_bytes: int
    driver: str
    capability: float = math.inf  # unknown: a driver that does not say it is too old anyway


@dataclass(frozen=True)
class Machine:
    """The GPUs of a machine, and what its PyTorch needs."""

    gpus: tuple[Gpu, ...]
    driver_cuda: int  # newest version that the driver runs: 13000 for 13.0; 0: unknown
    torch_cuda: str | None  # PyTorch is built for it; None: for CPUs

    @property
    def best(self) -> Gpu:
        """The one that counts: a second one may only drive a display."""
        return max(self.gpus, key=lambda gpu: (gpu.memory_bytes, gpu.capability))


def read_machine() -> Machine:
    """This machine; without GPUs where there is no nvidia-smi. Imports no torch, starts nothing on a GPU."""
    gpus = _read_gpus("name,memory.total,driver_version,compute_cap")
    gpus = gpus or _read_gpus("name,memory.total,driver_version")  # drivers before 510 refuse compute_cap
    torch = find_spec("torch")
    version = Path(torch.origin).with_name("version.py") if gpus and torch and torch.origin else None
    return Machine(gpus, _driver_cuda(), runpy.run_path(str(version))["cuda"] if version else None)


def _read_gpus(fields: str) -> tuple[Gpu, ...]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[part.strip() for part in line.split(",")] for line in lines.splitlines() if line.strip()]
    return tuple(
        Gpu(name, int(mib) << 20, driver, *map(float, capability))
        for name, mib, driver, *capability in rows
        if mib.isdecimal()  # [N/A]: a GPU without memory of its own
    )


def _driver_cuda() -> int:
    """What libcuda says, which may be newer than the driver: a compatibility package counts."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value
