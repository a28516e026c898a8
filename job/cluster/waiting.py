"""Waiting for something that other nodes have to do, and saying so."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass, field

from job.errors import NodesMissing

log = logging.getLogger(__name__)

LOG_SECONDS = 60.0
POLL_SECONDS = 0.5
NAMED_NODES = 8
"""Number of missing nodes that a message lists."""


@dataclass
class Wait:
    """The time that this node has waited.

    Attributes:
        limit: seconds after which waiting ends with an error; None: never.
    """

    limit: float | None
    _begun: float = field(default_factory=time.monotonic)
    _logged: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun

    def report(self, missing: str) -> None:
        """Log what is missing, at first and then every minute.

        Raises:
            NodesMissing: the limit has passed.
        """
        if self.limit is not None and self.seconds > self.limit:
            raise NodesMissing(
                f"still waiting for {missing} after {self.limit:.0f} s, the limit. Are all nodes running? Unset "
                "LAUNCH_WAIT_SECONDS to wait without limit."
            )
        if self._logged is None or time.monotonic() - self._logged >= LOG_SECONDS:
            log.info("waiting for %s%s", missing, "" if self._logged is None else f", for {self.seconds / 60:.0f} min")
            self._logged = time.monotonic()


def wait_for_address(host: str, wait: Wait) -> None:
    """Wait until the name of node 0 has an address.

    A pod's name resolves some time after its start (kubernetes#117819).

    Raises:
        NodesMissing: it has none in time.
    """
    while True:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            wait.report(f"node 0: {host} has no DNS record ({error.strerror})")
            time.sleep(POLL_SECONDS)
        else:
            return


def named(missing: list[int], nodes: int) -> str:
    """Missing nodes in words."""
    if not missing:
        return f"the other nodes of {nodes}"
    names = [str(rank) for rank in missing[:NAMED_NODES]]
    if len(missing) > NAMED_NODES:
        names.append(f"{len(missing) - NAMED_NODES} more")
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return f"node{'s' if len(missing) > 1 else ''} {listed} of {nodes}"
