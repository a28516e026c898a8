"""Errors that a user can mend, and the exit codes of the command line."""

from __future__ import annotations

EXIT_USER_ERROR = 2
"""A mistake that a retry cannot mend: configuration, data, rights.

The same code argparse uses, so that a Kubernetes podFailurePolicy needs one rule for both.
"""

EXIT_RETRY = 75
"""What a restart may mend: a bucket out of reach, a rank lost or hung (EX_TEMPFAIL of sysexits.h)."""

EXIT_PREEMPTED = 143
"""Stopped by SIGTERM or SIGUSR1, after saving: 128 + SIGTERM, as a shell reports it."""


class JobError(Exception):
    """A problem with a message for the user: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with :attr:`exit_code`.
    """

    exit_code = EXIT_USER_ERROR


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


class LeaseError(JobError):
    """A run_dir that another job is writing to."""


class LeaseExpired(LeaseError):
    """A run_dir whose lease could not be renewed."""

    exit_code = EXIT_RETRY


class RankLost(JobError):
    """Another rank of this job died or hangs."""

    exit_code = EXIT_RETRY


class Preempted(JobError):
    """The machine is being taken away; what there was to save is saved."""

    exit_code = EXIT_PREEMPTED
