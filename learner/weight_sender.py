"""The student's weights, cut into buckets for the trip to the actors."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from video_opd.types import WeightBucket


def to_buckets(named: Iterable[tuple[str, torch.Tensor]], policy_version: int, bucket_bytes: int) -> Iterator[WeightBucket]:
    """Packs CPU tensors of one dtype each into flat buffers of about `bucket_bytes`, in order, none left out."""
    waiting: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in named:
        if waiting and (size + tensor.nbytes > bucket_bytes or tensor.dtype != waiting[0][1].dtype):
            yield _pack(waiting, policy_version)
            waiting, size = [], 0
        waiting.append((name, tensor))
        size += tensor.nbytes
    if waiting:
        yield _pack(waiting, policy_version)


def _pack(named: list[tuple[str, torch.Tensor]], policy_version: int) -> WeightBucket:
    flat = [t.detach().contiguous().flatten().view(torch.uint8).numpy() for _, t in named]
    return WeightBucket(
        policy_version=policy_version,
        names=tuple(n for n, _ in named),
        shapes=tuple(tuple(t.shape) for _, t in named),
        dtype=str(named[0][1].dtype).removeprefix("torch."),
        buffer=np.concatenate(flat),
    )
