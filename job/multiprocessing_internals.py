"""Uses of private API of the standard library's multiprocessing, as Python 3.11 to 3.13 have it.

``tests/unit/test_multiprocessing_internals.py`` fails where a release changes it. Upstream:
https://github.com/python/cpython/issues/86354.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from multiprocessing import connection, forkserver, util
from pathlib import Path
from typing import Any

from job.process.signals import STOP_SIGNALS


def fork_fork_server(preload: list[str]) -> None:
    """Fork this process' fork server from it, with all that it has imported; to be called before any thread starts.

    ``multiprocessing`` starts a new interpreter, which imports torch again: seconds for each rank, at each restart. It
    means a child of a fork server to use that one (``ForkServer.ensure_running``), but starts another, because
    ``_forkserver_pid`` is not set (Python 3.11 to 3.13). From 3.14 on a fork server wants a key of its clients, and
    ``multiprocessing`` starts its own.

    Args:
        preload: modules that the server imports.
    """
    if sys.version_info >= (3, 14):
        return
    state: Any = forkserver._forkserver
    untyped: Any = connection
    with socket.socket(socket.AF_UNIX) as listener:
        address = untyped.arbitrary_address("AF_UNIX")
        listener.bind(address)
        if not util.is_abstract_socket_namespace(address):
            Path(address).chmod(0o600)
        listener.listen()
        # Its clients hold the other end: when they have all ended, it ends.
        alive_r, alive_w = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.close(alive_w)
                for number in STOP_SIGNALS:
                    if signal.getsignal(number) != signal.SIG_IGN:
                        signal.signal(number, signal.SIG_DFL)
                forkserver.main(listener.detach(), alive_r, preload)
            finally:
                os._exit(0)
        os.close(alive_r)
    state._forkserver_address, state._forkserver_alive_fd, state._forkserver_pid = address, alive_w, pid
