"""The store of the launchers and of the ranks: torch's TCPStore, reachable at one address alone.

Left to itself torch serves a store on all interfaces of the machine.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

log = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections that wait to be accepted: all ranks may connect at once."""
CONNECT_SECONDS = 2.0


def serve(host: str, port: int, timeout: timedelta) -> TCPStore:
    """Serve a store at the address of ``host``, a name or address of this machine.

    Args:
        host: its name or address, as other nodes know it.
        port: 0: any free one.
        timeout: how long a request for a missing key waits.

    Raises:
        OSError: the port is in use, or the name has no address.
    """
    server = _listening_socket(host, port)
    port = server.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=server.detach()
    )


def connect(host: str, port: int, timeout: timedelta) -> TCPStore:
    """Connect to the store at ``host``.

    Raises:
        OSError: nothing answers.
        RuntimeError: something other than a store answers (torch's DistNetworkError).
    """
    # Without this torch would log each attempt.
    socket.create_connection((host, port), CONNECT_SECONDS).close()
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _listening_socket(host: str, port: int) -> socket.socket:
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        # In /etc/hosts a machine may have a name of its own that others know by another address.
        if _is_loopback(str(address[0])) and host != "localhost" and not _is_loopback(host):
            continue
        try:
            return socket.create_server(address, family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    log.info("%s names no interface of this machine that others reach: the store is served on all of them", host)
    if not socket.has_dualstack_ipv6():
        return socket.create_server(("", port), backlog=BACKLOG)
    return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:  # a name
        return False
