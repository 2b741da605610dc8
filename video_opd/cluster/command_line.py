"""Shared by the command lines: arguments, exit codes, choice of a run, capacity of the cluster."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from video_opd.errors import ConfigError, InputError, VideoOPDError


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for bad arguments, so that they are reported in one line like any bad input."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    where = "of a node of the run's Ray, e.g. 10.0.0.1:6379 (default: this machine's)"
    parser.add_argument("--address", default="auto", help=where)
    parser.add_argument("--run", metavar="NAME", help="of the run folder; needed if several runs share a Ray")


def exit_code_of(command: Callable[[], int | None]) -> int:
    """What `command` returns, 0 for None; after an error of this project 2 for bad input, 1 for others."""
    try:
        return command() or 0
    except VideoOPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within the block this process is a driver of the Ray at `address`. Raises ConfigError, see join."""
    import ray

    from video_opd.cluster.join import find_address, join
    from video_opd.cluster.run_control import NAMESPACE

    join(find_address(address), namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def choose_run(runs: Sequence[str], asked: str | None) -> str:
    """The run `asked`, or the only one. Raises ConfigError if neither exists."""
    if not runs:
        raise ConfigError("no run is on this Ray: start one, or name another Ray with --address")
    if asked is None and len(runs) > 1:
        raise ConfigError(f"several runs are on this Ray, {', '.join(runs)}: name one with --run")
    if asked is not None and asked not in runs:
        raise ConfigError(f"run {asked} is not on this Ray; running: {', '.join(runs)}")
    return asked or runs[0]


def check_capacity(wanted: int, resource: str) -> str | None:
    """A note if the autoscaler must add nodes for `wanted` of the resource. ConfigError if it cannot."""
    import ray

    return describe_shortage(wanted, resource, ray.cluster_resources().get(resource, 0.0), _may_grow())


def describe_shortage(wanted: int, resource: str, held: float, grows: bool) -> str | None:
    """check_capacity for a cluster that holds `held` of the resource and may add nodes if it `grows`."""
    if wanted <= held:
        return None
    short = f"{wanted} are asked for, but the nodes of this Ray hold {held:.0f} of the resource `{resource}`"
    if not grows:
        raise ConfigError(f"{short} and it has no autoscaler: scale to at most {held:.0f}, or add nodes")
    return f"{short}: its autoscaler has to add nodes first"


def _may_grow() -> bool:
    """Whether the autoscaler may add nodes: false only if it runs here without a cluster configuration."""
    import psutil
    import ray

    of_gcs = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    option = "--autoscaling-config="
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if of_gcs in command and any(part.endswith("/monitor.py") for part in command):
            return any(part.startswith(option) and part != option for part in command)
    return True
