"""One job per run_dir: a lease object that its holder renews by conditional writes.

No clocks of two machines are compared. A holder that has not renewed its lease for :data:`VALID` of its lifetime, by
its own clock, writes nothing until a renewal succeeds. Another job takes the lease over once it has seen it unchanged
for the whole lifetime, by its own clock, and only if it is still unchanged at that moment. Of several that wait, one
succeeds.

A lease names the process that holds it. A restart on the same machine and in the same PID namespace (that of a torchrun
agent, say) sees that this process is gone, and does not wait. Run ids play no part: many jobs have the same one.

What is left: object stores have no write that depends on another object. A holder that is stopped (SIGSTOP, a paused
virtual machine) between the check and the arrival of its request may still do this one write when it is resumed. So may
an upload that takes longer than the rest of the lifetime, which is (1 - VALID) of it at least. The manifest of a
checkpoint has the SHA-256 of its state file, so that a file overwritten in this way is noticed and an older checkpoint
used. A virtual machine whose clocks stand still while it is paused finds out at its next renewal, after a quarter of
the lifetime.

On a disk a holder that is stopped in the middle of a renewal keeps the lock of the lease's file: until it is resumed or
killed, another start ends with exit code 75 and a message that names the lock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterator

import msgspec

from job import storage
from job.errors import JobError, LeaseError, LeaseExpired, StorageError, StorageOutage
from job.process.identity import this_process
from job.process.periodic import Periodic, call_within
from job.resilience.lease_file import FORMAT, Holder, parse
from job.storage import conditional
from job.storage.conditional import Versioned

log = logging.getLogger(__name__)

FILE = "lease.json"

VALID = 0.8
"""Share of a lease's lifetime, from its last renewal on, during which its holder may write."""

RENEWALS = 4
"""Renewals per lifetime. At 30 s: 11,520 a day of 400 bytes, 5 MB of superseded versions where a bucket keeps them."""

RELEASE_SECONDS = 15.0
"""How long the end of a run waits for the bucket to delete its lease, which otherwise expires."""


class Lease:
    """The right to write to a run_dir, for rank 0.

    Args:
        run_dir: folder that one job at a time may write to.
        seconds: lifetime of the lease without a renewal.
        outage_seconds: how long training goes on, without writing, while the bucket does not answer.
    """

    def __init__(self, run_dir: str, seconds: float = 30.0, outage_seconds: float = 600.0) -> None:
        self.uri = storage.join(run_dir, FILE)
        self.run_dir = run_dir
        self.seconds = seconds
        self.outage_seconds = outage_seconds
        self.start = uuid.uuid4().hex
        self._process = this_process()
        self._beat = 0
        self._version: str | None = None
        self._renewal: Periodic | None = None
        self._writing = threading.Lock()
        self._lost: LeaseError | None = None
        self._failure: Exception | None = None
        self._failing_since = 0.0
        # Compared before each step and each write; a rank that has acquired nothing is not restricted.
        self._fresh_until = float("inf")
        self._valid_until = float("inf")

    def acquire(self) -> None:
        """Take the lease, waiting for that of a dead job to expire.

        Raises:
            LeaseError: another job holds it, and renews it.
            StorageError: the run_dir cannot be written.
        """
        if weakness := conditional.weakness(self.uri):
            log.warning("the lease of %s does not fully protect it from a second job: %s", self.run_dir, weakness)
        while True:
            current = conditional.read_versioned(self.uri)
            if current is not None:
                self._wait_until_dead(current)
            began = _clock()
            try:
                self._version = conditional.write_if(self.uri, self._content(), current and current.version)
            except StorageError as error:
                if current is None or isinstance(error, StorageOutage):
                    raise
                self._go_on_without(error)
                return
            if self._version is not None:
                break
        self._set_renewed(began)
        if self._is_renewable():
            self._renewal = Periodic("lease", self.seconds / RENEWALS, self._renew_in_background)

    def raise_if_lost(self) -> None:
        """End a run that may no longer write; costs one comparison while the lease is valid, and never a request.

        Raises:
            LeaseError: another job has taken the run_dir over.
            LeaseExpired: the lease could not be renewed: for ``seconds``, or ``outage_seconds`` where the bucket does
                not answer.
        """
        now = _clock()
        if now < self._valid_until:
            return
        if self._lost is not None:
            raise self._lost
        failure = self._failure
        if failure is not None:
            limit = self.outage_seconds if isinstance(failure, StorageOutage) else self.seconds
            if now - self._failing_since > limit:
                raise LeaseExpired(
                    f"the lease of {self.run_dir} could not be renewed for {now - self._failing_since:.0f} s, so that "
                    f"another job may take it over: {failure}. The same command continues from the last checkpoint."
                ) from failure

    def require_held(self) -> None:
        """Make sure that this job may write at this moment; called immediately before each write to the run_dir.

        Costs one comparison after a recent renewal, and a request where the last one is older than a third of the
        lifetime: after a pause of the process, say.

        Raises:
            LeaseError: another job has taken the run_dir over.
            StorageOutage: the lease has expired and the bucket does not answer; a later try may succeed.
        """
        if _clock() < self._fresh_until:
            return
        if self._lost is not None:
            raise self._lost
        try:
            self._renew()
        except StorageError as error:
            if _clock() >= self._valid_until:
                raise StorageOutage(
                    f"nothing is written to {self.run_dir} while its lease cannot be renewed: {error}"
                ) from error
        if self._lost is not None:
            raise self._lost
        if _clock() >= self._valid_until:  # a pause since the answer
            raise StorageOutage(f"the lease of {self.run_dir} expired again during its renewal")

    def release(self) -> None:
        """Let the next job start at once."""
        if self._renewal is None:
            return
        renewal, self._renewal = self._renewal, None
        try:
            if not renewal.stop(RELEASE_SECONDS):
                raise TimeoutError(f"its renewal has not been answered for {RELEASE_SECONDS:.0f} s")
            call_within(RELEASE_SECONDS, self._remove, "lease-release")
        except (JobError, TimeoutError) as error:
            log.warning(
                "the lease of %s could not be deleted, and expires in %.0f s: %s", self.run_dir, self.seconds, error
            )

    @contextlib.contextmanager
    def released_at_end(self) -> Iterator[Lease]:
        """Release the lease when the context ends, however it does."""
        try:
            yield self
        finally:
            self.release()

    def _remove(self) -> None:
        if self._lost is not None:
            return
        self.require_held()
        with self._locked():
            assert self._version is not None
            conditional.remove_if(self.uri, self._version)
            self._fresh_until = self._valid_until = float("-inf")
            self._lost = LeaseError(f"the lease of {self.run_dir} is released.")

    def _wait_until_dead(self, first: Versioned) -> None:
        """Return once the lease that was read may be overwritten if it is still unchanged.

        Raises:
            LeaseError: it was renewed, or is of a newer version of this program.
        """
        holder = parse(self.uri, first.data)
        if holder is not None and holder.process.is_dead():
            return
        if holder is None:
            log.warning("%s is damaged, or of an older version of this program", self.uri)
        seconds = max(self.seconds, holder.seconds if holder else 0.0)
        owner = str(holder.process) if holder else "another job"
        log.info("%s is leased to %s: waiting up to %.0f s for a renewal", self.run_dir, owner, seconds)
        deadline = _clock() + seconds
        while True:
            overdue = _clock() >= deadline
            now = conditional.read_versioned(self.uri)
            if now is None:
                return
            if now.version != first.version:
                renewed = parse(self.uri, now.data)
                owner = f"rank 0 is {renewed.process}" if renewed else "its rank 0 is not known"
                raise LeaseError(
                    f"another job is writing to {self.run_dir}: {owner}. Stop it, or choose another --run_dir."
                )
            if overdue:
                break
            time.sleep(min(self.seconds / 15, 2.0))
        log.warning(
            "the lease of %s has not been renewed for %.0f s: taking it over from %s", self.run_dir, seconds, owner
        )

    def _is_renewable(self) -> bool:
        """Renew once, and find out whether the store honours a condition.

        Some object stores ignore If-Match; a retention policy, or a role without the right to delete, forbids
        overwriting.
        """
        try:
            self._renew()
            self._beat += 1
            if conditional.write_if(self.uri, self._content(), "1") is not None:
                log.warning(
                    "%s ignores the conditions of conditional writes: two jobs that start at once may both take %s",
                    self.uri.partition("://")[0],
                    self.run_dir,
                )
                self._version = None  # the next renewal reads it
        except StorageOutage:
            return True
        except StorageError as error:
            self._go_on_without(error)
            return False
        return True

    def _go_on_without(self, error: StorageError) -> None:
        log.warning(
            "%s cannot be overwritten, as under a retention policy, a hold or a role without the right to delete: %s. "
            "NO LEASE PROTECTS THIS RUN: a second job with the same --run_dir would overwrite its files. Start no "
            "second job, or choose a --run_dir in a bucket that allows overwriting.",
            self.uri,
            error,
        )
        self._failure, self._fresh_until, self._valid_until = None, float("inf"), float("inf")

    def _renew_in_background(self) -> None:
        if self._lost is None:
            try:
                self._renew()
            except StorageError as error:
                log.warning("the lease of %s could not be renewed: %s", self.run_dir, error)

    def _renew(self) -> None:
        """Renew the lease, or note that it is lost.

        Raises:
            StorageError: the store does not answer, or refuses.
        """
        with self._locked():
            if self._lost is not None:
                return
            began = _clock()
            try:
                self._overwrite(began)
            except Exception as error:
                if self._failure is None:
                    self._failing_since = began
                self._failure = error
                raise

    def _overwrite(self, began: float) -> None:
        self._beat += 1
        version = None
        if self._version is not None:
            version = conditional.write_if(self.uri, self._content(), self._version)
        if version is None:
            current = conditional.read_versioned(self.uri)
            try:
                holder = None if current is None else parse(self.uri, current.data)
            except LeaseError:  # of a newer version of this program
                holder = None
            if current is None and began < self._valid_until:  # a person has deleted it
                version = conditional.write_if(self.uri, self._content(), None)
            elif current is not None and holder is not None and holder.start == self.start:  # an answer was lost
                version = conditional.write_if(self.uri, self._content(), current.version)
            if version is None:
                self._lose(holder)
                return
        self._version = version
        self._set_renewed(began)

    def _set_renewed(self, began: float) -> None:
        self._failure = None
        self._fresh_until, self._valid_until = began + self.seconds / 3, began + VALID * self.seconds

    def _lose(self, holder: Holder | None) -> None:
        owner = f"rank 0 of which is {holder.process}" if holder else "or its lease was deleted"
        self._lost = LeaseError(
            f"{self.run_dir} was taken over by another job, {owner}, while this one did not renew its lease. This one "
            "ends, and writes nothing more."
        )
        self._fresh_until = self._valid_until = float("-inf")
        log.error("%s", self._lost)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One renewal at a time; a request that hangs must not block others for ever."""
        if not self._writing.acquire(timeout=self.seconds):
            raise StorageOutage(f"a renewal of {self.uri} has not been answered for {self.seconds:.0f} s")
        try:
            yield
        finally:
            self._writing.release()

    def _content(self) -> bytes:
        holder = Holder(self.start, self._process, self.seconds, self._beat, FORMAT)
        return msgspec.json.encode(holder)


def _clock() -> float:
    """Seconds of a clock that runs while the machine is suspended or the process stopped."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
