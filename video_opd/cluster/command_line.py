"""What the command lines share."""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from video_opd.cluster.join import find_address, join
from video_opd.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Bad arguments are bad input, said in one line as any other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default="auto",
        help="of a node of the run's Ray, e.g. 10.0.0.1:6379 (default: this machine's)",
    )
    parser.add_argument(
        "--run", metavar="NAME", help="of the run folder; needed where several runs share a Ray"
    )


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within a Ray, as one of its drivers. Raises ConfigError where there is none, or it does not let this process in."""
    import ray

    join(find_address(address), namespace="video_opd", log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def choose_run(runs: Sequence[str], asked: str | None) -> str:
    """The run that is meant. Raises ConfigError where it is not running, or several are and none was named."""
    if not runs:
        raise ConfigError(
            "no run is on this Ray: start one with launch.py, or name another Ray with --address"
        )
    if asked is None and len(runs) > 1:
        raise ConfigError(f"several runs are on this Ray, {', '.join(runs)}: name one with --run")
    if asked is not None and asked not in runs:
        raise ConfigError(f"run {asked} is not on this Ray; running: {', '.join(runs)}")
    return asked or runs[0]


def check_capacity(wanted: int, resource: str) -> str | None:
    """A note where the cluster has to grow first. Raises ConfigError where it cannot. A process takes one `resource`."""
    import ray

    return describe_shortage(wanted, resource, ray.cluster_resources().get(resource, 0.0), _may_grow())


def describe_shortage(wanted: int, resource: str, held: float, grows: bool) -> str | None:
    """The same of a cluster that holds so many, and may add nodes or not."""
    if wanted <= held:
        return None
    short = f"{wanted} are asked for, but the nodes of this Ray hold {held:.0f} of the resource `{resource}`"
    if not grows:
        raise ConfigError(f"{short} and it has no autoscaler: scale to at most {held:.0f}, or add nodes")
    return f"{short}: its autoscaler has to add nodes first"


def _may_grow() -> bool:
    """Whether Ray's autoscaler may add nodes: false only where its process is here and was given no cluster configuration."""
    import psutil
    import ray

    of_gcs = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if of_gcs in command and any(part.endswith("/monitor.py") for part in command):
            return any(
                part.startswith("--autoscaling-config=") and not part.endswith("=") for part in command
            )
    return True
