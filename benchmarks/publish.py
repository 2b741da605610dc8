"""Bytes a second of a publication of weights, by each way and to one and two actors, beside the machine's memory bandwidth.

`python -m benchmarks.publish [--quick]`: the learner's and the pool's own code, one learner rank and the actors in processes of
Ray on this machine, a student of 500 MB (--quick: 64 MB) that is made of shapes alone. "named": until every actor has the named
tensors, which the object store's receivers map rather than copy; "loaded": until every actor has copied them into parameters of
its own, as an engine does. The last line is one JSON object; bandwidth_share is that of the default way, "named", one actor.
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
from actors.weight_receiver import Named, split, unpack
from driver.start_ray import start_ray
from learner.learner import Learner
from learner.rank import LearnerRank
from learner.weight_sender import tensor_buckets, to_buckets
from video_opd.broadcast import BroadcastGroup, in_order
from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.models.forward import load_model
from video_opd.models.prompting import PromptEncoder
from video_opd.types import GroupPlace, WeightBucket

STUDENT_BYTES = "STUDENT_BYTES"
WAYS = ("object_store", "collective")
HIDDEN, VOCABULARY = 1024, 32_000
COPY_BYTES = 512 << 20  # beyond any cache
RELOADS = 5


def student_shapes(num_bytes: int) -> Iterator[tuple[str, torch.Size]]:
    """A decoder's tensors in bfloat16: as many layers as make about so many bytes."""
    layer = {
        "qkv": (2 * HIDDEN, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "gate_up": (6 * HIDDEN, HIDDEN),
        "down": (HIDDEN, 3 * HIDDEN),
    }
    layer |= {"norm": (HIDDEN,), "post_norm": (HIDDEN,)}
    yield "embed", torch.Size((VOCABULARY, HIDDEN))
    of_layer = 2 * sum(torch.Size(shape).numel() for shape in layer.values())
    for number in range((num_bytes - 2 * VOCABULARY * HIDDEN) // of_layer):
        yield from ((f"layers.{number}.{name}", torch.Size(shape)) for name, shape in layer.items())


def student(num_bytes: int) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.ones(shape, dtype=torch.bfloat16)) for name, shape in student_shapes(num_bytes)]


class MadeUpWeights:
    """What publications see of a LearnerEngine."""

    def __init__(self, config: Config):
        self._named = student(int(config.worker_env[STUDENT_BYTES]))
        self._bucket_bytes = config.learner.bucket_bytes

    def buckets(self, policy_version: int):
        return to_buckets(self._named, policy_version, self._bucket_bytes)

    def broadcast_buckets(self, policy_version: int, device):
        return tensor_buckets(self._named, policy_version, self._bucket_bytes)


class MadeUpRank(LearnerRank):
    def start(self, master: tuple[str, int]) -> None:
        self._engine = MadeUpWeights(self._config)


class NamingActor:
    """Takes weights as far as named tensors. The calls of RolloutActor that a publication makes."""

    def __init__(self, name: str, config: Config):
        self._timeout_s = config.request_timeout_s
        self._num_bytes = int(config.worker_env[STUDENT_BYTES])
        self._group: BroadcastGroup | None = None

    def pid(self) -> int:
        return 0

    def load_weights(self, policy_version: int, buckets: list[ray.ObjectRef]) -> None:
        fetched: list[WeightBucket] = [ray.get(bucket) for bucket in buckets]
        self._take(unpack(fetched))

    def receive_weights(self, policy_version: int, place: GroupPlace | None) -> None:
        if place is not None:
            self._group = BroadcastGroup(place, self._timeout_s)
        assert self._group
        self._group.meet()
        self._take(split(in_order(iter(self._group.receive, None), policy_version)))

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


async def publish(way: str, version: int, pool: ActorPool, learner: Learner) -> tuple[int, float]:
    """Bytes and seconds of one publication, as driver.run.publish_weights makes it."""
    started = time.perf_counter()
    if way == "collective":
        update = await pool.receive_weights(version, learner)
    else:
        update = await pool.load_weights(version, *await learner.put_weights(version))
    return update.num_bytes, time.perf_counter() - started


async def measure(config: Config, repeats: int) -> dict[str, Any]:
    kinds = [(what, count) for what in ACTORS for count in (1, 2)]
    pools = {
        (what, count): ActorPool(f"{what}-{count}", with_actors(config, count), ACTORS[what])
        for what, count in kinds
    }
    learners = {(what, count): Learner(f"{what}-{count}", config, MadeUpRank) for what, count in kinds}
    await asyncio.gather(*(part.start() for part in (*pools.values(), *learners.values())))
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    taken: dict[tuple[str, str, int], list[float]] = {(way, *key): [] for way in WAYS for key in pools}
    copies, num_bytes = [], 0
    for version in range(
        1 + repeats
    ):  # all in turn, so that a busy machine is busy for all of them; the first warms up
        for (way, what, count), seconds in taken.items():
            num_bytes, taken_s = await publish(way, version, pools[what, count], learners[what, count])
            copies.append(copy_bytes_per_s(source, target))
            seconds += [taken_s] if version else []
    median = {key: statistics.median(seconds) for key, seconds in taken.items()}
    rows = [
        {
            "path": way,
            "actors": count,
            "bytes_per_s": num_bytes / median[way, "named", count],
            "loaded_bytes_per_s": num_bytes / median[way, "loaded", count],
            "slowest_bytes_per_s": num_bytes / max(taken[way, "named", count]),
            "fastest_bytes_per_s": num_bytes / min(taken[way, "named", count]),
        }
        for way in WAYS
        for count in (1, 2)
    ]
    bandwidth = statistics.median(copies)
    share = rows[0]["bytes_per_s"] / bandwidth
    return {
        "rows": rows,
        "memory_bytes_per_s": bandwidth,
        "bandwidth_share": share,
        "student_bytes": num_bytes,
        "repeats": repeats,
    }


def with_actors(config: Config, count: int) -> Config:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"num_actors": count})})


def with_ranks(config: Config, count: int) -> Config:
    return config.model_copy(update={"learner": config.learner.model_copy(update={"world_size": count})})


def engine_reload(config: Config) -> dict[str, float]:
    """What vLLM itself adds, by the demo's student: median seconds of taking a version that is in this process already."""
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
    overrides = [f"worker_env.{STUDENT_BYTES}='{num_bytes}'"]
    config = load_demo(overrides)
    start_ray(with_ranks(config, 2 * len(ACTORS)), address="local")  # a learner for each pool
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
    share = 1 / result["memory_bytes_per_s"]
    memory = f"memory is read and written at {result['memory_bytes_per_s'] / 1e9:.1f} GB/s"
    title = f"publishing {result['student_bytes'] / 1e6:.0f} MB; {memory}"
    table = Table("way", "actors", "named GB/s", "its range", "share", "loaded GB/s", title=title)
    for row in result["rows"]:
        named, loaded, *spread = (
            row[f"{k}bytes_per_s"] / 1e9 for k in ("", "loaded_", "slowest_", "fastest_")
        )
        cells = (
            f"{named:.2f}",
            "{:.2f} to {:.2f}".format(*spread),
            f"{row['bytes_per_s'] * share:.0%}",
            f"{loaded:.2f}",
        )
        table.add_row(row["path"], str(row["actors"]), *cells)
    Console().print(table)
    print(
        f"vLLM takes {result['engine_bytes'] / 1e6:.1f} MB of the demo's student in {1e3 * result['engine_reload_s']:.0f} ms"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
