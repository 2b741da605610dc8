"""Memory as Linux reports it: the peak of this process, and of a run's processes by role."""

import threading
from collections import Counter
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 2.0
ROLE_OF = {  # how a worker's title starts, idle or in a call; every other child process is Ray's own
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
    """Resets the peak; returns the bytes in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most bytes in use since reset_peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024  # in kB


def role_of(process: psutil.Process) -> str:
    """Of a descendant of this process. Raises NoSuchProcess if it has ended."""
    command = process.cmdline()
    if not command:
        raise psutil.NoSuchProcess(process.pid)
    return next((role for start, role in ROLE_OF.items() if command[0].startswith(start)), "ray")


def sample() -> Counter[str]:
    """Proportional set size of all processes now, bytes by role; shared pages count once."""
    me = psutil.Process()
    sizes = Counter({"driver": me.memory_full_info().pss})
    for process in me.children(recursive=True):
        try:
            sizes[role_of(process)] += process.memory_full_info().pss
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return sizes


class Watcher:
    """While entered, calls `look` every `every_s` seconds, in a thread."""

    def __init__(self, every_s: float):
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def look(self) -> None:
        raise NotImplementedError

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.look()


class PeakByRole(Watcher):
    """Samples memory: the sample with the largest sum, and the largest of each role."""

    def __init__(self):
        super().__init__(SAMPLE_EVERY_S)
        self.at_peak: Counter[str] = Counter()
        self.of_role: Counter[str] = Counter()

    def look(self) -> None:
        sizes = sample()
        self.of_role |= sizes
        self.at_peak = max(self.at_peak, sizes, key=Counter.total)
