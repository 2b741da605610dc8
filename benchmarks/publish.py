"""Bytes a second of a publication of weights, to one and two actors, beside the machine's memory bandwidth.

`python -m benchmarks.publish [--quick]`: the learner's and the pool's own code, with one learner rank and the
actors in Ray processes on this machine, and a made-up student of 500 MB (--quick: 64 MB). "named": until each
actor has the named tensors, which it maps rather than copies; "loaded": until every actor has copied them
into its own parameters, as an engine does. The last line is one JSON object; bandwidth_share is of "named"
with one actor.
"""

import asyncio
import itertools
import os
import statistics
import time
from types import SimpleNamespace

import numpy as np
import ray
import torch

from actors.actor_pool import ActorPool
from actors.engine import PolicyEngine
from benchmarks.command import Row, make_parser, print_result, timed
from driver.start_ray import start_ray
from learner.learner import Learner
from learner.rank import LearnerRank
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.models.forward import load_model
from video_opd.models.prompting import PromptEncoder
from video_opd.weights.buckets import to_buckets, unpack

STUDENT_BYTES = "STUDENT_BYTES"  # in config.worker_env
NUM_ACTORS = (1, 2)
HIDDEN, VOCABULARY = 1024, 32_000
LAYER = {  # of a decoder
    "qkv": (2 * HIDDEN, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (6 * HIDDEN, HIDDEN),
    "down": (HIDDEN, 3 * HIDDEN),
    "norm": (HIDDEN,),
    "post_norm": (HIDDEN,),
}
COPY_BYTES = 512 << 20  # beyond any cache
RELOADS = 5


def student(config: Config) -> dict[str, torch.Tensor]:
    """A decoder's tensors in bfloat16, with as many layers as make about STUDENT_BYTES."""
    of_layer = 2 * sum(torch.Size(shape).numel() for shape in LAYER.values())
    num_layers = (int(config.worker_env[STUDENT_BYTES]) - 2 * VOCABULARY * HIDDEN) // of_layer
    shapes = {"embed": (VOCABULARY, HIDDEN)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(num_layers) for name, shape in LAYER.items()}
    return {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


class MadeUpRank(LearnerRank):
    def start(self, master: tuple[str, int]) -> None:
        """Its engine does no more than publish."""
        named, size = list(student(self._config).items()), self._config.learner.bucket_bytes
        self._engine = SimpleNamespace(buckets=lambda version: to_buckets(named, version, size))


class NamingActor:
    """Takes weights as far as named tensors. It has the calls of RolloutActor that a publication makes."""

    def __init__(self, name: str, config: Config):
        self._parameters: dict[str, torch.Tensor] = {}

    def pid(self) -> int:
        return 0

    def load_weights(self, policy_version: int, buckets: list[ray.ObjectRef]) -> None:
        for name, tensor in unpack(ray.get(buckets)):
            if name in self._parameters:
                self._parameters[name].copy_(tensor)


class LoadingActor(NamingActor):
    """Copies them into parameters of its own."""

    def __init__(self, name: str, config: Config):
        self._parameters = student(config)


ACTORS = {"named": NamingActor, "loaded": LoadingActor}


async def measure(config: Config, repeats: int) -> Row:
    keys = list(itertools.product(ACTORS, NUM_ACTORS))
    pools, learners = {}, {}
    for what, count in keys:
        rollout = config.rollout.model_copy(update={"num_actors": count})
        pool_config = config.model_copy(update={"rollout": rollout})
        pools[what, count] = ActorPool(f"{what}-{count}", pool_config, ACTORS[what])
        learners[what, count] = Learner(f"{what}-{count}", config, MadeUpRank)
    await asyncio.gather(*(part.start() for part in (*pools.values(), *learners.values())))
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in keys}
    copies, num_bytes = [], 0
    # in turn, so that a busy machine is busy for all of them; the first round warms up
    for version in range(1 + repeats):
        for key, seconds in taken.items():
            started = time.perf_counter()
            num_bytes = (await pools[key].publish(version, learners[key])).num_bytes
            seconds.append(time.perf_counter() - started)
            copies.append(2 * COPY_BYTES / timed(np.copyto, target, source)[0])  # read and written
    bandwidth, rows = statistics.median(copies), []
    for count in NUM_ACTORS:
        named, loaded = (taken[what, count][1:] for what in ("named", "loaded"))
        medians = {"": statistics.median(named), "loaded_": statistics.median(loaded)}
        extremes = {"slowest_": max(named), "fastest_": min(named)}
        rates = {f"{name}bytes_per_s": num_bytes / s for name, s in (medians | extremes).items()}
        rows.append({"path": "object_store", "actors": count} | rates)
    memory = {"memory_bytes_per_s": bandwidth, "bandwidth_share": rows[0]["bytes_per_s"] / bandwidth}
    return {"rows": rows} | memory | {"student_bytes": num_bytes, "repeats": repeats}


def engine_reload(config: Config) -> Row:
    """vLLM's own part: median seconds that it takes to load the demo's student from this process."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    pad_ids = PromptEncoder(config.student, config.prompt, config.video).pad_ids
    engine = PolicyEngine(config, pad_ids)
    named = list(load_model(config.student, config.rollout.dtype).named_parameters())
    taken = []
    for version in range(1 + RELOADS):
        buckets = list(to_buckets(named, version, config.learner.bucket_bytes))
        taken.append(timed(engine.load_weights, version, buckets)[0])
    return {"engine_bytes": sum(p.nbytes for _, p in named), "engine_reload_s": statistics.median(taken[1:])}


def run(num_bytes: int, repeats: int) -> Row:
    options, num_pools = [f"worker_env.{STUDENT_BYTES}='{num_bytes}'"], len(ACTORS) * len(NUM_ACTORS)
    config = load_demo(options)
    start_ray(load_demo([*options, f"learner.world_size={num_pools}"]), address="local")  # a learner for each
    try:
        result = asyncio.run(measure(config, repeats))
    finally:
        ray.shutdown()
    return result | engine_reload(config)


def main() -> None:
    quick = make_parser("publish", __doc__, "64 MB and 3 repeats instead of 500 MB and 7").parse_args().quick
    result = run(64_000_000, 3) if quick else run(500_000_000, 7)
    bandwidth, shown = result["memory_bytes_per_s"], []
    for row in result["rows"]:
        rates = {k.replace("bytes", "GB"): v / 1e9 for k, v in row.items() if k.endswith("bytes_per_s")}
        share = f"{row['bytes_per_s'] / bandwidth:.0%}"
        shown.append({"path": row["path"], "actors": row["actors"]} | rates | {"share_of_memory": share})
    megabytes, milliseconds = result["engine_bytes"] / 1e6, 1e3 * result["engine_reload_s"]
    memory = f"memory is read and written at {bandwidth / 1e9:.1f} GB/s"
    note = f"vLLM takes {megabytes:.1f} MB of the demo's student in {milliseconds:.0f} ms"
    print_result(result, f"publishing {result['student_bytes'] / 1e6:.0f} MB; {memory}", shown, note)


if __name__ == "__main__":
    main()
