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
    """The name of the file of this number, from 1 on: ``report.json``, ``report.2.json``, …"""
    if number == 1:
        return name
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
    number = free_number(run_dir) - 1
    uri = storage.join(run_dir, numbered_name(FILE, number))
    return uri if number > 1 or storage.exists(uri) else None


def page_uri(run_dir: str) -> str:
    """URI of the newest ``report.html``."""
    return storage.join(run_dir, numbered_name(PAGE, free_number(run_dir) - 1))


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
        number: of its file, 1 where there is none; known likewise.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.is_newer = False
        self.number = 1

    @functools.cached_property
    def content(self) -> ReportContent | None:
        """The report; None, with a warning, where it cannot be used.

        Raises:
            StorageOutage: the bucket does not answer.
        """
        try:
            self.number = free_number(self.run_dir) - 1
            if newest_uri(self.run_dir) is None:
                return None
            return read_report(self.run_dir)
        except StorageOutage:
            raise
        except NewerFormatError as error:
            self.is_newer = True
            log.warning("%s It is left unchanged.", error)
        except CheckpointError as error:
            log.warning("%s. It is replaced.", error)
        return None

    def history(self) -> Sequence[ValidationRecord]:
        """Validations of earlier attempts."""
        return () if self.content is None else self.content.history
