"""What fails on one rank leaves no other waiting for it in a barrier of DeepSpeed or in a collective."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from torch import distributed

T = TypeVar("T")


@contextmanager
def taken_to_the_end(collective: Iterator[T]) -> Iterator[Iterator[T]]:
    """An iterator whose every item is a collective of all ranks: when the block fails, the rest is passed."""
    try:
        yield collective
    finally:
        for _ in collective:
            pass


@contextmanager
def writing_on_all_ranks(engine: Any, folder: Path) -> Iterator[None]:
    """In the block, a DeepSpeed engine saves below `folder`. Raises OSError on all ranks if one cannot write.

    DeepSpeed writes by two methods: tensors on every rank, scripts for their recovery on rank 0 alone.
    """
    failures: list[Exception] = []

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any, **options: Any) -> None:
            try:
                write(*arguments, **options)
            except (OSError, RuntimeError) as error:  # torch raises the latter when the disk is full
                failures.append(error)

        return noted

    noting(folder.mkdir)(parents=True, exist_ok=True)
    _raise_on_all(failures)
    with ExitStack() as patches:
        for owner, name in ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")):
            patches.enter_context(patch.object(owner, name, noting(getattr(owner, name))))
        yield
    _raise_on_all(failures)


def _raise_on_all(failures: list[Exception]) -> None:
    """Raises OSError on every rank, with its reason, if any rank has a failure."""
    reasons = [""] * distributed.get_world_size()
    distributed.all_gather_object(reasons, str(failures[0]) if failures else "")
    if failed := [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]:
        raise OSError(failed[0])
