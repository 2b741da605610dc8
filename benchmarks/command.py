"""What the benchmarks share: arguments, temporary runs of the demo, new processes, printed results."""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from video_opd.config import Config
from video_opd.config_file import load_demo
from video_opd.types import Clip

T = TypeVar("T")

WARM_UP_STEPS = 2  # left out of a run's figures: engines allocate and caches fill


def make_parser(name: str, about: str | None, quick: str, overrides: bool = False) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`. `quick`: the help of --quick."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help=quick)
    if overrides:
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="configuration values of every run"
        )
    return parser


@contextmanager
def temporary_demo(*overrides: str) -> Iterator[tuple[Config, Path]]:
    """The demo's config, and the run folder in a temporary folder where launch will put its run."""
    with tempfile.TemporaryDirectory() as runs:
        yield load_demo([*overrides, f"runs_dir={runs}", "run_name=benchmark"]), Path(runs) / "benchmark"


def make_clip(name: str) -> Clip:
    """A clip of a video that does not exist, for what reads no frames."""
    return Clip(
        clip_id=name,
        video_path=f"/nowhere/{name}.mp4",
        num_video_frames=48,
        video_fps=4.0,
        duration_s=12.0,
        frame_indices=np.arange(0, 48, 2),
        frame_size=(32, 32),
    )


def in_new_process(work: Callable[..., T], *arguments: Any) -> T:
    """Runs `work` in a fresh process, with memory and a Ray of its own.

    A process launches once: threads of Serve outlive ray.shutdown and would start another Ray.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """(seconds, what `work` returned)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def print_result(
    result: Mapping[str, Any],
    title: str,
    rows: Sequence[Mapping[str, str]],
    notes: Sequence[str] = (),
    width: int | None = None,
) -> None:
    """Prints a table of `rows` (heading -> cell), the notes, and `result` as one line of JSON."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    Console(width=width).print(table)
    for note in notes:
        print(note)
    print(json.dumps(result))
