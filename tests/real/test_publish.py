"""Weights on their way from learner processes to real rollout actors, both ways, with an actor that dies in the middle."""

import asyncio
import hashlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ray
import torch

from actors.actor_pool import ActorPool
from actors.rollout_actor import RolloutActor
from learner.learner import Learner
from learner.rank import LearnerRank
from learner.weight_sender import tensor_buckets, to_buckets
from tests.real.conftest import reference_logprobs
from video_opd.broadcast import BroadcastGroup
from video_opd.config_file import load_config
from video_opd.models.forward import load_model
from video_opd.types import TrajectoryGroup

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

    def broadcast_buckets(self, version: int, device):
        return tensor_buckets(parameters(self._student, version), version, BUCKET_BYTES)


class Rank(LearnerRank):
    def start(self, master) -> None:
        self._engine = MadeUpWeights(self._config.student)


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
    """One that can be looked into, and that dies after some buckets of its next broadcast where it finds `deadly`."""

    def look(self, prompts) -> Seen:
        digests = self._engine._llm.collective_rpc(worker_digests)[0]
        assert self._policy_version is not None
        groups = [g for results in self.rollout(prompts) for g in results if isinstance(g, TrajectoryGroup)]
        trajectories = [
            t for group in sorted(groups, key=lambda g: g.prompt.prompt_id) for t in group.trajectories
        ]
        responses = [(t.response_token_ids.tolist(), t.actor_logprobs.tolist()) for t in trajectories]
        return Seen(self._policy_version, digests, responses)

    def receive_weights(self, policy_version, place):
        if (deadly := Path(os.environ["DEADLY"])).exists() and deadly.read_text() == self._name:
            receive, left = BroadcastGroup.receive, iter(range(3))

            def receive_or_die(self):
                if next(left, None) is None:
                    os.kill(os.getpid(), 9)
                return receive(self)

            BroadcastGroup.receive = receive_or_die
        return super().receive_weights(policy_version, place)


@pytest.fixture(scope="module")
def published(local_ray, overrides, prompts, tmp_path_factory):
    """What was seen of the actors, by name, and by what had happened before."""
    deadly = tmp_path_factory.mktemp("publish") / "deadly"
    options = ["learner.weight_transfer=collective", "rollout.num_actors=2", f"worker_env.DEADLY={deadly}"]
    config = load_config(
        Path(__file__).parents[2] / "configs" / "demo.yaml", [*overrides, *options, "request_timeout_s=120"]
    )

    async def look(pool) -> dict[str, Seen]:
        return {m.name: await m.handle.look.remote(prompts[:3]) for m in pool._members}

    async def go() -> dict[str, Any]:
        pool, learner = ActorPool("publish", config, Actor), Learner("publish", config, Rank)
        await asyncio.gather(pool.start(), learner.start())
        seen: dict[str, Any] = {"start": await look(pool)}
        for version in (1, 2):
            await pool.receive_weights(version, learner)
            seen[f"broadcast {version}"] = await look(pool)
            await pool.load_weights(version, *await learner.put_weights(version))
            seen[f"stored {version}"] = await look(pool)
        deadly.write_text("actor-1")
        started = time.monotonic()
        await pool.receive_weights(3, learner)
        seen["death"] = await look(pool)
        seen["seconds"] = time.monotonic() - started
        while len(pool._members) < 2:
            assert time.monotonic() - started < PATIENCE_S, pool.counts()
            await asyncio.sleep(0.1)
        seen["joined"] = await look(pool)
        await pool.receive_weights(1, learner)
        seen["again"] = await look(pool)
        pool.stop()
        for handle in [*(m.handle for m in pool._members), *learner._ranks]:
            ray.kill(handle)
        return seen

    return asyncio.run(asyncio.wait_for(go(), 4 * PATIENCE_S))


def test_both_ways_leave_the_same_bits_in_the_engines_and_the_same_samples(published):
    seen = {
        version: [*published[f"broadcast {version}"].values(), *published[f"stored {version}"].values()]
        for version in (1, 2)
    }
    for version, of_both in seen.items():
        assert len(of_both) == 4 and all(s == of_both[0] for s in of_both)
        assert of_both[0].version == version and len(of_both[0].responses) == 3
    (one, *_), (two, *_), start = seen[1], seen[2], published["start"]["actor-0"]
    for a, b in ((start, one), (one, two)):
        assert a.responses != b.responses
        assert sum(a.digests[n] != b.digests[n] for n in a.digests) > 10


def test_what_is_sampled_from_is_what_the_learner_sent(published, config, prompts, encoder):
    model = load_model(config.student, "float32").eval()
    model.load_state_dict(dict(parameters(config.student, 2)), strict=False)
    seen = published["broadcast 2"]["actor-0"]
    for prompt, (token_ids, logprobs) in zip(
        sorted(prompts[:3], key=lambda p: p.prompt_id), seen.responses, strict=True
    ):
        ids = np.array(token_ids)
        exact = reference_logprobs(model, encoder.encode(prompt), ids)[np.arange(len(ids)), ids]
        assert np.abs(exact - logprobs).max() < TOLERANCE


def test_an_actor_killed_in_the_middle_leaves_the_others_with_the_version_and_its_successor_has_it(published):
    assert published["death"].keys() == {"actor-0"}
    assert published["joined"].keys() == {"actor-0", "actor-2"}
    mended, joined = published["joined"].values()
    assert mended.version == 3 and mended == joined, "no mixture is left of what broke off"
    assert published["again"].keys() == {"actor-0", "actor-2"}
    assert all(seen == published["stored 1"]["actor-0"] for seen in published["again"].values()), (
        "a new group works"
    )
    assert published["seconds"] < PATIENCE_S, "nobody waited for the timeout"
