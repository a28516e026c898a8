"""A limit on attempts that end without progress: ``<run_dir>/attempts.json``.

Whatever restarts the ranks, a Kubernetes Job or torch elastic, would otherwise restart them for ever where each attempt
fails in the same way. Only rank 0 reads and writes the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Annotated

import msgspec

from job import storage, typed
from job.errors import EXIT_USER_ERROR, ConfigError, DataError, JobError, LeaseError, Preempted, RankLost, StorageError
from job.process.periodic import call_within
from job.process.signals import Stopped
from job.storage.format_version import MALFORMED, format_version

log = logging.getLogger(__name__)

FILE = "attempts.json"
MAX_BYTES = 1 << 16
FORMAT = 1
WRITE_SECONDS = 15.0
"""How long the end of a run waits for the bucket to take the count."""
MAX_FAILED = 5
"""Consecutive attempts that may end by an error of their own."""
MAX_LOST = 20
"""Consecutive attempts that may crash: killed, without their machine, or because another rank ended."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class Attempts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attempts since the last new checkpoint, all with one configuration.

    Attributes:
        format: version of the file.
        step: ``global_step`` of the newest checkpoint at the time; -1: none.
        configuration: SHA-256 of the configuration.
        failed: those that ended by an error, other than a user's mistake.
        lost: those that crashed: their end is not known, or was the end of another rank.
        last_error: of the last one that failed.
    """

    format: Annotated[int, msgspec.Meta(ge=1)]
    step: Annotated[int, msgspec.Meta(ge=-1)]
    configuration: str
    failed: Count = 0
    lost: Count = 0
    last_error: str = ""


def read(run_dir: str) -> Attempts | None:
    """The record of a run; None where there is none, or it cannot be read, which is logged.

    Raises:
        ConfigError: a newer version of job wrote it.
    """
    uri = storage.join(run_dir, FILE)
    if not storage.exists(uri):
        return None
    try:
        content = storage.read_bounded(uri, MAX_BYTES)
    except DataError as error:
        log.warning("%s The count of attempts without a new checkpoint is reset", error)
        return None
    try:
        if (version := format_version(content)) > FORMAT:
            raise ConfigError(
                f"{uri} is of format {version}, and this version of job reads formats up to {FORMAT}. Use the "
                "version that wrote it, or a newer one."
            )
        return typed.from_json(content, Attempts)
    except MALFORMED as error:
        log.warning("%s is damaged (%s): the count of attempts without a new checkpoint is reset", uri, error)
        return None


def begin(
    run_dir: str, step: int, configuration: str, before_write: Callable[[], None] = storage.unconditionally
) -> Attempts:
    """Count an attempt that resumes at ``step``; called on rank 0, which holds the lease.

    Args:
        run_dir: of the run.
        step: ``global_step`` of its newest checkpoint; -1: none.
        configuration: of this attempt.
        before_write: called immediately before the write; raises if this job may not write to run_dir.

    Raises:
        ConfigError: too many attempts before it have ended without a new checkpoint.
    """
    before = earlier(run_dir, step, configuration)
    _write(run_dir, msgspec.structs.replace(before, lost=before.lost + 1), before_write)  # until its end is known
    return before


def earlier(run_dir: str, step: int, configuration: str) -> Attempts:
    """The attempts before the next one, which would resume at ``step``.

    Args:
        run_dir: of the run.
        step: ``global_step`` of its newest checkpoint; -1: none.
        configuration: of the next attempt.

    Raises:
        ConfigError: too many of them have ended without a new checkpoint.
    """
    digest = hashlib.sha256(configuration.encode()).hexdigest()
    before = read(run_dir)
    if before is None or before.step != step or before.configuration != digest:
        before = Attempts(FORMAT, step, digest)
    if before.failed >= MAX_FAILED or before.lost >= MAX_LOST:
        cause = f" The last error was: {before.last_error}" if before.last_error else ""
        where = f"after step {step}" if step >= 0 else "at all"
        raise ConfigError(
            f"{before.failed + before.lost} consecutive attempts ended without a new checkpoint {where}, "
            f"{before.failed} of them with an error: another restart would not help.{cause} Fix the cause, then delete "
            f"{storage.join(run_dir, FILE)} or change an option, and start it again."
        )
    return before


@contextlib.contextmanager
def counted(
    run_dir: str, before: Attempts | None, before_write: Callable[[], None] = storage.unconditionally
) -> Iterator[None]:
    """Record how this attempt ends. Preemptions, other requests to stop and a user's mistakes do not count.

    Args:
        run_dir: of the run.
        before: what :func:`begin` returned; None: another rank keeps the record.
        before_write: called immediately before each write; raises if this job may not write to run_dir.
    """
    if before is None:
        yield
        return
    try:
        yield
    except (Preempted, Stopped):
        _write_at_end(run_dir, before, before_write)
        raise
    except RankLost:
        raise  # counted as lost already
    except Exception as error:
        if isinstance(error, JobError) and error.exit_code == EXIT_USER_ERROR:
            _write_at_end(run_dir, before, before_write)
        else:
            first_line = (str(error).strip().splitlines() or [""])[0][:500]
            failed = msgspec.structs.replace(
                before, failed=before.failed + 1, last_error=f"{type(error).__name__}: {first_line}"
            )
            _write_at_end(run_dir, failed, before_write)
        raise
    with contextlib.suppress(StorageError, LeaseError):
        before_write()
        storage.remove(storage.join(run_dir, FILE))


def _write_at_end(run_dir: str, attempts: Attempts, before_write: Callable[[], None]) -> None:
    """Write the count, unless an outage of the bucket would delay the end of the process."""
    try:
        call_within(WRITE_SECONDS, lambda: _write(run_dir, attempts, before_write), f"writing {FILE}")
    except TimeoutError as error:
        log.info("the count of attempts without a new checkpoint is not updated: %s", error)


def _write(run_dir: str, attempts: Attempts, before_write: Callable[[], None]) -> None:
    try:
        storage.write_bytes(storage.join(run_dir, FILE), msgspec.json.encode(attempts), before_write)
    except (StorageError, LeaseError) as error:  # out of reach, overwriting is forbidden, or another job writes here
        log.info("the count of attempts without a new checkpoint could not be written: %s", error)
