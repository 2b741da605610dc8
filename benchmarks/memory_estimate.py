"""The memory that --dry-run estimates for the demo against what its processes take, by role.

`python -m benchmarks.memory_estimate [--quick] [--empty]`: proportional set size of every process of the run,
sampled; shared pages count once. `--empty` measures processes that start and do nothing: the
EMPTY_PROCESS_BYTES of preflight/memory.py. The last line is one JSON object.
"""

import asyncio
import json
from collections import Counter

import ray

import launch
from benchmarks.command import make_parser, print_result, temporary_demo
from benchmarks.memory import PeakByRole, sample
from driver.command_line import prepare
from driver.run import create_parts
from driver.start_ray import start_ray
from preflight.inputs import make_draft
from preflight.memory import GIB
from preflight.memory_fit import memory_plan

SETTLE_S = 10.0


def empty_processes() -> Counter[str]:
    """Starts every process of the demo and samples once all are ready."""
    with temporary_demo("num_steps=1") as (config, folder):
        plan = prepare(config)
        start_ray(config, address="local")

        async def start() -> Counter[str]:
            run = create_parts(folder, config, plan, memory_plan(config, plan, None))
            assert run.teacher, "the demo has one"
            parts = (run.actors.start(), run.learner.start(), run.teacher.start())
            await asyncio.gather(*parts, run.curriculum.next_selection())
            await asyncio.sleep(SETTLE_S)
            sizes = await asyncio.to_thread(sample)
            run.teacher.stop()
            return sizes

        try:
            return asyncio.run(start())
        finally:
            ray.shutdown()


def main() -> None:
    parser = make_parser("memory_estimate", __doc__, "8 steps instead of 30", overrides=True)
    parser.add_argument("--empty", action="store_true", help="measure processes that do nothing")
    arguments = parser.parse_args()
    if arguments.empty:
        print(json.dumps(empty_processes(), sort_keys=True))
        return
    num_steps = f"num_steps={8 if arguments.quick else 30}"
    with temporary_demo(*arguments.overrides, num_steps) as (config, _):
        roles = memory_plan(config, make_draft(config), None).roles
        with PeakByRole() as seen:
            launch.launch(config)
    estimate = Counter({role.role: role.processes * role.host.peak_bytes for role in roles})
    shown = []
    for role in sorted(estimate.keys() | seen.of_role.keys(), key=lambda r: -estimate[r]):
        mib = {"estimate": estimate[role], "at_the_peak": seen.at_peak[role], "own_peak": seen.of_role[role]}
        shown.append({"role": role} | {f"{name}_MiB": size // 2**20 for name, size in mib.items()})
    total, peak = estimate.total(), seen.at_peak.total()
    totals = {"estimate_bytes": total, "peak_bytes": peak, "ratio": total / peak}
    result = totals | {"estimate": estimate, "measured": seen.at_peak}
    sums = f"estimate {total / GIB:.2f} GiB, measured peak {peak / GIB:.2f} GiB"
    note = f"{sums}, estimate / measured {total / peak:.2f}"
    print_result(result, "memory of the demo", shown, note)


if __name__ == "__main__":
    main()
