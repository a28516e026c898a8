"""Content of a lease object."""

from __future__ import annotations

import contextlib
from typing import Annotated

import msgspec

from job import typed
from job.errors import LeaseError
from job.process.identity import ProcessId
from job.storage.format_version import MALFORMED, format_version

FORMAT = 1

MAX_BYTES = 1 << 16

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class Holder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a lease.

    Attributes:
        start: random identifier of one start of a job.
        process: its rank 0.
        seconds: lifetime of the lease without a renewal.
        beat: number of renewals.
        format: version of this file format.
    """

    start: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    process: ProcessId
    seconds: Seconds
    beat: Annotated[int, msgspec.Meta(ge=0)]
    format: Annotated[int, msgspec.Meta(ge=1, le=FORMAT)]


def parse(uri: str, content: bytes) -> Holder | None:
    """The holder; None for a lease that is damaged, half written, or of a version without a format number.

    Raises:
        LeaseError: it is of a newer version.
    """
    if len(content) > MAX_BYTES:
        return None
    with contextlib.suppress(*MALFORMED):
        if (version := format_version(content)) > FORMAT:
            raise LeaseError(
                f"{uri} has format {version}, and this version of the program reads formats up to {FORMAT}. Use the "
                "version that wrote it, or choose another --run_dir."
            )
        return typed.from_json(content, Holder)
    return None
