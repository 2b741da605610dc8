"""Where the learner's ranks meet."""

import socket

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


def node_store(host: str, port: int, size: int, is_master: bool) -> TCPStore:
    """torch's store at `host`, for `size` processes. The master listens on that address alone."""
    if not is_master:
        return TCPStore(host, port, size, is_master=False)
    family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server((host, port), family=family)
    return TCPStore(host, port, size, is_master=True, master_listen_fd=listener.detach())
