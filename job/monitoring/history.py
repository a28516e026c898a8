"""Metrics of a run by validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from job import typed
from job.errors import CheckpointError
from job.storage.format_version import MALFORMED

MOST_RECORDS = 1000
"""Validations that a history holds."""

MOST_CHARACTERS = 32 << 20
"""Length of a history as JSON that is read."""

MetricName = Annotated[str, Meta(min_length=1, max_length=1000)]


class ValidationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One validation, and the training since the one before.

    Attributes:
        epoch: epochs completed, so that the first is 1; a validation within an epoch counts that one as completed.
        global_step: optimizer steps done.
        metrics: ``train/…`` and ``val/…`` by name, without those of single classes; None for a value that is not
            finite.
        lr: learning rate by name of parameter group, of those that train.
        images_per_second: throughput of training since the last validation; None where nothing was trained.
        data_wait: share of that time in which training waited for data, from 0 to 1.
        seconds: wall time of the run at its end, over all attempts.
    """

    epoch: Annotated[int, Meta(ge=0, lt=2**53)]
    global_step: Annotated[int, Meta(ge=0, lt=2**53)]
    metrics: Annotated[dict[MetricName, float | None], Meta(max_length=1000)]
    lr: Annotated[dict[MetricName, float], Meta(max_length=1000)] = {}
    images_per_second: float | None = None
    data_wait: float | None = None
    seconds: float = 0.0


Records = Annotated[list[ValidationRecord], Meta(max_length=MOST_RECORDS)]


def thinned(records: Sequence[ValidationRecord]) -> list[ValidationRecord]:
    """At most :data:`MOST_RECORDS` records: above, every second one is dropped, but not the first and the last."""
    kept = list(records)
    while len(kept) > MOST_RECORDS:
        kept = [*kept[:-1:2], kept[-1]]
    return kept


def until_step(records: Sequence[ValidationRecord], global_step: int) -> list[ValidationRecord]:
    """Records up to ``global_step``, which a run that resumes there keeps; each step once, in order."""
    by_step = {record.global_step: record for record in records if record.global_step <= global_step}
    return [by_step[step] for step in sorted(by_step)]


def encode(records: Sequence[ValidationRecord]) -> str:
    """The records as the JSON text in a checkpoint: one value, which is copied at once."""
    return msgspec.json.encode(records).decode()


def decode(text: object) -> list[ValidationRecord]:
    """The records in a checkpoint, which is untrusted.

    Raises:
        CheckpointError: it holds none, or too many.
    """
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise CheckpointError(f"the checkpoint's history is no text of at most {MOST_CHARACTERS:,} characters")
    try:
        records: list[ValidationRecord] = typed.from_json(text, Records)
    except MALFORMED as error:
        raise CheckpointError(f"the checkpoint's history is damaged: {error}") from error
    return records
