"""Errors with a message for the user, and the exit codes of the command line."""

from __future__ import annotations

import errno

from job.redact import redact

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of the operating system for a disk, or a user's share of it, that is full."""

EXIT_USER_ERROR = 2
"""A mistake that a retry cannot fix: configuration, data, permissions.

The same code argparse uses, so that a Kubernetes podFailurePolicy needs one rule for both.
"""

EXIT_NODES_MISSING = 69
"""Other nodes of the job were not there: no failure of this one (EX_UNAVAILABLE of sysexits.h)."""

EXIT_RETRY = 75
"""A failure that a restart may fix: an unreachable bucket, a lost or hanging rank (EX_TEMPFAIL of sysexits.h)."""

EXIT_INTERNAL_ERROR = 70
"""An unexpected exception: a bug of this package, or of a library or callback that it uses (EX_SOFTWARE)."""

EXIT_HANGUP = 129
"""Stopped by SIGHUP, after saving: 128 + SIGHUP, as a shell reports it."""

EXIT_INTERRUPTED = 130
"""Stopped by SIGINT (Ctrl-C), after saving: 128 + SIGINT."""

EXIT_PREEMPTED = 143
"""Stopped by SIGTERM or SIGUSR1, after saving: 128 + SIGTERM."""


def first_line(error: BaseException, length: int | None = None) -> str:
    """First line of an exception's message, or its representation if the message is empty."""
    return (str(error).strip() or repr(error)).splitlines()[0][:length]


class JobError(Exception):
    """A problem with a message for the user: the problem, where it is, and how to fix it.

    The command line prints it without a traceback and exits with :attr:`exit_code`. Credentials in the message are
    redacted, those in the text of another exception included.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(str(message)))


class ConfigError(JobError):
    """An option, or a combination of options, that is not supported."""


class StorageError(JobError):
    """A URI that cannot be read, written or listed."""


class StorageOutage(StorageError):
    """A bucket that does not answer, or is temporarily unavailable."""

    exit_code = EXIT_RETRY


class DataError(JobError):
    """A data set that cannot be trained on: layout, classes or unreadable images."""


class WeightsError(JobError):
    """Pretrained weights that cannot be loaded into the chosen backbone."""


class CheckpointError(JobError):
    """A checkpoint that is missing, damaged or does not fit the run."""


class NewerFormatError(CheckpointError):
    """A file of a run_dir that a newer version of this package wrote."""


class DivergedError(JobError):
    """A loss, gradient or weight that is not finite; repeating the same steps would fail the same way."""


class LeaseError(JobError):
    """A run_dir that another job writes to."""


class LeaseExpired(LeaseError):
    """A run_dir whose lease could not be renewed."""

    exit_code = EXIT_RETRY


class RankLost(JobError):
    """Another rank of this job ended or hangs."""

    exit_code = EXIT_RETRY


class NodesMissing(JobError):
    """Other nodes of this job do not run, or no longer."""

    exit_code = EXIT_NODES_MISSING


class DeviceError(JobError):
    """A failure of a GPU or another accelerator; a restart may fix it."""

    exit_code = EXIT_RETRY


class Preempted(JobError):
    """Stopped by a signal to this rank or another one, with the state saved.

    The command line exits with the code of the signal that this rank received, else with :attr:`exit_code`.
    """

    exit_code = EXIT_PREEMPTED
