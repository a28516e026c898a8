"""Metrics of a run by validation."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class ValidationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One validation, and the training since the one before.

    Attributes:
        epoch: epochs completed, so that the first is 1; a validation within an epoch counts that one as completed.
        global_step: optimizer steps done.
        metrics: ``train/…`` and ``val/…`` by name; None for a value that is not finite.
        lr: learning rate by name of parameter group, of those that train.
        images_per_second: throughput of training since the last validation; None where nothing was trained.
        data_wait: share of that time in which training waited for data, from 0 to 1.
        seconds: wall time of the run at its end, over all attempts.
    """

    epoch: Annotated[int, Meta(ge=0, lt=2**53)]
    global_step: Annotated[int, Meta(ge=0, lt=2**53)]
    metrics: dict[str, float | None]
    lr: dict[str, float] = {}
    images_per_second: float | None = None
    data_wait: float | None = None
    seconds: float = 0.0
