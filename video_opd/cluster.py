"""A running Ray, for the commands that look at a run from outside, and change it."""

import argparse
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from video_opd.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0


class Parser(argparse.ArgumentParser):
    """Bad arguments are bad input, said in one line as any other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", default="auto", help="of a node of the run's Ray, e.g. 10.0.0.1:6379 (default: this machine's)"
    )
    parser.add_argument("--run", metavar="NAME", help="of the run folder; needed where several runs share a Ray")


def find_address(address: str) -> str:
    """host:port of a Ray that answers. Raises ConfigError."""
    from ray._private.services import find_gcs_addresses

    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":
        found = sorted(find_gcs_addresses())
        if not found:
            raise ConfigError("no Ray runs on this machine: start a run, or name a node of its cluster with --address HOST:PORT")
        if len(found) > 1:
            raise ConfigError(f"several Rays run on this machine, {', '.join(found)}: name one with --address")
        address = found[0]
    try:
        _reach(address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no Ray answers at {address} ({error}): give --address HOST:PORT") from None
    return address


def _reach(address: str) -> None:
    """Raises OSError or ValueError where nothing listens, or it is no address."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()


def _answers(address: str) -> bool:
    try:
        _reach(address)
    except (OSError, ValueError):  # of a Ray that is gone
        return False
    return True


def cluster_to_join(asked: str | None) -> str | None:
    """host:port of the Ray that a run is to join; None: it starts one of its own.

    asked: HOST:PORT, auto or local. None: RAY_ADDRESS, or what `ray up` or `ray start` left on this machine, as ray.init does;
    else its own. Raises ConfigError where the one that is meant does not answer.
    """
    from ray._private.utils import read_ray_address

    asked = asked or os.environ.get("RAY_ADDRESS")
    if asked == "local":
        return None
    if asked not in (None, "", "auto"):
        return find_address(asked)
    started = read_ray_address()
    if started and _answers(started):
        return started
    return find_address("auto") if asked else None


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Within a Ray, as one of its drivers. Raises ConfigError where there is none, or it is another user's."""
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.exceptions import AuthenticationError

    address = find_address(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # ray.init does so for address="auto" alone
    try:
        ray.init(address=address, namespace="video_opd", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise ConfigError(f"the Ray at {address} does not let this process in: {' '.join(str(error).split())[:300]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def choose_run(runs: Sequence[str], asked: str | None) -> str:
    """The run that is meant. Raises ConfigError where it is not running, or several are and none was named."""
    if not runs:
        raise ConfigError("no run is on this Ray: start one with launch.py, or name another Ray with --address")
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
            return any(part.startswith("--autoscaling-config=") and not part.endswith("=") for part in command)
    return True
