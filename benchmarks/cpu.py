"""CPU time as Linux reports it: of this process and all that it started, at each step of a run."""

import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.memory import Watcher, role_of

LOOK_EVERY_S = 0.02


class Mark(NamedTuple):
    """When a run had written so many lines of metrics."""

    num_steps: int
    wall_s: float
    cpu_s: dict[str, float]  # by role


def cpu_seconds() -> dict[str, float]:
    """Of this process and its descendants, those that have ended too, by role; see benchmarks/memory.py."""
    me, total = psutil.Process(), defaultdict[str, float](float)
    total["driver"] = sum(me.cpu_times()[:4])  # user and system, its own and of children that ended
    for process in me.children(recursive=True):
        try:
            total[role_of(process)] += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return total


class StepMarks(Watcher):
    """Looks whether the run has written another line of metrics."""

    def __init__(self, metrics: Path):
        super().__init__(LOOK_EVERY_S)
        self.marks: list[Mark] = []
        self._metrics, self._size = metrics, 0

    def look(self) -> None:
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        if size != self._size:
            self._size, num_steps = size, self._metrics.read_bytes().count(b"\n")
            self.marks.append(Mark(num_steps, time.monotonic(), cpu_seconds()))


def between(marks: list[Mark], first: int, last: int) -> tuple[int, float, dict[str, float]]:
    """(steps, seconds, CPU seconds) between the marks nearest to steps `first` and `last`, inside of them."""
    inside = [mark for mark in marks if first <= mark.num_steps <= last]
    begin, end = inside[0], inside[-1]
    spent = {role: cpu_s - begin.cpu_s.get(role, 0.0) for role, cpu_s in end.cpu_s.items()}
    return end.num_steps - begin.num_steps, end.wall_s - begin.wall_s, spent
