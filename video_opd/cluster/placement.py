"""The resources of Ray that an engine takes, and how its shards come to one node."""

from video_opd.config import RolloutConfig
from video_opd.config_teachers import TeacherConfig


def resources_of(engine: RolloutConfig | TeacherConfig, role: str) -> dict[str, float]:
    """All that one engine takes, on one node: CPU, GPU and one unit of the role."""
    amounts = {"CPU": engine.num_cpus, "GPU": engine.num_gpus}
    return {role: 1} | {name: n * engine.tensor_parallel for name, n in amounts.items() if n}


def bundles_of(engine: RolloutConfig | TeacherConfig, role: str) -> list[dict[str, float]]:
    """One bundle for each shard, for a placement group with STRICT_PACK.

    The process that conducts the shards is in the first. On GPUs it takes none: vLLM starts each shard as a
    Ray actor in the bundle of its GPU (vllm/v1/executor/ray_executor_v2.py)."""
    shard = {name: n for name, n in (("CPU", engine.num_cpus), ("GPU", engine.num_gpus)) if n}
    return [shard | {role: 1}, *[shard] * (engine.tensor_parallel - 1)]
