"""Finds, starts and joins a Ray cluster. docs/security.md says who gets in and what listens where."""

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import grpc
import psutil
import ray
from ray._common.tls_utils import load_certs_from_env
from ray._private import ray_constants, services, utils
from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup as token_setup
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import gcs_service_pb2_grpc
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import AuthenticationError
from ray.util import get_node_ip_address

from video_opd.errors import ClusterError, ConfigError

T = TypeVar("T")
CONNECT_TIMEOUT_S = 5.0
START_ATTEMPTS = 4
HEAD_PATIENCE_S = 30.0  # a head may be restarted; Ray itself aborts this process after 60 s
AUTH_MODE, GLOO_INTERFACE = "RAY_AUTH_MODE", "GLOO_SOCKET_IFNAME"
ESSENTIAL = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)
GET_TOKEN = "copy the head's ~/.ray/auth_token to the same place here, or name a copy in RAY_AUTH_TOKEN_PATH"


def find_address(address: str) -> str:
    """host:port of a Ray that answers; auto: RAY_ADDRESS, or this machine's only one. Raises ConfigError."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":
        found = sorted(services.find_gcs_addresses())
        if not found:
            raise ConfigError("no Ray runs on this machine: start a run, or name another with --address")
        if len(found) > 1:
            raise ConfigError(f"several Rays run here, {', '.join(found)}: name one with --address")
        address = found[0]
    if problem := _connect(address):
        raise ConfigError(f"no Ray answers at {address} ({problem}): give --address HOST:PORT")
    return address


def cluster_to_join(asked: str | None) -> str | None:
    """host:port of the Ray that a run joins; None: it starts its own. Raises ConfigError if it is silent.

    asked: HOST:PORT, auto or local. None: RAY_ADDRESS, else what `ray start` left on this machine, if any."""
    asked = asked or os.environ.get("RAY_ADDRESS")
    if asked == "local":
        return None
    if asked not in (None, "", "auto"):
        return find_address(asked)
    started = utils.read_ray_address()
    if started and not _connect(started):
        return started
    return find_address("auto") if asked else None


def join(address: str, **options: Any) -> Any:
    """ray.init as a driver of the Ray at `address` with this process's token. Warns if it asks for none.

    Raises ConfigError within seconds if nothing answers or the token is missing or wrong."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    token = _token()
    _use_loopback(_only_on_loopback(address))
    if _lets_in(address, {}):
        if not _is_loopback(address):
            print(f"warning: the Ray at {address} lets in all who reach it: see docs/security.md", flush=True)
    elif not token:
        off = f"{AUTH_MODE}=disabled sends none: unset it"
        why = off if _auth_mode() == "disabled" else f"there is none here: {GET_TOKEN}"
        raise ConfigError(f"the Ray at {address} wants its token, and {why}")
    elif not _lets_in(address, token):
        raise ConfigError(f"the Ray at {address} wants another token than the one here: {GET_TOKEN}")
    try:
        with _apart():
            return ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        why = " ".join(str(error).split())[:300]
        raise ConfigError(f"the Ray at {address} does not let this process in: {why}") from error


def start_local(**options: Any) -> Any:
    """ray.init of a new Ray of this machine, on loopback but for Serve's replicas.

    Raises ConfigError, and ClusterError if this machine is too busy for Ray to start.
    It asks for a token unless RAY_AUTH_MODE=disabled; a missing one is made, readable by this user alone."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    if _auth_mode() == "disabled":
        off = f"{AUTH_MODE}=disabled lets in all who reach this machine"
        print(f"warning: {off}: see docs/security.md", flush=True)
    token_setup.enable_token_auth_by_default()
    umask = os.umask(0o077)
    try:
        token_setup.ensure_token_if_auth_enabled()
    except AuthenticationError as error:
        raise ConfigError(f"no Ray can start here: {error.message}") from error
    finally:
        os.umask(umask)
    _use_loopback(True)
    with _apart():
        return started_in_time(lambda: ray.init(address="local", **options))


def started_in_time(start: Callable[[], T]) -> T:
    """Starts Ray, again if its processes were too slow for its own deadlines. Raises ClusterError.

    Ray's raylet ends when its agent takes over 15 s to start, which a busy machine makes it take; no setting
    moves that. The driver then waits for 30 s and raises a plain Exception (ray/_private/node.py).
    """
    before = set(psutil.Process().children(recursive=True))
    for _ in range(START_ATTEMPTS):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            for left in set(psutil.Process().children(recursive=True)) - before:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
            print("warning: Ray did not start in time, and is started again", flush=True)
    busy = f"Ray did not start in time, {START_ATTEMPTS} times"
    raise ClusterError(f"{busy}: this machine is too busy; its logs are below /tmp/ray: try again later")


@contextmanager
def _apart() -> Iterator[None]:
    """For ray.init: signals for this process's group or terminal do not reach the processes of Ray.

    This process handles signals, and ends Ray itself. Ray still ends when this process is killed.
    """
    own_session = partial(services.ConsolePopen, start_new_session=True)
    handler = patch.object(utils, "set_sigterm_handler", lambda _: None)
    with patch.object(services, "ConsolePopen", own_session), handler:
        yield


class Lifeline:
    """Tells when the Ray of this process is gone: calls to it wait for a minute, then Ray aborts."""

    def __init__(self):
        node: Any = ray_worker._global_node
        self._node, self._address, self._answered_s = node, node.gcs_address, time.monotonic()
        own = [info.process.pid for kind in ESSENTIAL for info in node.all_processes.get(kind, ())]
        raylet = f"--raylet_socket_name={node.raylet_socket_name}"
        here = (p.pid for p in psutil.process_iter(["cmdline"]) if raylet in (p.info["cmdline"] or ()))
        self._ends, self._is_own = select.poll(), bool(own)
        for pid in own or here:
            self._ends.register(os.pidfd_open(pid), select.POLLIN)

    def wait(self, timeout_s: float) -> str | None:
        """Why this process's own Ray, or of a joined one raylet or head, is gone; None: it is there.

        Returns at once when a process here ends: Ray itself may end this process in milliseconds.
        """
        ended = self._ends.poll(timeout_s * 1000)
        if self._is_own:
            dead = [(kind, process.returncode) for kind, process in self._node.dead_processes()]
            return next((f"its {k} {_ended(code)}" for k, code in dead if k in ESSENTIAL), None)
        if ended:
            return "its raylet on this node ended"
        if not (problem := _connect(self._address)):
            self._answered_s = time.monotonic()
            return None
        silent_s = time.monotonic() - self._answered_s
        silent = f"its head {self._address} has not answered for {silent_s:.0f} s ({problem})"
        return silent if silent_s >= HEAD_PATIENCE_S else None


def kill_own_ray() -> None:
    """Kills what there is of a Ray of this process's own: its agents outlive the raylet by 10 s."""
    node: Any = ray_worker._global_node  # None: before ray.init
    infos = [info for of_kind in node.all_processes.values() for info in of_kind] if node else []
    sessions = {info.process.pid for info in infos}
    for pid in psutil.pids():
        with suppress(OSError):  # it ended
            if os.getsid(pid) in sessions:
                os.kill(pid, signal.SIGKILL)


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _connect(address: str) -> str | None:
    """What prevents a connection to host:port; None: nothing."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:  # the last two: no port number
        return str(error) or type(error).__name__
    return None


def _auth_mode() -> str | None:
    """RAY_AUTH_MODE. Raises ConfigError for a word that Ray does not know, which Ray takes for `disabled`."""
    mode = os.environ.get(AUTH_MODE)
    if mode not in (None, "token", "disabled"):
        raise ConfigError(f"{AUTH_MODE}={mode}: set it to token or disabled, or unset it")
    return mode


def _token() -> dict[str, str]:
    """The headers with this process's token; empty if it has none or must not send it. Raises ConfigError."""
    if _auth_mode() == "disabled":
        return {}
    loader = AuthenticationTokenLoader.instance()
    try:  # ray.init enables tokens itself only for address="auto"
        token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        return loader.get_token_for_http_header() if loader.has_token(ignore_auth_mode=True) else {}
    except AuthenticationError as error:
        raise ConfigError(f"the token cannot be read: {error.message}: {GET_TOKEN}") from error


def _lets_in(address: str, headers: Mapping[str, str]) -> bool:
    """Whether the head accepts these headers; ray.init would retry for minutes. Raises ConfigError."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        certificate, key, authority = load_certs_from_env()
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate))
    else:
        channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
    metadata = [(name.lower(), value) for name, value in headers.items()]
    with channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.CheckAlive(CheckAliveRequest(), timeout=CONNECT_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            status: Any = error
            if status.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            details = " ".join(str(status.details()).split())[:200]
            raise ConfigError(f"no Ray answers at {address} ({details}): give --address HOST:PORT") from None
    return True


def _is_loopback(address: str) -> bool:
    return address.startswith(("localhost:", "[::1]:", "::1:", "127."))


def _only_on_loopback(address: str) -> bool:
    """Whether start_local started this Ray: it does not answer at the node's own address."""
    if not _is_loopback(address):
        return False
    _use_loopback(False)
    return bool(_connect(f"{get_node_ip_address()}:{address.rpartition(':')[2]}"))


def _use_loopback(alone: bool) -> None:
    """Makes Ray and gloo, here and in child processes, use loopback (alone) or the node's address."""
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0" if alone else "1"
    ray_constants.ENABLE_RAY_CLUSTER = not alone
    interfaces = psutil.net_if_addrs().items()
    loopback = next(name for name, of in interfaces if any(a.address == "127.0.0.1" for a in of))
    if alone:
        os.environ.setdefault(GLOO_INTERFACE, loopback)
    elif os.environ.get(GLOO_INTERFACE) == loopback:
        del os.environ[GLOO_INTERFACE]
