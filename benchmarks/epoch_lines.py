"""A callback of Lightning's fine-tuning example, in benchmarks/train_peers.py."""

from __future__ import annotations

from typing import Any

# The example is written for the package lightning, which takes no callbacks of pytorch_lightning.
from lightning.pytorch.callbacks import Callback


class EpochLines(Callback):
    """Prints a line at the end of each training epoch and validation."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Print that the epoch's training is over."""
        if trainer.is_last_batch:
            print("epoch trained", flush=True)

    def on_validation_epoch_end(self, trainer: Any, *_: Any) -> None:
        """Print the accuracy."""
        print(f"epoch validated: {float(trainer.lightning_module.valid_acc.compute()):.4f}", flush=True)
