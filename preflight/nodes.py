"""Whether the GPUs of each node can run a plan: driver, compute capability, memory."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from preflight.gpus import Machine, read_machine
from preflight.memory_fit import MemoryPlan, misfit
from video_opd.errors import ClusterError
from video_opd.logs import log

ANSWER_TIMEOUT_S = 120.0
# By the major version of CUDA that torch is built for: the oldest driver, and compute capability
# (docs.nvidia.com: minor-version-compatibility, and the release notes of CUDA 13.0).
OLDEST = {12: (525, 5.0), 13: (580, 7.5)}
BFLOAT16_CAPABILITY = 8.0  # check_if_supports_dtype in vllm/platforms/cuda.py
FP8_CAPABILITY = 8.9  # below, vLLM computes with FP8 weights in bfloat16 (kernels/linear/scaled_mm/marlin.py)
RESOURCES = {"learner": "learner", "actors": "rollout", "teacher": "teacher"}  # by role; see docs/clusters.md


def problems(machine: Machine, plan: MemoryPlan) -> Iterator[str]:
    """Yields why the software of this project cannot use the machine's best GPU."""
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


def check_node(name: str, machine: Machine, resources: Mapping[str, float], plan: MemoryPlan) -> None:
    """Raises ClusterError if the node cannot run the plan, or not the roles that its resources are for."""
    if not machine.gpus:
        return
    if problem := next(problems(machine, plan), None):
        raise ClusterError(f"{name}: {problem}")
    here = replace(plan, gpu_bytes=machine.best.memory_bytes)
    for role in here.roles:
        if resources.get(RESOURCES.get(role.role, "")) and (problem := misfit(here, role)):
            raise ClusterError(f"{name}, {machine.best.name}: {problem}")
    has_fp8 = machine.best.capability >= FP8_CAPABILITY
    if plan.teacher and plan.teacher.fp8 and resources.get("teacher") and not has_fp8:
        slower = "vLLM computes with the teacher's FP8 weights in bfloat16, which is slower"
        log.warning("warning: %s: %s has no FP8: %s", name, machine.best.name, slower)


def check_gpus(plan: MemoryPlan) -> None:
    """Asks each node of the joined Ray that has GPUs. Raises ClusterError."""
    if not plan.on_gpu:
        return
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU")]
    asked = ray.remote(num_cpus=0, runtime_env={"env_vars": plan.config.worker_env})(read_machine)
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [asked.options(scheduling_strategy=strategy).remote() for strategy in strategies]
    try:
        machines = ray.get(answers, timeout=ANSWER_TIMEOUT_S)
    except (GetTimeoutError, RayError) as error:
        raise ClusterError(f"a node with GPUs does not say which ones: {error}") from error
    for node, machine in zip(nodes, machines, strict=True):
        check_node(node["NodeManagerHostname"], machine, node["Resources"], plan)
