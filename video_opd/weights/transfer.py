"""vLLM's weight transfer: engines for Ray's object store, for NCCL and for the memory of a shared GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import distributed
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from video_opd.cluster.faults import cause_of
from video_opd.errors import WeightsLostError
from video_opd.weights.buckets import Named, unpack

BACKENDS = {way: f"video_opd_{way}" for way in ("object_store", "collective", "ipc")}
"""Config.weight_transfer: the name of the engine in vLLM."""


class TakesBuckets(base.WeightTransferEngine):
    """An engine that also loads buckets of the object store into a vLLM worker's model, on CPUs and GPUs."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """update_info: `buckets` of a version that is whole, or what the engine itself takes."""
        if "buckets" not in update_info:
            super().update_weights(update_info)
            return
        model: Any = self.model
        model.load_weights(unpack(update_info["buckets"]))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


class NcclEngine(TakesBuckets, NCCLWeightTransferEngine):
    """vLLM's own, which can fall back to the object store."""


class IpcEngine(TakesBuckets, IPCWeightTransferEngine):
    """vLLM's own, which can fall back to the object store."""


class ObjectStoreEngine(TakesBuckets):
    """Takes buckets alone."""

    init_info_cls = base.WeightTransferInitInfo
    update_info_cls = base.WeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: base.WeightTransferInitInfo) -> None:
        """The object store needs no rendezvous."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: base.WeightTransferUpdateInfo) -> None:
        raise AssertionError("it takes buckets")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # on a CPU a head multiplies by a packed copy of its weight: the reload leaves the copy of a tied one
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass


for _way, _engine in {"object_store": ObjectStoreEngine, "collective": NcclEngine, "ipc": IpcEngine}.items():
    WeightTransferEngineFactory.register_engine(BACKENDS[_way], _engine)


class WorkerExtension:
    """What the process of each vLLM worker imports, as `worker_extension_cls`: it registers the engines."""


WORKER = f"{__name__}.{WorkerExtension.__name__}"


class ActorsClient(RayVLLMWeightSyncClient):
    """vLLM's client for rollout actors, which are engines of their own rather than replicas of one."""

    def __init__(self, actors: list[Any], shards: int):
        super().__init__(actors)
        self._shards = shards

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Gives each actor's shards ranks of their own: vLLM counts from `rank_offset` within one engine."""
        calls = []
        for number, handle in enumerate(self.handles):
            before = number * self._shards
            of_actor = {k: v + before if k == "rank_offset" else v for k, v in init_info.items()}
            calls.append(handle.init_weight_transfer_engine.remote(base.WeightTransferInitRequest(of_actor)))
        ray.get(calls)


class ParameterSource(base.WeightSource):
    """A learner rank's parameters. Under ZeRO-3 each pass over them is a collective of all ranks."""

    def __init__(self, parameters: Callable[[], Named]):
        self._parameters = parameters
        self._metadata: list[base.ParamMeta] = []
        self._pass: Named = iter(())

    def begin(self) -> None:
        """Prepares one pass, for one publication."""
        self._pass = self._parameters()

    def metadata(self) -> list[base.ParamMeta]:
        """Found by a first pass: sharded parameters do not show their shapes."""
        if not self._metadata:
            self._metadata = [base.ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self._parameters()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._pass

    def finish(self) -> bool:
        """After a failure on this rank: makes the passes that the other ranks make. False: none was left."""
        was_left = any(True for _ in self._pass)
        for _ in self._pass:
            pass
        return was_left

    @property
    def num_bytes(self) -> int:
        return sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in self.metadata())


class WeightSender:
    """A learner rank's side of vLLM's `nccl` and `ipc`. Rank 0 sends; all ranks make the same calls."""

    def __init__(
        self,
        weight_transfer: str,
        rank: int,
        parameters: Callable[[], Named],
        world_size: int = 1,
        shards: int = 1,
        bucket_bytes: int = 256 << 20,
    ):
        """`shards` of each actor, which all receive. NCCL sends about `bucket_bytes` at a time."""
        self._is_ipc, self._rank, self._world_size = weight_transfer == "ipc", rank, world_size
        self._shards, self._bucket_bytes = shards, bucket_bytes
        self._source = ParameterSource(parameters)
        self._actors: list[Any] = []
        self._engine: base.TrainerWeightTransferEngine | None = None

    def send(self, address: tuple[str, int], actors: list[Any]) -> int:
        """Sends the weights to all actors, as one group; returns their bytes.

        `address`: of rank 0, with a port that is free for a new group. Raises WeightsLostError when an actor
        or the group fails. Where an actor dies during the transfer, NCCL waits until the driver's deadline.
        """
        self._source.begin()
        try:
            if self._engine is None or self._actors != actors:
                self._leave_group()
                self._actors = actors
                info = NCCLTrainerInitInfo(
                    *address,
                    world_size=1 + len(actors) * self._shards,
                    packed_buffer_size_bytes=self._bucket_bytes,
                    rank=self._rank,
                )
                self._engine = WeightTransferTrainerFactory.trainer_init(
                    IPCTrainerInitInfo(rank=self._rank) if self._is_ipc else info,
                    client=ActorsClient(actors, self._shards),
                    source=self._source,
                )
            self._engine.send_weights()
        except (RayError, RuntimeError) as error:  # torch's and NCCL's errors are RuntimeErrors
            self._finish_with_others()
            self._leave_group()
            raise WeightsLostError(f"the actors did not take the weights: {cause_of(error)}") from error
        return self._source.num_bytes

    def _finish_with_others(self) -> None:
        """After a failure on rank 0: does with the other ranks what they do in vLLM's engine and after it."""
        was_left = self._source.finish()
        if self._is_ipc and self._world_size > 1:  # as IPCTrainerWeightTransferEngine.send_weights
            if was_left:
                distributed.all_gather_object([None] * self._world_size, None)
                distributed.barrier()
            distributed.barrier()
        self._source.metadata()  # the others report its bytes

    def _leave_group(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None
