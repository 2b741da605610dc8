"""Seconds by phase."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from video_opd.prometheus import count

PHASES = ("rollout", "score", "update", "publish", "evaluate")


class PhaseTimes(NamedTuple):
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

    def take_times(self) -> PhaseTimes:
        self.advance()
        seconds = {phase: self._seconds[phase] for phase in (*PHASES, "idle")}
        rates = {phase: tokens / seconds[phase] for phase, tokens in self._tokens.items() if seconds[phase]}
        self._seconds.clear()
        self._tokens.clear()
        wall_s, self._lap_since = self._since - self._lap_since, self._since
        return PhaseTimes(seconds, rates, wall_s)
