"""Inside a vLLM worker: published weights -> the running model."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from video_opd.broadcast import BroadcastGroup, in_order
from video_opd.errors import WeightsLostError
from video_opd.types import BucketHeader, GroupPlace, WeightBucket

Named = Iterator[tuple[str, torch.Tensor]]


def unpack(buckets: Iterable[WeightBucket]) -> Named:
    """The named tensors of all buckets, over the buckets' own memory: for reading alone."""
    for bucket in buckets:
        with warnings.catch_warnings():  # of read-only arrays, which Ray's are
            warnings.simplefilter("ignore", UserWarning)
            parts = [torch.from_numpy(part) for part in bucket.parts]
        yield from _named(bucket.header, parts)


def split(buckets: Iterable[tuple[BucketHeader, torch.Tensor]]) -> Named:
    """The named tensors of flat buckets, over their own memory."""
    for header, flat in buckets:
        itemsize = getattr(torch, header.dtype).itemsize
        yield from _named(
            header, flat.split([itemsize * torch.Size(shape).numel() for shape in header.shapes])
        )


def _named(header: BucketHeader, parts: Iterable[torch.Tensor]) -> Named:
    dtype = getattr(torch, header.dtype)
    for name, shape, part in zip(header.names, header.shapes, parts, strict=True):
        yield name, part.view(dtype).view(shape)


class WeightReceiver:
    """vLLM worker extension: its methods are targets of `collective_rpc`. The caller resets vLLM's caches afterwards.

    Each returns why the version did not arrive whole, or None. If it did not, the model is a mixture that nobody may use; a
    later version that arrives whole mends it, since vLLM is never left in the middle of a reload.
    """

    def receive_buckets(self, policy_version: int, buckets: list[WeightBucket]) -> str | None:
        """Replaces the model's weights by buckets of the object store."""
        checked = in_order(((bucket.header, bucket) for bucket in buckets), policy_version)
        return self._reload(unpack(bucket for _, bucket in checked))

    def receive_broadcast(
        self, policy_version: int, place: GroupPlace | None, timeout_s: float
    ) -> str | None:
        """Replaces the model's weights by what rank 0 of the group sends. `place`: of a new group; None: in the last one."""
        try:
            group = self._join_group(place, timeout_s) if place else self._broadcast_group
            group.meet()
        except WeightsLostError as error:
            self._leave_group()
            return str(error)
        failure = self._reload(split(group.receive_version(policy_version)))
        if failure:
            self._leave_group()
        return failure

    def _join_group(self, place: GroupPlace, timeout_s: float) -> BroadcastGroup:
        self._leave_group()
        rank = place.rank + self.rank  # type: ignore[attr-defined]  # of this worker in its engine
        self._broadcast_group = BroadcastGroup(replace(place, rank=rank), timeout_s)
        return self._broadcast_group

    def _leave_group(self) -> None:
        group: BroadcastGroup | None = getattr(self, "_broadcast_group", None)
        if group is not None:
            group.close()

    def _reload(self, named: Named) -> str | None:
        failures: list[str] = []

        def until_lost() -> Named:
            """Ends early rather than raise into vLLM, whose layers would be left half taken apart."""
            try:
                yield from named
            except WeightsLostError as error:
                failures.append(str(error))

        self.reload_weights(weights_iterator=until_lost())  # type: ignore[attr-defined]  # vLLM's Worker
        self._repack_tied_head()
        return failures[0] if failures else None

    def _repack_tied_head(self) -> None:
        """On a CPU vLLM multiplies by a packed copy of the head's weight. A head tied to the embedding has no weight
        of its own in a checkpoint, so reload_weights leaves its packed copy as it was."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.get_model().modules():  # type: ignore[attr-defined]
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
