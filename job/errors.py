"""Errors that a user can mend, and the exit codes they lead to."""

from __future__ import annotations

EXIT_USER_ERROR = 2
"""Exit code of every mistake that a retry cannot mend (configuration, data, rights).

The same code argparse uses, so that a Kubernetes podFailurePolicy needs one rule for both.
"""


class JobError(Exception):
    """A problem the user can mend: the message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with :data:`EXIT_USER_ERROR`.
    """


class ConfigError(JobError):
    """An option, or a combination of options, that cannot work."""


class StorageError(JobError):
    """A URI that cannot be read, written or listed."""


class DataError(JobError):
    """A data set that cannot be trained on: layout, classes or unreadable images."""


class WeightsError(JobError):
    """Pretrained weights that cannot be loaded into the chosen backbone."""


class CheckpointError(JobError):
    """A checkpoint that is missing, damaged or does not fit the run."""
