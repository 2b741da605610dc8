"""Whether the GPUs of each machine can run this: driver, compute capability, memory."""

import ctypes
import runpy
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from video_opd.errors import ClusterError
from video_opd.logs import log

if TYPE_CHECKING:
    from preflight.memory_fit import MemoryPlan

ANSWER_TIMEOUT_S = 120.0
# By the major version of CUDA that torch is built for: the oldest driver
# (docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html) and compute capability.
OLDEST = {12: (525, 5.0), 13: (580, 7.5)}
BFLOAT16_CAPABILITY = 8.0  # check_if_supports_dtype in vllm/platforms/cuda.py
FP8_CAPABILITY = 8.9  # below, vLLM computes with FP8 weights in bfloat16 (kernels/linear/scaled_mm/marlin.py)
MEMORY_TOLERANCE = 0.05  # a GPU "of 80 GB" reports 79.2 to 80 GiB


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi describes it."""

    name: str
    capability: float
    memory_bytes: int
    driver: str


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
    fields = "name,compute_cap,memory.total,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Machine((), 0, None)
    rows = [[part.strip() for part in line.split(",")] for line in lines.splitlines() if line.strip()]
    gpus = tuple(Gpu(name, float(cap), int(float(mib)) << 20, driver) for name, cap, mib, driver in rows)
    torch = find_spec("torch")
    version = Path(torch.origin).with_name("version.py") if torch and torch.origin else None
    return Machine(gpus, _driver_cuda(), runpy.run_path(str(version))["cuda"] if version else None)


def _driver_cuda() -> int:
    """What libcuda says, which may be newer than the driver: a compatibility package counts."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def problems(machine: Machine, plan: "MemoryPlan") -> Iterator[str]:
    """Yields why the machine's best GPU cannot run the plan."""
    gpu, config = machine.best, plan.config
    major = int((machine.torch_cuda or "0").partition(".")[0])
    driver, capability = OLDEST.get(major, (0, 0.0))
    if machine.driver_cuda and machine.driver_cuda // 1000 < major:
        runs = f"driver {gpu.driver} runs CUDA {machine.driver_cuda // 1000}"
        yield f"{runs}, but PyTorch is built for CUDA {machine.torch_cuda}: install driver {driver} or newer"
    needs = f"PyTorch for CUDA {machine.torch_cuda}"
    roles = {"learner": config.learner, "rollout": config.rollout, "teacher_pool": config.teacher_pool}
    half = [name for name, role in roles.items() if role.num_gpus and role.dtype == "bfloat16"]
    if half and capability < BFLOAT16_CAPABILITY:
        capability, needs = BFLOAT16_CAPABILITY, f"dtype=bfloat16 of {', '.join(half)}"
        needs += ", and FP8," if plan.teacher and plan.teacher.fp8 else ""
    if gpu.capability < capability:
        yield f"{gpu.name} has compute capability {gpu.capability:g}, {needs} needs {capability:g}"
    if gpu.memory_bytes < (1 - MEMORY_TOLERANCE) * plan.gpu_bytes:
        has, planned = gpu.memory_bytes / 2**30, plan.gpu_bytes / 2**30
        yield f"{gpu.name} has {has:.0f} GiB, memory is planned for {planned:.0f}: --gpu-memory-gib {has:.0f}"


def check_machines(machines: Sequence[tuple[str, Machine]], plan: "MemoryPlan") -> None:
    """Raises ClusterError for the first (name, machine) that cannot run the plan."""
    for name, machine in machines:
        if not machine.gpus or not plan.on_gpu:
            continue
        if problem := next(problems(machine, plan), None):
            raise ClusterError(f"{name}: {problem}")
        if plan.teacher and plan.teacher.fp8 and machine.best.capability < FP8_CAPABILITY:
            slower = "vLLM computes with its FP8 weights in bfloat16, which is slower"
            log.warning("warning: %s: %s has no FP8: %s", name, machine.best.name, slower)


def check_nodes(plan: "MemoryPlan") -> None:
    """Asks each node of the joined Ray that has GPUs. Raises ClusterError."""
    if not plan.on_gpu:
        return
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU")]
    asked = ray.remote(read_machine).options(num_cpus=0, runtime_env={"env_vars": plan.config.worker_env})
    answers = [
        asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote()
        for n in nodes
    ]
    try:
        machines = ray.get(answers, timeout=ANSWER_TIMEOUT_S)
    except (GetTimeoutError, RayError) as error:
        raise ClusterError(f"a node with GPUs does not say which ones: {error}") from error
    check_machines([(n["NodeManagerHostname"], m) for n, m in zip(nodes, machines, strict=True)], plan)
