"""A callback that records when a fit reaches its stages, with the memory and the requests until then."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from generated_shards import Counts
from pytorch_lightning.callbacks import Callback

from job.checkpoint.callback import Checkpointer
from job.cluster import ranks


class Timeline(Callback):
    """Appends a line of JSON per stage to ``FOLDER/RANK.jsonl``.

    Args:
        folder: local folder for the lines.
        counts: folder of the :class:`~generated_shards.Counts` of all processes.
    """

    def __init__(self, folder: str, counts: str) -> None:
        self.file = Path(folder) / f"{ranks.rank()}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.counts = counts
        self._stall = 0.0
        self._steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The data module is set up, so that the index is open."""
        self._note("index")

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """A batch has come."""
        self._note_checkpoint(trainer)
        if self._steps == 0:
            self._note("first batch")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """A step is over."""
        self._steps += 1
        if self._steps == 1:
            self._note("first step")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Steps are over for now."""
        self._note_checkpoint(trainer)
        self._note("validation begins")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Metrics are computed and logged."""
        self._note("validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All epochs are over."""
        self._note_checkpoint(trainer)
        self._note("train end")

    def _note_checkpoint(self, trainer: pl.Trainer) -> None:
        """Note the stall of a checkpoint since the last call."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        stall = next(each for each in callbacks if isinstance(each, Checkpointer)).stall_seconds
        if stall > self._stall:
            self._note("checkpoint", stall=stall - self._stall)
            self._stall = stall

    def _note(self, stage: str, **values: float) -> None:
        line = {"stage": stage, "time": time.time(), **memory(os.getpid()), **Counts.total(self.counts), **values}
        with self.file.open("a") as file:
            file.write(f"{json.dumps(line)}\n")


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process: the peak of its resident memory, and its proportional share now."""
    status = _fields(Path(f"/proc/{pid}/status").read_text())
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return {"peak_rss": status["VmHWM"], "pss": rollup["Pss"], "anonymous": rollup["Pss_Anon"]}


def _fields(text: str) -> dict[str, int]:
    """Entries of a file in /proc whose unit is kB, in bytes."""
    words = (line.split() for line in text.splitlines())
    return {word[0].rstrip(":"): int(word[1]) * 1024 for word in words if len(word) == 3 and word[2] == "kB"}
