"""Seconds per step of the demo, split into phases, and the peak memory of all its processes.

`python -m benchmarks.step [--quick]`. The last line is one JSON object.
"""

from collections.abc import Sequence

import numpy as np

import launch
from benchmarks.command import WARM_UP_STEPS, Row, make_parser, print_result, temporary_demo
from benchmarks.memory import PeakByRole
from driver.clock import PHASES
from driver.records.sinks import read_metrics


def measure(overrides: Sequence[str], num_steps: int) -> Row:
    """Runs the demo. Seconds are medians over the steps after the warm-up."""
    with temporary_demo(*overrides, f"num_steps={num_steps}") as (config, folder), PeakByRole() as memory:
        summary = launch.launch(config)
        lines = read_metrics(folder)[WARM_UP_STEPS:]
    phases = {p: float(np.median([line[f"time/{p}_s"] for line in lines])) for p in (*PHASES, "idle")}
    step_s = float(np.median([line["time/step_s"] for line in lines]))
    slowest_s, peak = max(phases[name] for name in PHASES), memory.at_peak.total()
    seconds = {"seconds_per_step": step_s, "phases": phases, "limit_share": slowest_s / step_s}
    sizes = {"peak_bytes": peak, "peak_rss_bytes": peak}  # the same: shared pages count once
    return seconds | sizes | {"start_up_s": summary["seconds"]["start_up"], "steps": len(lines)}


def main() -> None:
    arguments = make_parser("step", __doc__, "8 steps instead of 30", overrides=True).parse_args()
    result = measure(arguments.overrides, 8 if arguments.quick else 30)
    seconds = result["phases"] | {"step": result["seconds_per_step"]}
    limit = f"slowest phase / step {result['limit_share']:.2f}, start-up {result['start_up_s']:.0f} s"
    note = f"{limit}, peak memory of all processes {result['peak_bytes'] / 2**30:.2f} GiB"
    title = "one step of the demo (phases overlap, so they add up to more than the step)"
    print_result(result, title, [{"phase": phase, "median_s": s} for phase, s in seconds.items()], note)


if __name__ == "__main__":
    main()
