"""`python -m teacher_service status` and `scale`: shows and changes the replicas of a running run's teachers.

`scale 4` sets four replicas; `scale --min 1 --max 4` lets Serve choose by the calls that queue. Replicas that
stay do not restart; those that go finish their calls first.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from teacher_service import scaling
from teacher_service.scaling import Bounds, PoolStatus
from video_opd.cluster import command_line
from video_opd.cluster.command_line import check_capacity, choose_run, connected, exit_code_of
from video_opd.errors import ConfigError, RunError

POLL_S = 0.5


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = command_line.Parser(prog="python -m teacher_service", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="replicas of every teacher")
    scale = commands.add_parser("scale", help="change the number of replicas")
    scale.add_argument("replicas", nargs="?", type=int, help="a fixed number")
    scale.add_argument("--min", type=int, help="fewest that autoscaling leaves (default 1)")
    scale.add_argument("--max", type=int, help="most that autoscaling starts")
    scale.add_argument("--teacher", metavar="NAME", help="one of the run's teachers (default: its only one)")
    scale.add_argument("--no-wait", action="store_true", help="return before the replicas run")
    scale.add_argument("--timeout-s", type=float, help="longest wait (default: the run's start_timeout_s)")
    for command in (status, scale):
        command_line.add_cluster_arguments(command)
    return parser.parse_args(arguments)


def wanted_by(arguments: argparse.Namespace) -> int | Bounds:
    """The requested number or bounds. Raises ConfigError."""
    replicas, fewest, most = arguments.replicas, arguments.min, arguments.max
    if replicas is None and most is None:
        raise ConfigError("scale: give a number, or --max (and --min) for autoscaling")
    if replicas is not None and (fewest, most) != (None, None):
        raise ConfigError("scale: give either a number, or --min and --max")
    fewest = 1 if fewest is None else fewest
    least, asked = (fewest, f"--min {fewest}") if replicas is None else (replicas, f"{replicas}")
    if least < 1:
        raise ConfigError(f"scale {asked}: a run needs at least 1 replica")
    if replicas is not None:
        return replicas
    if fewest > most:
        raise ConfigError(f"scale --min {fewest} --max {most}: --min is above --max")
    return Bounds(fewest, most)


def pools_of(pools: Sequence[PoolStatus], run: str | None) -> list[PoolStatus]:
    """The pools of the chosen run. Raises ConfigError."""
    chosen = choose_run(sorted({p.run for p in pools}), run)
    return [p for p in pools if p.run == chosen]


def pool_of(pools: Sequence[PoolStatus], teacher: str | None) -> PoolStatus:
    """The pool of the chosen teacher, among those of one run. Raises ConfigError."""
    names = ", ".join(sorted(p.teacher for p in pools))
    found = [p for p in pools if teacher in (None, p.teacher)]
    if not found:
        raise ConfigError(f"the run has no teacher {teacher}; it has {names}")
    if len(found) > 1:
        raise ConfigError(f"the run has several teachers, {names}: name one with --teacher")
    return found[0]


def scale(pool: PoolStatus, wanted: int | Bounds, timeout_s: float | None, wait: bool) -> None:
    """Changes one pool and waits for it. Raises RunError if the replicas do not run within the timeout."""
    if isinstance(wanted, Bounds):
        most, goal = wanted.most, f"autoscaling {wanted}"
    else:
        most, goal = wanted, f"{wanted} replica{'s' * (wanted != 1)}"
    if note := check_capacity(most, "teacher"):
        print(note)
    if timeout_s is None:
        timeout_s = scaling.deployed_with(pool.app)[0].start_timeout_s
    scaling.set_replicas(pool.app, wanted)
    name = f"run {pool.run}, teacher {pool.teacher}"
    if not wait:
        print(f"{name}: {goal} requested")
        return
    print(f"{name}: waiting at most {timeout_s:.0f} s for {goal}", flush=True)
    deadline = time.monotonic() + timeout_s
    while not (now := scaling.read_pool(pool.app)).has(wanted):
        if now.status in scaling.GONE_WRONG or time.monotonic() > deadline:
            raise RunError(f"not reached: {now}")
        time.sleep(POLL_S)
    print(now)


def run_command(arguments: Sequence[str] | None) -> None:
    parsed = parse_arguments(arguments)
    wanted = wanted_by(parsed) if parsed.command == "scale" else None
    with connected(parsed.address):
        pools = scaling.read_pools()
        if wanted is not None:
            pool = pool_of(pools_of(pools, parsed.run), parsed.teacher)
            return scale(pool, wanted, parsed.timeout_s, not parsed.no_wait)
        for pool in pools_of(pools, parsed.run) if parsed.run or not pools else pools:
            calls, pids = scaling.ongoing_calls(pool), " ".join(map(str, pool.pids)) or "-"
            print(f"{pool}; {'unknown' if calls is None else calls} calls in the replicas; pids {pids}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where replicas do not start or Serve does not answer, 2 for bad input."""
    return exit_code_of(lambda: run_command(arguments))


if __name__ == "__main__":
    sys.exit(main())
