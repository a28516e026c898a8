"""The files of a report in run_dir: names, and reading what an earlier attempt wrote."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from job import storage
from job.errors import CheckpointError, NewerFormatError, StorageOutage
from job.monitoring.history import ValidationRecord
from job.monitoring.report.content import FILE, ReportContent, decode_report
from job.storage.json_files import MAX_BYTES, read_limited

log = logging.getLogger(__name__)

PAGE = "report.html"
MOST_COPIES = 1000


def numbered_name(name: str, number: int) -> str:
    """The name of a file beside one that the bucket lets nobody replace: ``report.2.json``."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{number}.{suffix}"


def free_number(run_dir: str) -> int:
    """The first number from 2 on under which there is no report."""
    number = 2
    while number < MOST_COPIES and storage.exists(storage.join(run_dir, numbered_name(FILE, number))):
        number += 1
    return number


def newest_uri(run_dir: str) -> str | None:
    """URI of the newest ``report.json``; None where there is none."""
    uri = storage.join(run_dir, FILE)
    if not storage.exists(uri):
        return None
    number = free_number(run_dir) - 1
    return uri if number < 2 else storage.join(run_dir, numbered_name(FILE, number))


def page_uri(run_dir: str) -> str:
    """URI of the newest ``report.html``."""
    number = free_number(run_dir) - 1
    return storage.join(run_dir, PAGE if number < 2 else numbered_name(PAGE, number))


def read_report(run_dir: str) -> ReportContent:
    """The newest report of a run.

    Raises:
        CheckpointError: there is none, or it is damaged.
        NewerFormatError: a newer version of job wrote it.
        StorageError: it cannot be read.
    """
    uri = newest_uri(run_dir)
    if uri is None:
        raise CheckpointError(
            f"there is no {storage.join(run_dir, FILE)}. Is this the run_dir of a fit? It is written when training "
            "starts."
        )
    return decode_report(uri, read_limited(uri, MAX_BYTES))


class EarlierReport:
    """The report that earlier attempts left, read once.

    Args:
        run_dir: folder of the run.

    Attributes:
        is_newer: a newer version of job wrote it; known once :attr:`content` was read.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.is_newer = False

    @functools.cached_property
    def content(self) -> ReportContent | None:
        """The report; None, with a warning, where it cannot be used.

        Raises:
            StorageOutage: the bucket does not answer.
        """
        try:
            if newest_uri(self.run_dir) is None:
                return None
            return read_report(self.run_dir)
        except StorageOutage:
            raise
        except NewerFormatError as error:
            self.is_newer = True
            log.warning("%s It is left unchanged, and the history of validations starts anew.", error)
        except CheckpointError as error:
            log.warning("%s It is replaced, and the history of validations starts anew.", error)
        return None

    def history(self) -> Sequence[ValidationRecord]:
        """Validations of earlier attempts."""
        return () if self.content is None else self.content.history
