"""Feeds the trackers of a run with the lines of metrics.jsonl. None of them can stop or delay training."""

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from driver.records.masking import masked, masked_config
from driver.records.tracker_kinds import KINDS, SEND_S, About, Tracker
from video_opd.cluster.faults import cause_of
from video_opd.config import Config
from video_opd.files.run_folder import environment, write_json
from video_opd.logs import log

STATE = "trackers.json"  # of a run folder; by tracker: id of the run there, first step that was not sent
GIVE_UP_S = 10.0  # as SEND_S, after a run that failed
NOT_METRICS = ("step", "policy_version", "wall_s")


class Trackers:
    """A context: the trackers are told of the run's end. Every call returns at once."""

    def __init__(self, folder: Path, config: Config, kinds: Mapping[str, type[Tracker]] = KINDS):
        sent = masked_config(config) | {"environment": environment()}
        self._about, self._lock, self._path = About(folder, sent), threading.Lock(), folder / STATE
        self._feeds = {name: _Feed(name, kinds[name](), self._keep) for name in config.trackers}
        self._state: dict[str, dict[str, Any]] = {}
        self._has_begun = False

    def begin(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """lines: what metrics.jsonl has. A tracker is sent those of them that it lacks. Once in a process."""
        if self._has_begun:
            return
        self._has_begun = True
        with suppress(FileNotFoundError, ValueError):  # damaged: as without it, they get runs of their own
            self._state = json.loads(self._path.read_text())
        for name, feed in self._feeds.items():
            feed.begin(self._about, self._state.get(name, {}), lines)

    def write(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl. A step that was sent before is not sent again."""
        for feed in self._feeds.values():
            feed.write(line)

    def attach(self, files: Sequence[Path]) -> None:
        """HTML and PNG files."""
        for feed in self._feeds.values():
            feed.attach(files)

    def states(self) -> dict[str, str]:
        """By tracker: "on", or why it is off. Waits for what was not sent yet, at most SEND_S."""
        self._wait(SEND_S)
        return {name: feed.off or "on" for name, feed in self._feeds.items()}

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for feed in self._feeds.values():
            feed.end(failed=kind is not None)
        self._wait(GIVE_UP_S if kind else SEND_S)

    def _wait(self, timeout_s: float) -> None:
        """Until every tracker has all that it was given; one that has not by then is off."""
        deadline = time.monotonic() + timeout_s
        for feed, done in [(feed, feed.mark()) for feed in self._feeds.values() if not feed.off]:
            if self._has_begun and not done.wait(max(0.0, deadline - time.monotonic())):
                feed.turn_off("it has not taken in time what it was sent")

    def _keep(self, name: str, state: dict[str, Any]) -> None:
        with self._lock:
            self._state[name] = state
            write_json(self._path, self._state)


class _Feed:
    """A tracker, its thread and what waits for it. The thread does not keep the process alive."""

    def __init__(self, name: str, tracker: Tracker, keep: Callable[[str, dict[str, Any]], None]):
        self._name, self._tracker, self._keep = name, tracker, keep
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker-{name}")
        self.off = ""  # why, once it is
        self._run, self._next_step = "", 0

    def begin(self, about: About, state: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        def call() -> None:
            known = state.get("run")
            self._run = self._tracker.begin(about, known)
            self._has_sent(state["next_step"] if self._run == known else 0)
            if self._next_step > (first := len(lines) and lines[-1]["step"] + 1):
                has = f"has steps {first} to {self._next_step - 1} of an earlier attempt"
                log.info("the tracker %s %s, and keeps those", self._name, has)
            for line in lines:
                self._send(line)

        self._put(call)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        self._put(lambda: self._send(line))

    def attach(self, files: Sequence[Path]) -> None:
        self._put(lambda: self._tracker.attach(files, max(0, self._next_step - 1)))

    def end(self, failed: bool) -> None:
        self._put(lambda: self._tracker.end(failed))

    def mark(self) -> threading.Event:
        """Set once the tracker has all that it was given before."""
        done = threading.Event()
        self._calls.put(done.set)
        return done

    def _put(self, call: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                if not self.off:
                    call()
            except Exception as error:  # of any library behind a tracker
                self.turn_off(masked(f"{type(error).__name__}: {cause_of(error)}"))

        self._calls.put(guarded)

    def _work(self) -> None:
        while True:
            self._calls.get()()

    def turn_off(self, why: str) -> None:
        if self.off:
            return
        self.off = f"off from step {self._next_step} on: {why}"
        log.warning("warning: the tracker %s is %s; the run goes on without it", self._name, self.off)

    def _send(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        if step >= self._next_step:
            metrics = {name: value for name, value in line.items() if name not in NOT_METRICS}
            self._tracker.log(metrics, step, line["wall_s"])
            self._has_sent(step + 1)

    def _has_sent(self, next_step: int) -> None:
        self._next_step = next_step
        self._keep(self._name, {"run": self._run, "next_step": next_step})
