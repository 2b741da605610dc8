"""Bytes a second of a publication of weights, to one and two actors, beside the machine's memory bandwidth.

`python -m benchmarks.publish [--quick]`: the learner's and the pool's own code, with one learner rank and the
actors in Ray processes on this machine, and a made-up student of 500 MB (--quick: 64 MB). "named": until each
actor has the named tensors, which it maps rather than copies; "loaded": until every actor has copied them
into its own parameters, as an engine does. The last line is one JSON object; bandwidth_share is of "named"
with one actor.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table

from actors.actor_pool import ActorPool
from actors.engine import PolicyEngine
from driver.start_ray import start_ray
from learner.learner import Learner
from learner.rank import LearnerRank
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.models.forward import load_model
from video_opd.models.prompting import PromptEncoder
from video_opd.weights.buckets import Named, WeightBucket, to_buckets, unpack

STUDENT_BYTES = "STUDENT_BYTES"
PATH = "object_store"
NUM_ACTORS = (1, 2)
HIDDEN, VOCABULARY = 1024, 32_000
COPY_BYTES = 512 << 20  # beyond any cache
RELOADS = 5


def student_shapes(num_bytes: int) -> Iterator[tuple[str, torch.Size]]:
    """A decoder's tensors in bfloat16, with as many layers as make about `num_bytes`."""
    layer = {
        "qkv": (2 * HIDDEN, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "gate_up": (6 * HIDDEN, HIDDEN),
        "down": (HIDDEN, 3 * HIDDEN),
        "norm": (HIDDEN,),
        "post_norm": (HIDDEN,),
    }
    yield "embed", torch.Size((VOCABULARY, HIDDEN))
    of_layer = 2 * sum(torch.Size(shape).numel() for shape in layer.values())
    for number in range((num_bytes - 2 * VOCABULARY * HIDDEN) // of_layer):
        yield from ((f"layers.{number}.{name}", torch.Size(shape)) for name, shape in layer.items())


def student(num_bytes: int) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.ones(shape, dtype=torch.bfloat16)) for name, shape in student_shapes(num_bytes)]


class MadeUpWeights:
    """Takes the place of a LearnerEngine in publications."""

    def __init__(self, config: Config):
        self._named = student(int(config.worker_env[STUDENT_BYTES]))
        self._bucket_bytes = config.learner.bucket_bytes

    def buckets(self, policy_version: int) -> Iterator[WeightBucket]:
        return to_buckets(self._named, policy_version, self._bucket_bytes)


class MadeUpRank(LearnerRank):
    def start(self, master: tuple[str, int]) -> None:
        self._engine = MadeUpWeights(self._config)


class NamingActor:
    """Takes weights as far as named tensors. It has the calls of RolloutActor that a publication makes."""

    def __init__(self, name: str, config: Config):
        self._num_bytes = int(config.worker_env[STUDENT_BYTES])

    def pid(self) -> int:
        return 0

    def load_weights(self, policy_version: int, buckets: list[ray.ObjectRef]) -> None:
        self._take(unpack(ray.get(buckets)))

    def _take(self, named: Named) -> None:
        for _ in named:
            pass


class LoadingActor(NamingActor):
    """Copies them into parameters of its own."""

    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self._parameters = dict(student(self._num_bytes))

    def _take(self, named: Named) -> None:
        for name, tensor in named:
            self._parameters[name].copy_(tensor)


ACTORS = {"named": NamingActor, "loaded": LoadingActor}


def copy_bytes_per_s(source: np.ndarray, target: np.ndarray) -> float:
    """Bytes read and written a second by one thread of numpy."""
    started = time.perf_counter()
    np.copyto(target, source)
    return 2 * source.nbytes / (time.perf_counter() - started)


async def measure(config: Config, repeats: int) -> dict[str, Any]:
    keys = [(what, count) for what in ACTORS for count in NUM_ACTORS]
    pools = {
        (what, count): ActorPool(f"{what}-{count}", with_actors(config, count), ACTORS[what])
        for what, count in keys
    }
    learners = {(what, count): Learner(f"{what}-{count}", config, MadeUpRank) for what, count in keys}
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
            taken_s = time.perf_counter() - started
            copies.append(copy_bytes_per_s(source, target))
            seconds += [taken_s] if version else []
    rows = [
        {
            "path": PATH,
            "actors": count,
            "bytes_per_s": num_bytes / statistics.median(taken["named", count]),
            "loaded_bytes_per_s": num_bytes / statistics.median(taken["loaded", count]),
            "slowest_bytes_per_s": num_bytes / max(taken["named", count]),
            "fastest_bytes_per_s": num_bytes / min(taken["named", count]),
        }
        for count in NUM_ACTORS
    ]
    bandwidth = statistics.median(copies)
    return {
        "rows": rows,
        "memory_bytes_per_s": bandwidth,
        "bandwidth_share": rows[0]["bytes_per_s"] / bandwidth,
        "student_bytes": num_bytes,
        "repeats": repeats,
    }


def with_actors(config: Config, count: int) -> Config:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"num_actors": count})})


def engine_reload(config: Config) -> dict[str, float]:
    """vLLM's own part: median seconds that it takes to load the demo's student from this process."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    pad_ids = PromptEncoder(config.student, config.prompt, config.video).pad_ids
    engine = PolicyEngine(config.student, config.rollout, config.seed, pad_ids)
    named = list(load_model(config.student, config.rollout.dtype).named_parameters())
    taken = []
    for version in range(1 + RELOADS):
        buckets = list(to_buckets(named, version, config.learner.bucket_bytes))
        started = time.perf_counter()
        engine.load_weights(version, buckets)
        taken.append(time.perf_counter() - started)
    return {"engine_bytes": sum(p.nbytes for _, p in named), "engine_reload_s": statistics.median(taken[1:])}


def run(num_bytes: int, repeats: int) -> dict[str, Any]:
    options, num_pools = [f"worker_env.{STUDENT_BYTES}='{num_bytes}'"], len(ACTORS) * len(NUM_ACTORS)
    config = load_demo(options)
    start_ray(load_demo([*options, f"learner.world_size={num_pools}"]), address="local")  # a learner for each
    try:
        result = asyncio.run(measure(config, repeats))
    finally:
        ray.shutdown()
    return result | engine_reload(config)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 MB and 3 repeats instead of 500 MB and 7")
    arguments = parser.parse_args()
    result = run(*((64_000_000, 3) if arguments.quick else (500_000_000, 7)))
    bandwidth = result["memory_bytes_per_s"]
    memory = f"memory is read and written at {bandwidth / 1e9:.1f} GB/s"
    title = f"publishing {result['student_bytes'] / 1e6:.0f} MB; {memory}"
    table = Table("way", "actors", "named GB/s", "its range", "share", "loaded GB/s", title=title)
    for row in result["rows"]:
        named, loaded, slowest, fastest = (
            row[f"{k}bytes_per_s"] / 1e9 for k in ("", "loaded_", "slowest_", "fastest_")
        )
        cells = (f"{slowest:.2f} to {fastest:.2f}", f"{row['bytes_per_s'] / bandwidth:.0%}", f"{loaded:.2f}")
        table.add_row(row["path"], str(row["actors"]), f"{named:.2f}", *cells)
    Console().print(table)
    megabytes, milliseconds = result["engine_bytes"] / 1e6, 1e3 * result["engine_reload_s"]
    print(f"vLLM takes {megabytes:.1f} MB of the demo's student in {milliseconds:.0f} ms")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
