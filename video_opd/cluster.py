"""A running Ray, for the commands that look at a run from outside."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import AuthenticationError

from video_opd.errors import ConfigError


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Raises ConfigError where no Ray answers."""
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    try:
        ray.init(address=address, namespace="video_opd", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"no Ray answers at {address} ({reason}): name the run's with --address") from error
    try:
        yield
    finally:
        ray.shutdown()


def choose_run(runs: Sequence[str], asked: str | None) -> str:
    """The run that is meant. Raises ConfigError where it is not running, or several are and none was named."""
    if not runs:
        raise ConfigError("no run is on this Ray: start one with launch.py, or name another Ray with --address")
    if asked is None and len(runs) > 1:
        raise ConfigError(f"{len(runs)} runs are on this Ray: name one with --run ({', '.join(runs)})")
    if asked is not None and asked not in runs:
        raise ConfigError(f"no run {asked} is on this Ray; there is {', '.join(runs)}")
    return asked or runs[0]


def capacity(resource: str) -> int:
    """How many replicas or actors of a role the nodes of this Ray can hold, those that run included."""
    return int(ray.cluster_resources().get(resource, 0.0))
