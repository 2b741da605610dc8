"""`python -m teacher_service status` and `scale`: the replicas of running runs, looked at and changed from another terminal.

`scale 4` runs four replicas from now on; `scale --min 1 --max 4` lets Serve choose by the calls that queue. Replicas that stay are
not restarted, those that go end their calls first.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from teacher_service.scaling import (
    GONE_WRONG,
    PREFIX,
    Bounds,
    PoolStatus,
    app_name,
    deployed_with,
    ongoing_calls,
    read_pool,
    read_pools,
    set_replicas,
)
from video_opd.cluster.command_line import (
    Parser,
    add_cluster_arguments,
    check_capacity,
    choose_run,
    connected,
)
from video_opd.errors import ConfigError, InputError, RunError, VideoOPDError

POLL_S = 0.5


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m teacher_service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="replicas of every teacher")
    scale = commands.add_parser("scale", help="change the number of replicas")
    scale.add_argument("replicas", nargs="?", type=int, help="a fixed number")
    scale.add_argument("--min", type=int, help="fewest that autoscaling leaves (default 1)")
    scale.add_argument("--max", type=int, help="most that autoscaling starts")
    scale.add_argument(
        "--teacher", metavar="NAME", help="which of the run's teachers (default: its only one)"
    )
    scale.add_argument("--no-wait", action="store_true", help="return before the replicas run")
    scale.add_argument(
        "--timeout-s", type=float, help="wait at most so long (default: the run's start_timeout_s)"
    )
    for command in (status, scale):
        add_cluster_arguments(command)
    return parser.parse_args(arguments)


def wanted_by(arguments: argparse.Namespace) -> int | Bounds:
    """The number or bounds asked for. Raises ConfigError."""
    replicas, fewest, most = arguments.replicas, arguments.min, arguments.max
    if replicas is not None and (fewest, most) != (None, None):
        raise ConfigError("scale: give either a number, or --min and --max")
    if replicas is not None:
        if replicas < 1:
            raise ConfigError(f"scale {replicas}: a run needs at least 1 replica")
        return replicas
    if most is None:
        raise ConfigError("scale: give a number, or --max (and --min) for autoscaling")
    fewest = 1 if fewest is None else fewest
    if fewest < 1:
        raise ConfigError(f"scale --min {fewest}: a run needs at least 1 replica")
    if fewest > most:
        raise ConfigError(f"scale --min {fewest} --max {most}: --min is above --max")
    return Bounds(fewest, most)


def pools_of(pools: Sequence[PoolStatus], run: str | None) -> list[PoolStatus]:
    """Those of the run that is meant. Raises ConfigError."""
    chosen = choose_run(sorted({p.run for p in pools}), run)
    return [p for p in pools if p.run == chosen]


def pool_of(pools: Sequence[PoolStatus], teacher: str | None) -> PoolStatus:
    """The teacher of one run that is meant. Raises ConfigError."""
    names = sorted(p.teacher for p in pools)
    if teacher is None and len(pools) > 1:
        raise ConfigError(f"the run has several teachers, {', '.join(names)}: name one with --teacher")
    if teacher is not None and teacher not in names:
        raise ConfigError(f"the run has no teacher {teacher}; it has {', '.join(names)}")
    return next(p for p in pools if teacher in (None, p.teacher))


def print_status(pools: Sequence[PoolStatus]) -> None:
    for pool in pools:
        calls = ongoing_calls(pool)
        print(
            f"{pool}; {'unknown' if calls is None else calls} calls in the replicas; pids {' '.join(map(str, pool.pids)) or '-'}"
        )


def scale(pool: PoolStatus, wanted: int | Bounds, timeout_s: float | None, wait: bool) -> None:
    """Changes one pool, and waits for it. Raises RunError where it is not so within the timeout."""
    app = app_name(PREFIX + pool.run, pool.teacher)
    if note := check_capacity(wanted.most if isinstance(wanted, Bounds) else wanted, "teacher"):
        print(note)
    config, _ = deployed_with(app)
    timeout_s = config.start_timeout_s if timeout_s is None else timeout_s
    set_replicas(app, wanted)
    asked = f"autoscaling {wanted}" if isinstance(wanted, Bounds) else f"{wanted} replica{'s' * (wanted > 1)}"
    if not wait:
        print(f"run {pool.run}, teacher {pool.teacher}: {asked} asked for")
        return
    print(
        f"run {pool.run}, teacher {pool.teacher}: waiting at most {timeout_s:.0f} s for {asked}", flush=True
    )
    deadline = time.monotonic() + timeout_s
    while not has(now := read_pool(app), wanted):
        if now.status in GONE_WRONG or time.monotonic() > deadline:
            raise RunError(f"not reached: {now}")
        time.sleep(POLL_S)
    print(now)


def has(pool: PoolStatus, wanted: int | Bounds) -> bool:
    """Whether the pool is what was asked for."""
    if isinstance(wanted, Bounds):
        return pool.bounds == wanted and wanted.fewest <= pool.running <= wanted.most
    return pool.bounds is None and pool.wanted == wanted and pool.reached


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the replicas did not start or Serve does not answer, 2 bad input."""
    try:
        parsed = parse_arguments(arguments)
        wanted: Any = wanted_by(parsed) if parsed.command == "scale" else None
        with connected(parsed.address):
            pools = read_pools()
            if parsed.command == "status":
                print_status(pools_of(pools, parsed.run) if parsed.run or not pools else pools)
            else:
                pool = pool_of(pools_of(pools, parsed.run), parsed.teacher)
                scale(pool, wanted, parsed.timeout_s, not parsed.no_wait)
    except VideoOPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
