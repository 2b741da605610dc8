"""Metrics for Prometheus: `learner/loss` becomes ray_video_opd_learner_loss{run="NAME"}.

Every process counts for itself; Prometheus scrapes each node's Ray agent. Without Ray nothing is counted.
"""

import math
import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from video_opd.logs import work

TAGS = {"teacher": "teacher", "sources": "source"}  # of metrics named ROOM/NAME/...
BY_ROUND = ("actors/miou", "eval/miou")  # also exported by round of the curriculum


def metric_name(name: str) -> str:
    """The name for ray.util.metrics. Ray adds the prefix `ray_`, and `_total` to counters."""
    return "video_opd_" + re.sub(r"\W", "_", name, flags=re.ASCII)


def count(name: str, amount: float = 1.0, **tags: str) -> None:
    """Adds to a counter, tagged with the run and the kind of role: actor, learner, teacher, driver."""
    if amount > 0 and _connected():
        tags = {"run": work.run, "role": work.role.partition("-")[0], **tags}
        _metric("Counter", metric_name(name), tuple(tags)).inc(float(amount), tags)


class Gauges:
    """The last value of every gauge. Call `export` often: Ray reports, every 10 s, gauges set since."""

    def __init__(self):
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def set(self, values: Mapping[str, float], **tags: str) -> None:
        """Sets gauges; ignores values that are not finite."""
        known = tuple({"run": work.run, **tags}.items())
        self._values |= {(n, known): float(v) for n, v in values.items() if math.isfinite(v)}

    def set_step(self, metrics: Mapping[str, float]) -> None:
        """Sets a step's metrics: teacher/NAME/queue_s becomes teacher/queue_s with the tag `teacher`.

        And sources/NAME/share sources/share with the tag `source`.
        """
        for name, value in metrics.items():
            room, *middle, leaf = name.split("/")
            if room in TAGS and middle:
                self.set({f"{room}/{leaf}": value}, **{TAGS[room]: middle[0]})
            else:
                self.set({name: value})
        if "curriculum/round" in metrics:
            by_round = {f"round/{name}": metrics[name] for name in BY_ROUND if name in metrics}
            self.set(by_round, round=f"{metrics['curriculum/round']:.0f}")

    def export(self) -> None:
        if _connected():
            for (name, tags), value in self._values.items():
                _metric("Gauge", metric_name(name), tuple(key for key, _ in tags)).set(value, dict(tags))


def _connected() -> bool:
    ray: Any = sys.modules.get("ray")  # a process that has not imported Ray should not start to
    return ray is not None and ray.is_initialized()


@cache
def _metric(kind: str, name: str, tag_keys: tuple[str, ...]) -> Any:
    from ray.util import metrics

    return getattr(metrics, kind)(name, tag_keys=tag_keys)
