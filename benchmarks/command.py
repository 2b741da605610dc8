"""What the benchmarks share: arguments, temporary runs of the demo, new processes, rows and their table."""

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
Row = dict[str, Any]

WARM_UP_STEPS = 2  # left out of a run's figures: engines allocate and caches fill


def make_parser(name: str, about: str | None, quick: str, overrides: bool = False) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`. `quick`: the help of --quick."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help=quick)
    if overrides:
        values = "configuration values of every run"
        parser.add_argument("overrides", nargs="*", metavar="key=value", help=values)
    return parser


@contextmanager
def temporary_demo(*overrides: str) -> Iterator[tuple[Config, Path]]:
    """The demo's config, and the run folder in a temporary folder where launch will put its run."""
    with tempfile.TemporaryDirectory() as runs:
        yield load_demo([*overrides, f"runs_dir={runs}", "run_name=benchmark"]), Path(runs) / "benchmark"


def make_clip(name: str) -> Clip:
    """A clip of a video that does not exist, for what reads no frames."""
    frames: dict[str, Any] = {"frame_indices": np.arange(0, 48, 2), "frame_size": (32, 32)}
    video: dict[str, Any] = {"num_video_frames": 48, "video_fps": 4.0, "duration_s": 12.0}
    return Clip(clip_id=name, video_path=f"/nowhere/{name}.mp4", **frames, **video)


def in_new_process(work: Callable[..., T], *arguments: Any) -> T:
    """Runs `work` with memory and a Ray of its own: Serve's threads outlive ray.shutdown in a process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def timed(work: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """(seconds, what `work` returned)."""
    started = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - started, result


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; empty if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_row(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def spread(values: Sequence[float]) -> str:
    """mean (lowest to highest)"""
    digits = 3 if max(values) <= 1 else 2 if max(values) < 10 else 0
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_result(result: Row, title: str, rows: Sequence[Mapping[str, Any]], *notes: str) -> None:
    """Prints `rows` (key -> value) as a table, the notes, and `result` as one line of JSON."""
    table = Table(*(key.replace("_", " ") for key in rows[0]), title=title)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=180).print(table)
    for note in notes:
        print(note)
    print(json.dumps(result))


def _cell(value: Any) -> str:
    """Three significant digits of a number, in full where it has more before the point; "-" for None.

    "lowest to highest" for a list of both.
    """
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value
