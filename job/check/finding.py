"""Findings of a preflight check, and the report that holds them: the schema of ``--json``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from job.errors import JobError
from job.redact import redact

Status = Literal["ok", "warn", "fail"]
_ORDER: tuple[Status, ...] = ("ok", "warn", "fail")
FORMAT = 1


class Finding(msgspec.Struct, frozen=True):
    """One result of a check.

    Attributes:
        check: name of the check.
        status: "ok"; "warn": the run can start, but slower, dearer or less safely, or this could not be found out;
            "fail": it cannot start, or would end.
        message: what was found.
        mend: what to do about it; empty if nothing needs to be done.
        rank: that found it.
        seconds: that the check took.
    """

    check: str
    status: Status
    message: str
    mend: str = ""
    rank: int = 0
    seconds: float = 0.0


class Estimate(msgspec.Struct, frozen=True):
    """Length, size and price of the run, extrapolated from a few steps.

    Attributes:
        epochs: of the run, if early stopping does not end it before.
        steps: optimizer steps.
        seconds: of training and validation, without start-up and interruptions.
        checkpoint_bytes: of the largest checkpoint.
        kept_bytes: of all checkpoints that are kept at a time.
        price: of the run, in the currency of ``--price_per_hour``; None without it.
    """

    epochs: int
    steps: int
    seconds: float
    checkpoint_bytes: int
    kept_bytes: int
    price: float | None = None


class CheckReport(msgspec.Struct, frozen=True):
    """All findings.

    Attributes:
        status: the worst of the findings.
        findings: in the order of the checks.
        estimate: None if no step could be measured, or the run has no end.
        seconds: that all checks took.
        format: version of this schema.
    """

    status: Status
    findings: list[Finding]
    estimate: Estimate | None
    seconds: float
    format: int = FORMAT


class ChecksFailed(JobError):
    """At least one check has failed."""


def ok(check: str, message: str) -> Finding:
    """A finding that asks for nothing."""
    return Finding(check, "ok", _one_line(message))


def warn(check: str, message: str, mend: str) -> Finding:
    """A finding that does not prevent the run."""
    return Finding(check, "warn", _one_line(message), mend)


def fail(check: str, message: str, mend: str) -> Finding:
    """A finding that prevents the run."""
    return Finding(check, "fail", _one_line(message), mend)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status among findings."""
    return max((finding.status for finding in findings), key=_ORDER.index, default="ok")


def _one_line(message: str) -> str:
    return redact(" ".join(line.strip() for line in message.splitlines()))
