"""Memory from Linux: the peak of this process, and of a run's processes by role."""

import threading
from collections import Counter
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 2.0
ROLE_OF = {  # how a worker's title starts, idle or in a call; every other process below this one is Ray's own
    "ray::LearnerRank": "learner",
    "ray::learner-": "learner",
    "ray::RolloutActor": "actors",
    "ray::actor-": "actors",
    "ray::ServeReplica": "teacher",
    "ray::ServeController": "serve",
    "ray::SchedulerActor": "curriculum",
    "ray::curriculum": "curriculum",
}


def reset_peak() -> int:
    """Forgets the peak so far; returns the bytes in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most bytes in use since reset_peak."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def role_of(title: str) -> str:
    return next((role for start, role in ROLE_OF.items() if title.startswith(start)), "ray")


def sample() -> Counter[str]:
    """Proportional set size now, bytes by role."""
    me, sizes = psutil.Process(), Counter({"driver": psutil.Process().memory_full_info().pss})
    for process in me.children(recursive=True):
        try:
            sizes[role_of(process.cmdline()[0])] += process.memory_full_info().pss
        except (psutil.NoSuchProcess, IndexError):  # it ended while we looked
            continue
    return sizes


class PeakByRole:
    """The sample with the largest sum, and the largest of each role."""

    def __init__(self):
        self.at_peak: Counter[str] = Counter()
        self.of_role: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            sizes = sample()
            self.of_role |= sizes
            if sizes.total() > self.at_peak.total():
                self.at_peak = sizes
