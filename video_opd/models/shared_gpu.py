"""Processes on one GPU: each keeps to its share, and engines start one after another."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTEXT_BYTES = 1 << 30  # CUDA context and libraries of a process: assumed, not measured


def is_shared(num_gpus: float) -> bool:
    return 0 < num_gpus < 1


def keep_to_share(num_gpus: float) -> None:
    """Limits torch to the process's share of its GPU, less CONTEXT_BYTES; without a share does nothing.

    At the limit torch frees what it only caches, which would otherwise grow into a neighbour's share."""
    if is_shared(num_gpus):
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, num_gpus - CONTEXT_BYTES / total))


@contextmanager
def starting_alone(num_gpus: float) -> Iterator[None]:
    """Within the block no other engine starts on the GPU that this process shares, whoever started it."""
    if not is_shared(num_gpus):
        yield
        return
    keep_to_share(num_gpus)
    folder = Path(tempfile.gettempdir(), f"video_opd-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").replace("/", "-")  # set by Ray: this process's own
    with (folder / f"gpu-{gpu}.lock").open("w") as lock:  # its end ends the lock
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
