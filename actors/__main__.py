"""Shows and changes the number of rollout actors of a running run."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from video_opd.cluster import command_line
from video_opd.cluster.run_control import control_of, running_runs
from video_opd.errors import ConfigError, RunError

ANSWER_TIMEOUT_S = 10.0
POLL_S = 0.5


def ask(run: str, method: str, *arguments: Any) -> Any:
    """The answer of the run's RunControl actor. Raises RunError where there is none."""
    try:
        return ray.get(getattr(control_of(run), method).remote(*arguments), timeout=ANSWER_TIMEOUT_S)
    except (ValueError, GetTimeoutError, RayError) as error:
        raise RunError(f"run {run} does not answer: {error}") from error


def describe(run: str, status: dict[str, float]) -> str:
    if not status:
        return f"run {run}: starting"
    running, wanted, lost = (int(status[f"actors/{k}"]) for k in ("running", "wanted", "lost"))
    actors = f"{running} running, {wanted} wanted, {lost} lost so far"
    return f"run {run}, step {int(status['step'])}: rollout actors {actors}"


def scale(run: str, num_actors: int, timeout_s: float) -> None:
    """Asks the run for so many actors and waits for them. Raises ConfigError, or RunError at the deadline."""
    if note := command_line.check_capacity(num_actors, "rollout"):
        print(note)
    ask(run, "ask_for_actors", num_actors)
    deadline = time.monotonic() + timeout_s
    while True:
        status = ask(run, "status")
        if status.get("actors/running") == status.get("actors/wanted") == num_actors:
            return
        if time.monotonic() > deadline:
            raise RunError(f"{describe(run, status)} after {timeout_s:.0f} s: the run keeps trying")
        time.sleep(POLL_S)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises ConfigError."""
    parser = command_line.Parser(prog="python -m actors", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="how many run and are wanted")
    more = commands.add_parser("scale", help="run N of them")
    more.add_argument("num_actors", type=int, metavar="N")
    more.add_argument("--timeout-s", type=float, default=600.0, help="wait so long for them (default 600)")
    for command in (status, more):
        command_line.add_cluster_arguments(command)
    parsed = parser.parse_args(arguments)
    if parsed.command == "scale" and parsed.num_actors < 1:
        raise ConfigError(f"scale {parsed.num_actors}: a run that samples needs at least 1 rollout actor")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 when the run does not answer or scale in time; 2 for bad input."""

    def command() -> None:
        parsed = parse_arguments(arguments)
        with command_line.connected(parsed.address):
            run = command_line.choose_run(running_runs(), parsed.run)
            if parsed.command == "scale":
                scale(run, parsed.num_actors, parsed.timeout_s)
            print(describe(run, ask(run, "status")))

    return command_line.exit_code_of(command)


if __name__ == "__main__":
    sys.exit(main())
