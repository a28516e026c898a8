"""The lease as a Lightning callback; the lease itself needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job import storage
from job.resilience.lease import Lease


class LeaseCheck(Callback):
    """Ends a run that has lost its lease at the next batch of training or validation.

    Args:
        lease: of this run.
    """

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Check the lease."""
        self.lease.raise_if_lost()

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Check the lease."""
        self.lease.raise_if_lost()


def write_check(trainer: pl.Trainer | None) -> Callable[[], None]:
    """Function to call immediately before each write to run_dir: it raises if another job holds the lease."""
    callbacks: list[Callback] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    leases = [callback.lease for callback in callbacks if isinstance(callback, LeaseCheck)]
    return leases[0].require_held if leases else storage.unconditionally
