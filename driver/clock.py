"""Seconds by phase."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from video_opd.prometheus import count

PHASES: tuple[str, ...] = ("rollout", "score", "update", "publish", "evaluate")


class PhaseClock:
    """Counts the seconds with a call of a phase under way (in full where phases overlap), and with none."""

    def __init__(self):
        self._active = dict.fromkeys(PHASES, 0)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens: Counter[str] = Counter()
        self._uncounted: defaultdict[tuple[str, str], float] = defaultdict(float)  # since `advance`
        self._since = self._taken_at = time.monotonic()

    def advance(self) -> None:
        """Counts the seconds up to now, and tells Prometheus, which takes too long for each end of a call."""
        self._advance()
        for (name, phase), amount in self._uncounted.items():
            count(name, amount, phase=phase)
        self._uncounted.clear()

    def _advance(self) -> None:
        now = time.monotonic()
        active = [phase for phase in PHASES if self._active[phase]]
        for phase in active or ["idle"]:
            self._seconds[phase] += now - self._since
            self._uncounted["phase_seconds", phase] += now - self._since
        self._since = now

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The block is a call of the phase."""
        self._advance()
        self._active[phase] += 1
        try:
            yield
        finally:
            self._advance()
            self._active[phase] -= 1

    def count(self, phase: str, tokens: int) -> None:
        """Adds response tokens that a call of the phase handled."""
        self._tokens[phase] += tokens
        self._uncounted["tokens", phase] += tokens

    def take_times(self) -> tuple[dict[str, float], dict[str, float], float]:
        """Seconds by phase and idle, response tokens/s by phase, and wall seconds, since the last call."""
        self.advance()
        seconds = {phase: self._seconds[phase] for phase in (*PHASES, "idle")}
        rates = {phase: tokens / seconds[phase] for phase, tokens in self._tokens.items() if seconds[phase]}
        self._seconds.clear()
        self._tokens.clear()
        wall_s, self._taken_at = self._since - self._taken_at, self._since
        return seconds, rates, wall_s
