"""Finding, starting and joining a Ray: who may, and where it listens, is in docs/security.md."""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

from video_opd.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
AUTH_MODE, GLOO_INTERFACE = "RAY_AUTH_MODE", "GLOO_SOCKET_IFNAME"
GET_TOKEN = "copy the head's ~/.ray/auth_token to the same place here, or name a copy in RAY_AUTH_TOKEN_PATH"


def find_address(address: str) -> str:
    """host:port of a Ray that answers. Raises ConfigError."""
    from ray._private.services import find_gcs_addresses

    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "auto":
        found = sorted(find_gcs_addresses())
        if not found:
            raise ConfigError(
                "no Ray runs on this machine: start a run, or name a node of its cluster with --address HOST:PORT"
            )
        if len(found) > 1:
            raise ConfigError(
                f"several Rays run on this machine, {', '.join(found)}: name one with --address"
            )
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


def join(address: str, **options: Any) -> Any:
    """ray.init of a driver at the running Ray `address`, host:port, with this process's token. Returns its context.

    RAY_AUTH_MODE is as the user set it; unset, the token is sent if there is one. Raises ConfigError within seconds where nothing
    answers, or the Ray wants a token that this process does not have; prints a warning where it wants none.
    """
    import ray
    from ray.exceptions import AuthenticationError

    logging.getLogger("ray").setLevel(logging.ERROR)
    token = _token()
    _use_loopback(_only_on_loopback(address))
    if _lets_in(address, {}):
        if not _is_loopback(address):
            print(f"warning: the Ray at {address} lets in all who reach it: see docs/security.md", flush=True)
    elif not token:
        off = os.environ.get(AUTH_MODE) == "disabled"
        why = (
            f"{AUTH_MODE}=disabled, so that none is sent: unset it"
            if off
            else f"there is none here: {GET_TOKEN}"
        )
        raise ConfigError(f"the Ray at {address} wants its token, and {why}")
    elif not _lets_in(address, token):
        raise ConfigError(f"the Ray at {address} wants another token than the one here: {GET_TOKEN}")
    try:
        return ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise ConfigError(
            f"the Ray at {address} does not let this process in: {' '.join(str(error).split())[:300]}"
        ) from error


def start_local(**options: Any) -> Any:
    """ray.init of a Ray of this machine alone, on loopback but for Serve's replicas. Returns its context.

    Token mode unless RAY_AUTH_MODE says otherwise; a token is made, for this user's eyes, where there is none. Raises ConfigError.
    """
    import ray
    from ray._private.authentication.authentication_token_setup import (
        enable_token_auth_by_default,
        ensure_token_if_auth_enabled,
    )
    from ray.exceptions import AuthenticationError

    logging.getLogger("ray").setLevel(logging.ERROR)
    if _auth_mode() == "disabled":
        print(
            f"warning: {AUTH_MODE}=disabled: the run lets in all who reach this machine: see docs/security.md",
            flush=True,
        )
    enable_token_auth_by_default()
    umask = os.umask(0o077)
    try:
        ensure_token_if_auth_enabled()
    except AuthenticationError as error:
        raise ConfigError(f"no Ray can start here: {error.message}") from error
    finally:
        os.umask(umask)
    _use_loopback(True)
    return ray.init(address="local", **options)


def _auth_mode() -> str | None:
    """RAY_AUTH_MODE; Ray takes a word that it does not know for `disabled`. Raises ConfigError for one."""
    mode = os.environ.get(AUTH_MODE)
    if mode not in (None, "token", "disabled"):
        raise ConfigError(f"{AUTH_MODE}={mode}: set it to token or disabled, or unset it")
    return mode


def _token() -> dict[str, str]:
    """The headers that show this process's token; none where it has none, or is to send none. Raises ConfigError."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )
    from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
    from ray.exceptions import AuthenticationError

    if _auth_mode() == "disabled":
        return {}
    loader = AuthenticationTokenLoader.instance()
    try:
        maybe_enable_token_auth_if_token_available(
            warn_if_disabled=False
        )  # ray.init does so for address="auto" alone
        return loader.get_token_for_http_header() if loader.has_token(ignore_auth_mode=True) else {}
    except AuthenticationError as error:
        raise ConfigError(f"the token cannot be read: {error.message}: {GET_TOKEN}") from error


def _lets_in(address: str, headers: Mapping[str, str]) -> bool:
    """Whether Ray's head answers a call with these headers; ray.init would try for minutes. Raises ConfigError."""
    import grpc
    from ray._common.tls_utils import load_certs_from_env
    from ray.core.generated import gcs_service_pb2_grpc
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # pyright: ignore[reportAttributeAccessIssue]

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
            code: Any = error
            if code.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            said = " ".join(str(code.details()).split())[:200]
            raise ConfigError(f"no Ray answers at {address} ({said}): give --address HOST:PORT") from None
    return True


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def _only_on_loopback(address: str) -> bool:
    """Whether it is a Ray that start_local started: nothing answers at this node's own address."""
    from ray.util import get_node_ip_address

    if not _is_loopback(address):
        return False
    _use_loopback(False)
    return not _answers(f"{get_node_ip_address()}:{address.rpartition(':')[2]}")


def _use_loopback(alone: bool) -> None:
    """Whether this process, and what it starts, takes loopback for the node's address: Ray's own switch for laptops, and gloo's."""
    import psutil
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0" if alone else "1"
    ray_constants.ENABLE_RAY_CLUSTER = not alone
    loopback = next(
        name for name, of in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in of)
    )
    if alone:
        os.environ.setdefault(GLOO_INTERFACE, loopback)
    elif os.environ.get(GLOO_INTERFACE) == loopback:
        del os.environ[GLOO_INTERFACE]
