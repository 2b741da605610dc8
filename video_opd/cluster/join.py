"""Finds, starts and joins a Ray cluster. docs/security.md says who gets in and what listens where."""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import grpc
import psutil
import ray
from ray._common.tls_utils import load_certs_from_env
from ray._private import ray_constants, services, utils
from ray._private.authentication import authentication_token_setup as token_setup
from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import gcs_service_pb2_grpc
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import AuthenticationError
from ray.util import get_node_ip_address

from video_opd.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
AUTH_MODE, GLOO_INTERFACE = "RAY_AUTH_MODE", "GLOO_SOCKET_IFNAME"
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
        return ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        why = " ".join(str(error).split())[:300]
        raise ConfigError(f"the Ray at {address} does not let this process in: {why}") from error


def start_local(**options: Any) -> Any:
    """ray.init of a new Ray of this machine, on loopback but for Serve's replicas. Raises ConfigError.

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
    return ray.init(address="local", **options)


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
