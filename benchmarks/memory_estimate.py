"""The memory that --dry-run estimates for the demo against what its processes take, by role.

`python -m benchmarks.memory_estimate [--quick] [--empty]`. Proportional set size of every process of the run, sampled; shared
pages count once. `--empty` starts the processes, does nothing with them, and prints what memory_plan.EMPTY_PROCESS_BYTES holds.
The last line is one JSON object.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

import launch
from benchmarks.memory import PeakByRole, sample
from preflight.inputs import make_draft
from preflight.memory import GIB
from preflight.memory_fit import memory_plan
from video_opd.config import Config
from video_opd.config_file import load_demo

SETTLE_S = 10.0


def demo(num_steps: int, runs: str, overrides: list[str]) -> Config:
    forced = [f"num_steps={num_steps}", f"runs_dir={runs}", "run_name=benchmark"]
    return load_demo([*overrides, *forced])


def empty_processes() -> Counter[str]:
    """Starts every process of the demo and samples once all are ready."""
    with tempfile.TemporaryDirectory() as runs:
        config = demo(1, runs, [])
        plan = launch.prepare(config)
        launch.start_ray(config, address="local")

        async def start() -> Counter[str]:
            run = launch.create_parts(Path(runs) / "benchmark", config, plan)
            assert run.teacher, "the demo has one"
            await asyncio.gather(
                run.actors.start(), run.learner.start(), run.teacher.start(), run.curriculum.next_selection()
            )
            await asyncio.to_thread(time.sleep, SETTLE_S)
            sizes = sample()
            run.teacher.stop()
            return sizes

        try:
            return asyncio.run(start())
        finally:
            ray.shutdown()


def estimated(config: Config) -> Counter[str]:
    """Bytes by role, as --dry-run says."""
    roles = memory_plan(config, make_draft(config), None).roles
    return Counter({role.role: role.processes * role.host.peak_bytes for role in roles})


def measured(config: Config) -> PeakByRole:
    with PeakByRole() as memory:
        launch.launch(config)
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_estimate", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values of the demo")
    parser.add_argument("--quick", action="store_true", help="8 steps instead of 30")
    parser.add_argument("--empty", action="store_true", help="measure processes that do nothing")
    arguments = parser.parse_args()
    if arguments.empty:
        sizes = empty_processes()
        print(json.dumps({role: sizes[role] for role in sorted(sizes)}))
        return
    with tempfile.TemporaryDirectory() as runs:
        config = demo(8 if arguments.quick else 30, runs, arguments.overrides)
        expected, seen = estimated(config), measured(config)
    table = Table(
        "role",
        "estimate MiB",
        "at the peak MiB",
        "its own peak MiB",
        "estimate / own peak",
        title="memory of the demo",
    )
    for role in sorted(expected.keys() | seen.of_role.keys(), key=lambda r: -expected[r]):
        own = seen.of_role[role]
        ratio = f"{expected[role] / own:.2f}" if own else "-"
        table.add_row(role, *(f"{n / 2**20:.0f}" for n in (expected[role], seen.at_peak[role], own)), ratio)
    Console().print(table)
    total, peak = expected.total(), seen.at_peak.total()
    print(
        f"estimate {total / GIB:.2f} GiB, measured peak {peak / GIB:.2f} GiB, estimate / measured {total / peak:.2f}"
    )
    print(
        json.dumps(
            {
                "estimate_bytes": total,
                "peak_bytes": peak,
                "ratio": total / peak,
                "estimate": expected,
                "measured": seen.at_peak,
            }
        )
    )


if __name__ == "__main__":
    main()
