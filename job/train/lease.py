"""One job a run_dir: a lease object that its holder renews."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from job import storage
from job.errors import JobError, LeaseError, StorageError
from job.periodic import Periodic

log = logging.getLogger(__name__)

FILE = "lease.json"


@dataclass
class Holder:
    """Who holds a lease.

    Attributes:
        job: what the processes of one job have in common, over its restarts.
        token: of this very start.
        host: name of the machine rank 0 runs on.
        process: rank 0 there, as "PID/start time/PID namespace".
        beat: how often the lease was renewed.
    """

    job: str
    token: str
    host: str
    process: str
    beat: int = 0


class Lease:
    """The right to write to a run_dir, for rank 0.

    No clocks are compared: a lease that stays the same for ``seconds`` is that of a dead job.

    Args:
        seconds: how long a lease lives without being renewed.
    """

    def __init__(self, run_dir: str, seconds: float = 30.0) -> None:
        self.uri = storage.join(run_dir, FILE)
        self.run_dir = run_dir
        self.seconds = seconds
        self.mine = Holder(_job(), uuid.uuid4().hex, socket.gethostname(), _process())
        self._renewal: Periodic | None = None
        self._lost_to: Holder | None = None

    def acquire(self) -> None:
        """Take the lease, waiting for that of a dead job to run out.

        Raises:
            LeaseError: another job holds it, and is alive.
        """
        while not storage.create(self.uri, self._body()):
            holder = self._read()
            if holder is None:
                continue
            if holder.job != self.mine.job and not _is_dead(holder):
                self._wait_until_dead(holder)
            storage.write_bytes(self.uri, self._body())
            break
        self._renewal = Periodic("lease", self.seconds / 3, self._renew)

    def raise_if_lost(self) -> None:
        """Raise :class:`~job.errors.LeaseError` when another job has taken the run_dir over."""
        if self._lost_to is not None:
            raise LeaseError(f"{self.run_dir} was taken over by another job, on {self._lost_to.host}. This one stops.")

    def release(self) -> None:
        """Let the next job start at once."""
        if self._renewal is None:
            return
        self._renewal.stop()
        self._renewal = None
        with contextlib.suppress(StorageError):  # it runs out by itself
            holder = self._read()
            if holder is not None and holder.token == self.mine.token:
                storage.remove(self.uri)

    @contextlib.contextmanager
    def released_at_end(self) -> Iterator[Lease]:
        """Release the lease when the context ends, however it does."""
        try:
            yield self
        finally:
            self.release()

    def _wait_until_dead(self, holder: Holder) -> None:
        log.info(
            "%s is leased to a job on %s: waiting up to %.0f s for a sign of it",
            self.run_dir,
            holder.host,
            self.seconds,
        )
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            time.sleep(self.seconds / 15)
            now = self._read()
            if now is None:
                return
            if now != holder:
                raise LeaseError(
                    f"another job is writing to {self.run_dir}: rank 0 on {now.host}. Stop it, or choose another "
                    "--run_dir."
                )
        log.warning("the job on %s shows no sign of life: taking %s over", holder.host, self.run_dir)

    def _renew(self) -> None:
        try:
            holder = self._read()
            if holder is not None and holder.token != self.mine.token:
                self._lost_to = holder
                return
            self.mine.beat += 1
            storage.write_bytes(self.uri, self._body())
        except JobError as error:
            log.warning("the lease of %s could not be renewed: %s", self.run_dir, error)

    def _read(self) -> Holder | None:
        if not storage.exists(self.uri):
            return None
        content = storage.read_bytes(self.uri)
        if not content:  # on a disk: created, and not yet written, by somebody who will, or who died
            return Holder(job="", token="", host="an unknown machine", process="0/None/None")
        try:
            return Holder(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise LeaseError(f"{self.uri} is no lease ({error}). If no job uses {self.run_dir}, delete it.") from error

    def _body(self) -> bytes:
        return json.dumps(asdict(self.mine)).encode()


def _job() -> str:
    """torchrun's run id, which its restarts share; or this process."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id == "none":
        return os.environ.get("MASTER_ADDR", socket.gethostname()) + "/" + os.environ.get("MASTER_PORT", _process())
    return run_id


def _process() -> str:
    return f"{os.getpid()}/{_start_time(os.getpid())}/{_namespace()}"


def _namespace() -> str | None:
    """The PID namespace, by which containers that share a host's name differ (namespaces(7))."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return None


def _start_time(pid: int) -> str | None:
    """Clock ticks after boot at which a process of this machine began; None where there is none (proc(5))."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return None


def _is_dead(holder: Holder) -> bool:
    """Whether it ran where this process sees it, and does no longer."""
    pid, start, namespace = holder.process.split("/")
    visible = holder.host == socket.gethostname() and namespace == str(_namespace())
    return visible and _start_time(int(pid)) != start
