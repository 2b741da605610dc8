"""Numbers for Prometheus, through ray.util.metrics: `learner/reverse_kl` is ray_video_opd_learner_reverse_kl{run="NAME"} there.

Every process counts for itself; Ray's agent on its node is what Prometheus asks. To count costs microseconds and waits for
nobody: Ray hands the numbers on from a thread of its own. A process without Ray counts nothing.
"""

import math
import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from video_opd.logs import work

BY_ROUND = ("actors/miou", "eval/miou")  # shown for each round of the curriculum besides


def metric_name(name: str) -> str:
    """As ray.util.metrics takes it; Ray puts `ray_` before it, and `_total` behind a counter's."""
    return "video_opd_" + re.sub(r"\W", "_", name, flags=re.ASCII)


def count(name: str, amount: float = 1.0, **tags: str) -> None:
    """Adds to a counter, tagged with the run and this process's kind of role: actor, learner, teacher, driver."""
    if amount > 0 and _connected():
        tags = {"run": work.run, "role": work.role.partition("-")[0], **tags}
        _metric("Counter", metric_name(name), tuple(tags)).inc(float(amount), tags)


class Gauges:
    """The last value of everything, in the driver.

    Ray 2.60 exports a gauge only if it was set since its last report, every 10 s: `export` sets all of them, every few seconds.
    """

    def __init__(self):
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def set(self, values: Mapping[str, float], **tags: str) -> None:
        """What is not finite says nothing, and leaves what was."""
        known = {"run": work.run, **tags}
        self._values |= {(n, tuple(known.items())): float(v) for n, v in values.items() if math.isfinite(v)}

    def set_step(self, metrics: Mapping[str, float]) -> None:
        """A step's line of metrics.jsonl: teacher/NAME/queue_s is teacher/queue_s with the tag `teacher`."""
        for name, value in metrics.items():
            room, *middle, leaf = name.split("/")
            if room == "teacher" and middle:
                self.set({f"{room}/{leaf}": value}, teacher=middle[0])
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
    ray: Any = sys.modules.get("ray")  # who has not imported it has no Ray, and is not to wait for the import
    return ray is not None and ray.is_initialized()


@cache
def _metric(kind: str, name: str, tag_keys: tuple[str, ...]) -> Any:
    from ray.util import metrics

    return getattr(metrics, kind)(name, tag_keys=tag_keys)
