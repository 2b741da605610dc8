"""Both sides of vLLM's own engines fit together: all of it is real here but NCCL and CUDA."""

import queue
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngine, ipc_engine, nccl_engine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from video_opd.config_file import load_demo
from video_opd.errors import ConfigError, WeightsLostError
from video_opd.weights.buckets import to_buckets
from video_opd.weights.transfer import BACKENDS, WeightSender

ADDRESS = ("127.0.0.1", 4242)
PATIENCE_S = 60.0
NAMED = [("embed", torch.arange(6.0).view(2, 3)), ("head", torch.ones(4, dtype=torch.bfloat16))]


class Wire:
    """A broadcast without NCCL: rank 0 puts tensors in, every receiver has a queue of its own."""

    def __init__(self):
        self.receivers: list[queue.Queue] = []
        self.num_groups = self.num_destroyed = 0

    def trainer_endpoint(self, init_info: nccl_engine.NCCLTrainerInitInfo) -> "Wire":
        assert (init_info.master_address, init_info.master_port) == ADDRESS
        self.receivers = []
        self.num_groups += 1
        return self

    def destroy(self) -> None:
        self.num_destroyed += 1

    def produce(self, iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers) -> None:
        assert group is self and src == 0
        for item in iterator:
            for receiver in self.receivers:
                receiver.put(post_iter_func(item).clone())

    def consume(self, iterator, group, src, post_unpack_func, buffer_size_bytes, num_buffers, device) -> None:
        for name, (shape, dtype) in iterator:
            tensor = group.get(timeout=PATIENCE_S)
            assert (tensor.shape, tensor.dtype) == (torch.Size(shape), dtype)
            post_unpack_func([(name, tensor)])


class Model(torch.nn.Module):
    """What an engine loads into."""

    def __init__(self):
        super().__init__()
        self.held: dict[str, torch.Tensor] = {}

    def load_weights(self, weights) -> None:
        self.held |= dict(weights)


class Actor:
    """A rollout actor's weight-transfer calls, served in order by the receiving engine."""

    def __init__(self, way: str):
        config: Any = SimpleNamespace(parallel_config=None, model_config=None)
        self.model = Model()
        self.engine: WeightTransferEngine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=BACKENDS[way]), config, torch.device("cpu", 0), self.model
        )
        self.calls: list[str] = []
        self.init_info: Any = None
        self.dies_at: str | None = None  # a call
        self._thread = ThreadPoolExecutor(1)

    def __getattr__(self, name: str):
        return SimpleNamespace(remote=lambda *arguments: self._thread.submit(self._serve, name, *arguments))

    def _serve(self, name: str, *arguments: Any) -> None:
        if self.dies_at == name:
            raise ActorDiedError()
        self.calls.append(name)
        if name == "init_weight_transfer_engine":
            self.init_info = self.engine.parse_init_info(arguments[0].init_info)
            self.engine.init_transfer_engine(self.init_info)
        elif name == "update_weights":
            self.engine.receive_weights(self.engine.parse_update_info(arguments[0].update_info))
        else:
            getattr(self.engine, name)()


UPDATE = ["start_weight_update", "update_weights", "finish_weight_update"]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch) -> None:
    def get(calls: list[Future]) -> list[Any]:
        return [call.result(PATIENCE_S) for call in calls]

    monkeypatch.setattr("ray.get", get)


@pytest.fixture
def wire(monkeypatch) -> Wire:
    wire = Wire()

    def join(init_info, parallel_config) -> queue.Queue:
        wire.receivers.append(queue.Queue())
        return wire.receivers[-1]

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", wire.trainer_endpoint)
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", join)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", wire.produce)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", wire.consume)
    return wire


class Passes:
    """A learner's parameters: counts passes over them, and how many came to their end."""

    def __init__(self):
        self.begun = self.ended = 0

    def __call__(self):
        self.begun += 1
        yield from NAMED
        self.ended += 1


def holds(actor: Actor) -> bool:
    held = actor.model.held
    return held.keys() == dict(NAMED).keys() and all(torch.equal(held[n], t) for n, t in NAMED)


def test_nccl_sends_to_a_group_that_lasts_while_its_actors_do(wire):
    actors, sender = [Actor("collective") for _ in range(3)], WeightSender("collective", 0, Passes())
    for group in (actors[:2], actors[:2], actors):
        for actor in actors:
            actor.model.held.clear()
        assert sender.send(ADDRESS, list(group)) == 6 * 4 + 4 * 2
        assert all(map(holds, group))
        infos = [asdict(actor.init_info) for actor in group]
        assert [info["rank_offset"] for info in infos] == list(range(1, 1 + len(group)))
        assert {info["world_size"] for info in infos} == {1 + len(group)}
    init = ["init_weight_transfer_engine"]
    assert actors[0].calls == [*init, *UPDATE, *UPDATE, *init, *UPDATE]
    assert actors[2].calls == [*init, *UPDATE]
    assert (wire.num_groups, wire.num_destroyed) == (2, 1)


def test_each_shard_of_each_actor_has_a_rank_in_the_group(wire):
    """An actor's workers add their rank to its offset (worker_init_process_group)."""
    actors = [Actor("collective") for _ in range(3)]
    WeightSender("collective", 0, Passes(), shards=2).send(ADDRESS, list(actors))
    assert [actor.init_info.rank_offset for actor in actors] == [1, 3, 5]
    assert {actor.init_info.world_size for actor in actors} == {7}


@pytest.mark.parametrize(
    "dies_at", ["init_weight_transfer_engine", "start_weight_update", "finish_weight_update"]
)
def test_after_an_actor_died_rank_0_makes_the_passes_that_the_others_make(wire, dies_at):
    """Under ZeRO-3 each pass is a collective of the learner's ranks."""
    actors = [Actor("collective"), Actor("collective")]
    passes = [Passes(), Passes()]
    senders = [WeightSender("collective", rank, passes[rank]) for rank in (0, 1)]
    actors[1].dies_at = dies_at
    with pytest.raises(WeightsLostError, match="the actors did not take the weights"):
        senders[0].send(ADDRESS, list(actors))
    senders[1].send(ADDRESS, list(actors))
    assert passes[0].ended == passes[1].ended == passes[0].begun == passes[1].begun
    senders[0].send(ADDRESS, actors[:1])
    assert holds(actors[0]), "a new group works"


@pytest.fixture
def shared_gpu(monkeypatch) -> None:
    """CUDA's part of `ipc`, in one process."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="gpu-0"))
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr("torch.cuda.ipc_collect", lambda: None)
    monkeypatch.setattr(ipc_engine, "reduce_tensor", lambda tensor: (None, [tensor, *[None] * 6]))
    monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", lambda tensor, *_: tensor)


def test_ipc_hands_over_the_memory_of_a_shared_gpu(shared_gpu):
    actor, sender = Actor("ipc"), WeightSender("ipc", 0, Passes())
    assert sender.send(ADDRESS, [actor]) == 6 * 4 + 4 * 2
    assert holds(actor) and actor.calls == ["init_weight_transfer_engine", *UPDATE]


@pytest.mark.parametrize("dies_at", ["init_weight_transfer_engine", *UPDATE])
def test_after_ipc_failed_rank_0_makes_the_collectives_that_the_others_make(shared_gpu, monkeypatch, dies_at):
    made: list[str] = []

    def gather(handles: list[Any], own: Any) -> None:
        made.append("gather")
        handles[0] = own

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr("torch.distributed.barrier", lambda: made.append("barrier"))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    actor, passes = Actor("ipc"), [Passes(), Passes()]
    actor.dies_at = dies_at
    senders = [WeightSender("ipc", rank, passes[rank], world_size=2) for rank in (0, 1)]
    with pytest.raises(WeightsLostError):
        senders[0].send(ADDRESS, [actor])
    of_rank_0, made[:] = list(made), []
    senders[1].send(ADDRESS, [actor])
    assert of_rank_0 == made == ["gather", "barrier", "barrier"]
    assert passes[0].ended == passes[1].ended == 2


@pytest.mark.parametrize("way", BACKENDS)
def test_an_engine_of_any_way_takes_buckets_of_the_object_store(way):
    actor = Actor(way)
    actor.engine.update_weights({"buckets": list(to_buckets(NAMED, 1, 8))})
    assert holds(actor)


@pytest.mark.parametrize(
    ("num_gpus", "options", "way"),
    [
        ((0, 0), [], "object_store"),
        ((1, 1), [], "collective"),
        ((1, 1), ["learner.lora_rank=4"], "object_store"),
        ((1, 1), ["learner.lora_rank=4", "learner.lora_publish=merged"], "collective"),
        ((1, 1), ["learner.weight_transfer=object_store"], "object_store"),
        ((0.5, 0.5), [], "ipc"),
        ((0.5, 0.5), ["learner.zero_stage=3"], "object_store"),  # a copy of all weights beside the shares
        ((0.5, 0.5), ["learner.zero_stage=3", "learner.weight_transfer=ipc"], "ipc"),
        ((1, 0.5), [], "object_store"),
        ((0.5, 1), [], "object_store"),
        ((0, 1), [], "object_store"),
    ],
)
def test_unless_told_otherwise_weights_go_between_gpus_where_these_allow_it(num_gpus, options, way):
    roles = zip(("learner", "rollout"), num_gpus, strict=True)
    gpus = [f"{role}.num_gpus={n}" for role, n in roles]
    assert load_demo([*gpus, "rollout.dtype=bfloat16", *options]).weight_transfer == way


@pytest.mark.parametrize(
    ("way", "num_gpus", "is_allowed"),
    [
        ("object_store", 0, True),
        *(("collective", n, n == 1) for n in (0, 0.5, 1)),
        *(("ipc", n, n == 0.5) for n in (0, 0.5, 1)),
    ],
)
def test_a_way_that_the_devices_do_not_have_is_bad_input(way, num_gpus, is_allowed):
    assert way in BACKENDS
    options = [f"learner.weight_transfer={way}"]
    options += [f"{part}.num_gpus={num_gpus}" for part in ("learner", "rollout")]
    if is_allowed:
        assert load_demo(options).learner.weight_transfer == way
        return
    with pytest.raises(ConfigError, match=f"weight_transfer={way} needs") as caught:
        load_demo(options)
    assert "\n" not in str(caught.value)
