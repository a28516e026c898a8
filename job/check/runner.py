"""Run checks side by side, each within its own time limit; one that fails or hangs does not stop the others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from job.check.finding import Finding, Status, fail, warn
from job.cluster import ranks
from job.errors import JobError, first_line
from job.process.periodic import call_within
from job.train.errors import translated

log = logging.getLogger(__name__)

_THREAD = "check-"
"""Beginning of the names of threads that checks run in."""


@dataclass(frozen=True)
class Check:
    """A function that finds out one thing.

    Attributes:
        name: of its findings, unless they have names of their own.
        run: returns the findings; an exception becomes a finding, too.
        seconds: time limit.
        mend: what helps against an exception or against the time limit.
        status_at_timeout: status of the finding that the time limit has passed.
    """

    name: str
    run: Callable[[], Iterable[Finding]]
    seconds: float
    mend: str
    status_at_timeout: Status = "warn"


def run_check(check: Check) -> list[Finding]:
    """The findings of one check, with its time and this process's rank."""
    began = time.monotonic()
    try:
        findings = call_within(check.seconds, lambda: list(check.run()), f"{_THREAD}{check.name}")
    except TimeoutError:
        message = f"not finished after {check.seconds:.0f} s: what it waits for does not answer, or too slowly."
        findings = [(fail if check.status_at_timeout == "fail" else warn)(check.name, message, check.mend)]
    except Exception as error:
        better = translated(error)
        if isinstance(better, JobError):
            message = str(better)
        else:
            log.error("the check %s ended by an unexpected exception:", check.name, exc_info=error)
            message = f"{type(error).__name__}: {first_line(error)}"
        findings = [fail(check.name, message, check.mend)]
    seconds = round(time.monotonic() - began, 3)
    return [msgspec.structs.replace(finding, rank=ranks.rank(), seconds=seconds) for finding in findings]


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """The findings of all checks, in their order; the checks run at the same time."""
    if not checks:
        return []
    with ThreadPoolExecutor(len(checks), thread_name_prefix="check") as pool:
        return [finding for findings in pool.map(run_check, checks) for finding in findings]


def are_unfinished() -> bool:
    """Whether checks still run that have passed their time limit: the end of the process would wait for them."""
    return any(thread.name.startswith(_THREAD) for thread in threading.enumerate())
