"""Seconds per step of the demo, split into phases, and the peak memory of all its processes.

`python -m benchmarks.step [--quick]`. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import launch
from benchmarks.memory import PeakByRole
from driver.clock import PHASES
from driver.records.sinks import read_metrics
from video_opd.config_file import load_demo

WARM_UP_STEPS = 2  # engines allocate and caches fill


def measure(overrides: list[str], num_steps: int) -> dict:
    """Runs the demo for `num_steps` steps; medians over the steps after the warm-up."""
    with tempfile.TemporaryDirectory() as runs, PeakByRole() as memory:
        forced = [f"num_steps={num_steps}", f"runs_dir={runs}", "run_name=benchmark"]
        config = load_demo([*overrides, *forced])
        summary = launch.launch(config)
        lines = read_metrics(Path(runs) / "benchmark")[WARM_UP_STEPS:]
    phases = {
        name: float(np.median([line[f"time/{name}_s"] for line in lines])) for name in (*PHASES, "idle")
    }
    step_s = float(np.median([line["time/step_s"] for line in lines]))
    return {
        "seconds_per_step": step_s,
        "phases": phases,
        "limit_share": max(phases[name] for name in PHASES) / step_s,
        "peak_bytes": memory.at_peak.total(),
        "start_up_s": summary["seconds"]["start_up"],
        "steps": len(lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values of the demo")
    parser.add_argument("--quick", action="store_true", help="8 steps instead of 30")
    arguments = parser.parse_args()
    result = measure(arguments.overrides, 8 if arguments.quick else 30)
    table = Table(
        "phase",
        "median s a step",
        title="one step of the demo (phases overlap, so they add up to more than the step)",
    )
    for name, seconds in result["phases"].items():
        table.add_row(name, f"{seconds:.2f}")
    table.add_row("step", f"{result['seconds_per_step']:.2f}")
    Console().print(table)
    print(
        f"slowest phase / step {result['limit_share']:.2f}, start-up {result['start_up_s']:.0f} s, "
        f"peak memory of all processes {result['peak_bytes'] / 2**30:.2f} GiB"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
