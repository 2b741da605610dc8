"""Where numbers go: phase clocks, metrics.jsonl, TensorBoard."""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from video_opd.prometheus import count
from video_opd.types import StepReport

PHASES = ("rollout", "score", "update", "publish", "evaluate")


class Lap(NamedTuple):
    """What happened since the lap before."""

    seconds: dict[str, float]  # by phase, and idle; phases that overlap each count in full
    tokens_per_s: dict[str, float]  # response tokens, of the phases that counted any
    wall_s: float


class PhaseClock:
    """Seconds in which at least one call of a phase was under way, and in which none was. Prometheus counts them too."""

    def __init__(self):
        self._active: dict[str, int] = {phase: 0 for phase in PHASES}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens: Counter[str] = Counter()
        self._since = self._lap_since = time.monotonic()

    def advance(self) -> None:
        """Up to now."""
        now = time.monotonic()
        active = [phase for phase in PHASES if self._active[phase]]
        for phase in active or ["idle"]:
            self._seconds[phase] += now - self._since
            count("phase_seconds", now - self._since, phase=phase)
        self._since = now

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.advance()
        self._active[phase] += 1
        try:
            yield
        finally:
            self.advance()
            self._active[phase] -= 1

    def count(self, phase: str, tokens: int) -> None:
        """Response tokens that a call of the phase was about."""
        self._tokens[phase] += tokens
        count("tokens", tokens, phase=phase)

    def lap(self) -> Lap:
        self.advance()
        seconds = {phase: self._seconds[phase] for phase in (*PHASES, "idle")}
        rates = {phase: tokens / seconds[phase] for phase, tokens in self._tokens.items() if seconds[phase]}
        self._seconds.clear()
        self._tokens.clear()
        wall_s, self._lap_since = self._since - self._lap_since, self._since
        return Lap(seconds, rates, wall_s)


class MetricSinks:
    """metrics.jsonl, one line a step, and TensorBoard. A resumed run goes on in the same files, each step once.

    What a step has no value for (the mIoU of unlabelled prompts, say) is left out of its line.
    """

    def __init__(self, run_dir: Path, start_step: int):
        from tensorboard.summary import Writer

        self._path = run_dir / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] < start_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.rename(self._path)
        self._file = self._path.open("a")
        self._board = Writer(str(run_dir / "tensorboard"))

    def write(self, report: StepReport, wall_s: float) -> None:
        known = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
        line = {"step": report.step, "policy_version": report.policy_version, "wall_s": wall_s, **known}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in known.items():
            self._board.add_scalar(name, value, report.step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a last line torn by a crash is left out."""
    return [json.loads(line) for line in _whole_lines(run_dir / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
