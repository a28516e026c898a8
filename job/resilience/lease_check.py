"""The lease as a callback; the lease itself needs no torch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job.resilience.lease import Lease


class LeaseCheck(Callback):
    """Ends a run that has lost its lease at the next batch of training or validation.

    Args:
        lease: of this run.
    """

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Check it."""
        self.lease.raise_if_lost()

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Check it."""
        self.lease.raise_if_lost()
