"""Rollout actors of a run that goes on: how many there are, and more or fewer of them."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from video_opd.cluster.command_line import (
    Parser,
    add_cluster_arguments,
    check_capacity,
    choose_run,
    connected,
)
from video_opd.cluster.run_control import control_of, running_runs
from video_opd.errors import ConfigError, InputError, RunError, VideoOPDError

ANSWER_TIMEOUT_S = 10.0
POLL_S = 0.5


def read_status(run: str) -> dict[str, float]:
    """What the run last said of its actors. Raises RunError where it does not answer."""
    try:
        status: Any = ray.get(control_of(run).status.remote(), timeout=ANSWER_TIMEOUT_S)
        return status
    except (ValueError, GetTimeoutError, RayError) as error:
        raise RunError(f"run {run} does not answer: {error}") from error


def describe(run: str, status: dict[str, float]) -> str:
    if not status:
        return f"run {run}: starting"
    running, wanted, lost = (int(status[f"actors/{k}"]) for k in ("running", "wanted", "lost"))
    return f"run {run}, step {int(status['step'])}: rollout actors {running} running, {wanted} wanted, {lost} lost so far"


def scale(run: str, num_actors: int, timeout_s: float) -> None:
    """Asks the run for so many actors and waits for them. Raises ConfigError, or RunError at the deadline."""
    if note := check_capacity(num_actors, "rollout"):
        print(note)
    try:
        ray.get(control_of(run).ask_for_actors.remote(num_actors), timeout=ANSWER_TIMEOUT_S)
    except (ValueError, GetTimeoutError, RayError) as error:
        raise RunError(f"run {run} does not answer: {error}") from error
    deadline = time.monotonic() + timeout_s
    while (status := read_status(run)).get("actors/running") != num_actors or status.get(
        "actors/wanted"
    ) != num_actors:
        if time.monotonic() > deadline:
            raise RunError(f"{describe(run, status)} after {timeout_s:.0f} s: the run goes on trying")
        time.sleep(POLL_S)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises ConfigError."""
    parser = Parser(prog="python -m actors", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="how many run and are wanted")
    more = commands.add_parser("scale", help="run N of them")
    more.add_argument("num_actors", type=int, metavar="N")
    more.add_argument(
        "--timeout-s", type=float, default=600.0, help="wait at most so long for them (default 600)"
    )
    for command in (status, more):
        add_cluster_arguments(command)
    parsed = parser.parse_args(arguments)
    if parsed.command == "scale" and parsed.num_actors < 1:
        raise ConfigError(f"scale {parsed.num_actors}: a run that samples needs at least 1 rollout actor")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when the run does not answer or obey in time, 2 for bad input."""
    try:
        parsed = parse_arguments(arguments)
        with connected(parsed.address):
            run = choose_run(running_runs(), parsed.run)
            if parsed.command == "scale":
                scale(run, parsed.num_actors, parsed.timeout_s)
            print(describe(run, read_status(run)))
    except VideoOPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
