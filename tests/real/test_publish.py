"""Weights from a learner process to real rollout actors, one of which dies in the middle of a version."""

import asyncio
import hashlib
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.util.placement_group import get_current_placement_group, placement_group_table

from actors.actor_pool import ActorPool
from actors.rollout_actor import RolloutActor
from learner.learner import Learner
from learner.rank import LearnerRank
from tests.real.conftest import DEMO, reference_logprobs
from video_opd.config_file import load_config
from video_opd.models.forward import load_model
from video_opd.types import TrajectoryGroup
from video_opd.weights import transfer
from video_opd.weights.buckets import to_buckets, unpack

BUCKET_BYTES = 1 << 16
PATIENCE_S = 60.0
TOLERANCE = 1e-4


def parameters(student: str, version: int) -> list[tuple[str, torch.Tensor]]:
    """A version's weights: the student's, moved."""
    torch.manual_seed(version)
    return [
        (n, p.detach() + 0.05 * torch.randn_like(p))
        for n, p in load_model(student, "float32").named_parameters()
    ]


class MadeUpWeights:
    """In place of a LearnerEngine: what a version is depends on its number alone."""

    def __init__(self, student: str):
        self._student = student

    def buckets(self, version: int):
        return to_buckets(parameters(self._student, version), version, BUCKET_BYTES)


def bytes_in_store() -> int:
    """Of all objects that are in use in the object store of this node."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.object_store_bytes_used


class Rank(LearnerRank):
    """One that notes what is left of earlier versions in the object store when it is to put a new one."""

    def start(self, master) -> None:
        self._engine = MadeUpWeights(self._config.student)
        self._left: list[int] = []

    def put_weights(self, policy_version):
        give_up = time.monotonic() + PATIENCE_S  # Ray removes what nobody holds a moment later
        while (left := bytes_in_store()) > num_bytes(self._config.student) / 2 and time.monotonic() < give_up:
            time.sleep(0.05)
        self._left.append(left)
        return super().put_weights(policy_version)

    def left(self) -> list[int]:
        return self._left


def num_bytes(student: str) -> int:
    return sum(p.nbytes for _, p in parameters(student, 0))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def worker_digests(worker) -> dict[str, str]:
    """Of the parameters of the model that vLLM runs, but for those that it packs out of sight."""
    return {n: hashlib.sha256(bits(p)).hexdigest() for n, p in worker.get_model().named_parameters()}


class Seen(NamedTuple):
    """What an actor holds, and what it samples from that."""

    version: int
    digests: dict[str, str]
    responses: list[tuple[list[int], list[float]]]  # token ids and log-probs


class Actor(RolloutActor):
    """One that can be looked into. It dies in the middle of a version while the file DEADLY names it."""

    async def hold(self) -> None:
        """From now on prompts wait."""
        await self._loop.command(lambda: setattr(self._loop, "is_held", True))

    async def num_calls(self) -> int:
        return len(self._loop._calls)

    async def look(self, prompts) -> Seen:
        digests = await self._loop.command(lambda: self._engine._llm.collective_rpc(worker_digests)[0])
        assert self._policy_version is not None
        results = [result async for part in self.rollout(prompts) for result in part]
        groups = [g for g in results if isinstance(g, TrajectoryGroup)]
        trajectories = [
            t for group in sorted(groups, key=lambda g: g.prompt.prompt_id) for t in group.trajectories
        ]
        responses = [(t.response_token_ids.tolist(), t.actor_logprobs.tolist()) for t in trajectories]
        return Seen(self._policy_version, digests, responses)

    async def load_weights(self, policy_version, buckets):
        if (deadly := Path(os.environ["DEADLY"])).exists() and deadly.read_text() == self._name:

            def unpack_or_die(buckets):
                yield from itertools.islice(unpack(buckets), 3)
                os.kill(os.getpid(), 9)

            transfer.unpack = unpack_or_die
        await super().load_weights(policy_version, buckets)


@pytest.fixture(scope="module")
def published(local_ray, overrides, prompts, tmp_path_factory):
    """What was seen of the actors, by name, and by what had happened before."""
    deadly = tmp_path_factory.mktemp("publish") / "deadly"
    options = ["rollout.num_actors=2", f"worker_env.DEADLY={deadly}", "request_timeout_s=120"]
    config = load_config(DEMO, [*overrides, *options])

    async def look(pool) -> dict[str, Seen]:
        return {m.name: await m.handle.look.remote(prompts[:3]) for m in pool._members.ready}

    async def stop_early(pool, prompts) -> list[int]:
        """The calls that an actor has before and after a caller of one stops."""
        for member in pool._members.ready:
            await member.handle.hold.remote()
        caller, counts = asyncio.ensure_future(anext(pool.rollout(prompts[:2]))), []
        for count in (1, 0):
            while sum([await m.handle.num_calls.remote() for m in pool._members.ready]) != count:
                await asyncio.sleep(0.01)
            counts.append(count)
            caller.cancel()
        return counts

    async def go() -> dict[str, Any]:
        pool, learner = ActorPool("publish", config, Actor), Learner("publish", config, Rank)
        await asyncio.gather(pool.start(), learner.start())
        seen: dict[str, Any] = {"start": await look(pool)}
        for version in (1, 2):
            await pool.publish(version, learner)
            seen[f"version {version}"] = await look(pool)
        deadly.write_text("actor-1")
        await pool.publish(3, learner)
        seen["death"] = await look(pool)
        while len(pool._members.ready) < 2:
            await asyncio.sleep(0.1)
        seen["joined"] = await look(pool)
        await pool.publish(1, learner)
        seen["again"] = await look(pool)
        seen["stopped"] = await stop_early(pool, prompts)
        seen["left"] = await learner._ranks[0].left.remote()
        pool.stop()
        learner.stop()
        return seen

    return asyncio.run(asyncio.wait_for(go(), 10 * PATIENCE_S))


def test_every_engine_holds_the_same_bits_of_a_version_and_samples_the_same(published):
    seen = {version: list(published[f"version {version}"].values()) for version in (1, 2)}
    for version, of_actors in seen.items():
        assert len(of_actors) == 2 and of_actors[0] == of_actors[1]
        assert of_actors[0].version == version and len(of_actors[0].responses) == 3
    (one, *_), (two, *_), start = seen[1], seen[2], published["start"]["actor-0"]
    for a, b in ((start, one), (one, two)):
        assert a.responses != b.responses
        assert sum(a.digests[n] != b.digests[n] for n in a.digests) > 10


def test_what_is_sampled_from_is_what_the_learner_sent(published, config, prompts, encoder):
    model = load_model(config.student, "float32").eval()
    model.load_state_dict(dict(parameters(config.student, 2)), strict=False)
    seen = published["version 2"]["actor-0"]
    for prompt, (token_ids, logprobs) in zip(
        sorted(prompts[:3], key=lambda p: p.prompt_id), seen.responses, strict=True
    ):
        ids = np.array(token_ids)
        exact = reference_logprobs(model, encoder.encode(prompt), ids)[np.arange(len(ids)), ids]
        assert np.abs(exact - logprobs).max() < TOLERANCE


def test_an_actor_killed_in_the_middle_leaves_the_others_with_the_version_and_its_successor_has_it(published):
    assert published["death"].keys() == {"actor-0"}
    assert published["joined"].keys() == {"actor-0", "actor-2"}
    left, joined = published["joined"].values()
    assert left.version == 3 and left == joined
    assert published["again"].keys() == {"actor-0", "actor-2"}
    assert all(seen == published["version 1"]["actor-0"] for seen in published["again"].values())


class Placed:
    """In place of a RolloutActor in shards: says where vLLM would start them."""

    def __init__(self, *_: Any):
        """As vllm/v1/executor/ray_utils.py, in the thread that starts the engine."""
        self._group = ThreadPoolExecutor(1).submit(get_current_placement_group).result()

    def pid(self) -> int:
        return os.getpid()

    def bundles(self) -> list[dict[str, float]]:
        assert self._group
        return self._group.bundle_specs


def test_an_actor_in_shards_is_in_the_placement_group_that_vllm_uses_and_gives_it_back(local_ray, config):
    rollout = config.rollout.model_copy(update={"tensor_parallel": 2, "num_actors": 1})
    pool = ActorPool("shards", config.model_copy(update={"rollout": rollout}), Placed)
    asyncio.run(pool.start())
    (member,) = pool._created
    assert member.places
    assert local_ray.get(member.handle.bundles.remote()) == [{"CPU": 0.5, "rollout": 1}, {"CPU": 0.5}]
    assert placement_group_table(member.places)["strategy"] == "STRICT_PACK"
    pool.stop()
    assert placement_group_table(member.places)["state"] == "REMOVED"


def test_an_actor_drops_a_call_whose_caller_stopped(published):
    """Its prompts would have waited for ever."""
    assert published["stopped"] == [1, 0]


def test_a_version_leaves_the_object_store_before_the_next_one_enters(published, config):
    """Neither the pool nor an actor, which loads from the store's memory in place, holds it any longer."""
    assert len(published["left"]) == 4
    assert max(published["left"]) <= num_bytes(config.student) / 2
