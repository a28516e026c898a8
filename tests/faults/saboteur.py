"""A Lightning callback that sends a signal to its own process, as a preemption does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job.errors import ConfigError


class Saboteur(Callback):
    """Sends a signal at a given step, in the first starts only.

    Args:
        marker: file that remembers how often it has struck.
        step: ``global_step`` at which it strikes.
        rank: whom.
        name: the signal.
        target: "rank" or "launcher".
        phase: "training" or "validation".
        times: how often, once a start, ``step`` further each time.
    """

    def __init__(
        self,
        marker: str,
        step: int,
        rank: int = 0,
        name: str = "SIGTERM",
        target: str = "rank",
        phase: str = "training",
        times: int = 1,
    ) -> None:
        self.marker = Path(marker)
        self.step = step
        self.rank = rank
        self.signal = signal.Signals[name]
        self.target = target
        self.phase = phase
        self.times = times

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._strike(trainer, "training")

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._strike(trainer, "validation")

    def _strike(self, trainer: pl.Trainer, phase: str) -> None:
        strikes = len(self.marker.read_text()) if self.marker.exists() else 0
        due = trainer.global_step >= self.step * (strikes + 1) and strikes < self.times
        if due and phase == self.phase and trainer.global_rank == self.rank:
            self.marker.write_text("x" * (strikes + 1))
            os.kill(os.getpid() if self.target == "rank" else _launcher(), self.signal)


class Mistake(Callback):
    """Fails on one rank alone, as for a mistake of the user's on its node."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank:
            raise ConfigError("the disk of this node is too small.")


def _launcher() -> int:
    """The parent of the process that ranks are forked from."""
    stat = Path(f"/proc/{os.getppid()}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


class Pace(Callback):
    """Makes every step last ``seconds`` longer, so that a test can act in between."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(self.seconds)
