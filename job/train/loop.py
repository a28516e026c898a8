"""Lightning's training loop, with a moment between two steps at which everything is consistent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop


class TrainingEpochLoop(_TrainingEpochLoop):
    """Calls ``between_steps`` before each batch is fetched.

    At that moment the step before is over with all its bookkeeping: counted, validated and logged.
    Lightning's own hooks come too early (``on_train_batch_end``: not yet counted nor logged) or too
    late (``on_train_batch_start``: the next batch is counted already), so that a checkpoint taken
    there misses an event or a step.

    Lightning's classes for loops are private; this one is held to pytorch-lightning 2.6 in setup.cfg
    and overrides three methods.
    """

    def __init__(self, trainer: pl.Trainer, between_steps: Sequence[Callable[[pl.Trainer], None]]) -> None:
        super().__init__(trainer)
        self._between_steps = tuple(between_steps)

    def advance(self, data_fetcher: Any) -> None:
        """One step; or, on the first call after a resume, what the loaded checkpoint left to do."""
        # Lightning holds "restarting" until the epoch ends, and would leave out ReduceLROnPlateau's step there.
        self.trainer.fit_loop._restarting = False
        if not self.restarting:
            for action in self._between_steps:
                action(self.trainer)
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: Any) -> None:
        """End a step, unless it is the one after whose end the loaded checkpoint was taken."""
        if self._skip_next_val:
            self._skip_next_val = False
            return
        super().on_advance_end(data_fetcher)

    def _broadcast_sigterm_tensor(self) -> None:
        """Do nothing: Lightning blocks on a broadcast here, :mod:`job.resilience.flags` does not block."""
