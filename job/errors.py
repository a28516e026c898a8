"""Errors that a user can mend, and the exit codes of the command line."""

from __future__ import annotations

from job.redact import redact

EXIT_USER_ERROR = 2
"""A mistake that a retry cannot mend: configuration, data, rights.

The same code argparse uses, so that a Kubernetes podFailurePolicy needs one rule for both.
"""

EXIT_RETRY = 75
"""What a restart may mend: a bucket out of reach, a rank lost or hung (EX_TEMPFAIL of sysexits.h)."""

EXIT_INTERNAL_ERROR = 70
"""An exception that nobody expected: a fault of the job, or of a library or callback given to it (EX_SOFTWARE)."""

EXIT_HANGUP = 129
"""Stopped by SIGHUP, after saving: 128 + SIGHUP, as a shell reports it."""

EXIT_INTERRUPTED = 130
"""Stopped by SIGINT (Ctrl-C), after saving: 128 + SIGINT."""

EXIT_PREEMPTED = 143
"""Stopped by SIGTERM or SIGUSR1, after saving: 128 + SIGTERM."""


def first_line(error: BaseException, length: int | None = None) -> str:
    """First line of an exception's message, or its representation where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0][:length]


class JobError(Exception):
    """A problem with a message for the user: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with :attr:`exit_code`. Credentials in the message are
    redacted, those in the text of another exception included.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(str(message)))


class ConfigError(JobError):
    """An option, or a combination of options, that cannot work."""


class StorageError(JobError):
    """A URI that cannot be read, written or listed."""


class StorageOutage(StorageError):
    """A bucket that does not answer, or answers that it cannot now."""

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
    """A loss, a gradient or a weight that is not finite: the same steps again would end alike."""


class LeaseError(JobError):
    """A run_dir that another job is writing to."""


class LeaseExpired(LeaseError):
    """A run_dir whose lease could not be renewed."""

    exit_code = EXIT_RETRY


class RankLost(JobError):
    """Another rank of this job died or hangs."""

    exit_code = EXIT_RETRY


class DeviceError(JobError):
    """A GPU or another accelerator that failed; another one, or the same after a restart, may work."""

    exit_code = EXIT_RETRY


class Preempted(JobError):
    """Stopped on request, by a signal to this rank or another one; what there was to save is saved.

    The command line exits with the code of the signal that this rank received, else with :attr:`exit_code`.
    """

    exit_code = EXIT_PREEMPTED
