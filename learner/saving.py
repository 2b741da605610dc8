"""A checkpoint that one rank cannot write fails on all ranks: DeepSpeed's own barriers would wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import distributed


@contextmanager
def writing_on_all_ranks(checkpoint_engine: Any, folder: Path) -> Iterator[None]:
    """In the block, DeepSpeed saves below `folder`. Raises OSError on all ranks when one cannot write."""
    failures: list[Exception] = []
    write = checkpoint_engine.save

    def save(*arguments: Any, **options: Any) -> None:
        try:
            write(*arguments, **options)
        except (OSError, RuntimeError) as error:  # torch raises the latter when the disk is full
            failures.append(error)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        failures.append(error)
    _raise_on_all(failures)
    with patch.object(checkpoint_engine, "save", save):
        yield
    _raise_on_all(failures)


def _raise_on_all(failures: list[Exception]) -> None:
    """Raises OSError on every rank, with its reason, if any rank has a failure."""
    reasons = [""] * distributed.get_world_size()
    distributed.all_gather_object(reasons, str(failures[0]) if failures else "")
    if failed := [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]:
        raise OSError(failed[0])
