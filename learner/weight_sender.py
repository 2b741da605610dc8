"""The student's weights, cut into buckets for the trip to the actors."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from video_opd.types import BucketHeader, WeightBucket

Bucket = tuple[BucketHeader, list[torch.Tensor]]
"""What it holds, and the tensors themselves, wherever they are."""


def to_buckets(
    named: Iterable[tuple[str, torch.Tensor]], policy_version: int, bucket_bytes: int
) -> Iterator[WeightBucket]:
    """Buckets for the object store, which copies from the tensors themselves. They must be on the CPU."""
    for header, tensors in tensor_buckets(named, policy_version, bucket_bytes):
        yield WeightBucket(header=header, parts=tuple(_bytes(t).numpy() for t in tensors))


def tensor_buckets(
    named: Iterable[tuple[str, torch.Tensor]], policy_version: int, bucket_bytes: int
) -> Iterator[Bucket]:
    """Groups tensors of one dtype each, about `bucket_bytes` together, in order, none left out. Copies nothing."""
    waiting: list[tuple[str, torch.Tensor]] = []
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


def _bucket(named: list[tuple[str, torch.Tensor]], policy_version: int, first: int, is_last: bool) -> Bucket:
    header = BucketHeader(
        policy_version=policy_version,
        first=first,
        is_last=is_last,
        names=tuple(n for n, _ in named),
        shapes=tuple(tuple(t.shape) for _, t in named),
        dtype=str(named[0][1].dtype).removeprefix("torch."),
    )
    return header, [t.detach() for _, t in named]


def to_flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8[bytes of all], in order, on the tensors' device: one broadcast's worth. The memory of a single tensor is shared."""
    parts = [_bytes(t) for t in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
