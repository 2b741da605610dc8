"""Counts what the processes of a run do to its clips, as it happens: a line of a file for each call."""

import json
import os
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

FOLDER, ROLE = "EMULATED_EVENTS", "EMULATED_ROLE"  # environment variables

_nested = threading.local()


class Event(NamedTuple):
    """One call. `cpu_s`: of its thread, without the recorded calls inside it."""

    kind: str
    role: str
    began: float  # seconds since the epoch
    wall_s: float
    cpu_s: float


def record_calls(
    owner: Any, name: str, kind: str, counts: Callable[..., bool] = lambda *_, **__: True
) -> None:
    """Replaces the function `name` of a class or module by one that records the calls whose arguments count.

    Once a process.
    """
    work: Callable[..., Any] = getattr(owner, name)
    if hasattr(work, "__wrapped__"):
        return

    @wraps(work)
    def recorded(*arguments: Any, **options: Any) -> Any:
        if not counts(*arguments, **options):
            return work(*arguments, **options)
        outside, _nested.cpu_s = getattr(_nested, "cpu_s", 0.0), 0.0
        began, wall_s, cpu_s = time.time(), time.perf_counter(), time.thread_time()
        try:
            return work(*arguments, **options)
        finally:
            wall_s, cpu_s = time.perf_counter() - wall_s, time.thread_time() - cpu_s
            _append(Event(kind, os.environ.get(ROLE, ""), began, wall_s, cpu_s - _nested.cpu_s))
            _nested.cpu_s = outside + cpu_s

    setattr(owner, name, recorded)


def _append(event: Event) -> None:
    with (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def read_events(folder: Path) -> list[Event]:
    """Of all processes."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [Event(*json.loads(line)) for line in lines]
