"""Buckets of weights in Ray's object store: the format, both sides, and the check that a version is whole."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from video_opd.errors import WeightsLostError

Pair = tuple[str, torch.Tensor]
Named = Iterator[Pair]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Several tensors of one dtype, in order. Receivers share its memory: nobody writes to it."""

    policy_version: int
    first: int  # number of the version's tensors in earlier buckets
    is_last: bool  # of the version
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str  # torch dtype name, e.g. "bfloat16"
    parts: tuple[np.ndarray, ...]  # uint8[bytes] of each tensor

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def to_buckets(named: Iterable[Pair], policy_version: int, bucket_bytes: int) -> Iterator[WeightBucket]:
    """Groups tensors, in order, into buckets of one dtype and about `bucket_bytes` each.

    Those on the CPU are not copied. Those on a GPU are, by one wait a bucket.
    """
    waiting: list[Pair] = []
    size = first = 0
    for name, tensor in named:
        if waiting and (size + tensor.nbytes > bucket_bytes or tensor.dtype != waiting[0][1].dtype):
            yield _bucket(waiting, policy_version, first, is_last=False)
            first += len(waiting)
            waiting, size = [], 0
        waiting.append((name, tensor))
        size += tensor.nbytes
    if waiting:
        yield _bucket(waiting, policy_version, first, is_last=True)


def _bucket(named: list[Pair], policy_version: int, first: int, is_last: bool) -> WeightBucket:
    return WeightBucket(
        policy_version=policy_version,
        first=first,
        is_last=is_last,
        names=tuple(n for n, _ in named),
        shapes=tuple(tuple(t.shape) for _, t in named),
        dtype=str(named[0][1].dtype).removeprefix("torch."),
        parts=tuple(part.numpy() for part in _on_host([_bytes_of(t) for _, t in named])),
    )


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _on_host(parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """As they are on the CPU; else in pinned memory, which torch gives again when its user lets go of it."""
    if parts[0].device.type == "cpu":
        return parts
    sizes = [len(part) for part in parts]
    staged = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True).split(sizes)
    for host, part in zip(staged, parts, strict=True):
        host.copy_(part, non_blocking=True)
    torch.accelerator.synchronize()
    return staged


def check_whole(buckets: Sequence[WeightBucket], policy_version: int) -> None:
    """Raises WeightsLostError unless the buckets are exactly one version, in order and complete."""
    version, expected = f"version {policy_version}", 0
    for bucket in buckets:
        if bucket.policy_version != policy_version:
            raise WeightsLostError(f"{version}: a bucket of version {bucket.policy_version} came")
        if bucket.first != expected:
            raise WeightsLostError(f"{version}: tensor {bucket.first} came where tensor {expected} was due")
        expected += len(bucket.names)
    if not buckets or not buckets[-1].is_last:
        raise WeightsLostError(f"{version} ended after {expected} tensors, before its last bucket")


def unpack(buckets: Iterable[WeightBucket]) -> Named:
    """The named tensors of all buckets, as read-only views of the buckets' memory."""
    for bucket in buckets:
        dtype = getattr(torch, bucket.dtype)
        for name, shape, part in zip(bucket.names, bucket.shapes, bucket.parts, strict=True):
            with warnings.catch_warnings():  # Ray's arrays are read-only
                warnings.simplefilter("ignore", UserWarning)
                flat = torch.from_numpy(part)
            yield name, flat.view(dtype).view(shape)
