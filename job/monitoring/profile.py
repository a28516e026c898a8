"""Profile of a few steps: a trace in run_dir, and a line in the log with the time of each part."""

from __future__ import annotations

import gzip
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from job import storage
from job.checkpoint.callback import Checkpointer
from job.errors import StorageError

log = logging.getLogger(__name__)

FOLDER = "profile"
FIRST_STEP, STEPS = 5, 10
"""Steps of this attempt that are left out, while caches fill and kernels are chosen, and those that are recorded."""
COMMUNICATION = ("gloo:", "nccl:", "c10d::allreduce_")


class Profile(Callback):
    """Records steps by torch's profiler on every rank, for Perfetto or TensorBoard's profiler plugin.

    The accelerator is synchronised between the parts that are timed, which slows the recorded steps down.

    Args:
        checkpointer: measures how long training stood still for checkpoints.
        before_write: called immediately before the trace is written; raises if this job may not write to run_dir.
    """

    def __init__(self, checkpointer: Checkpointer, before_write: Callable[[], None] = storage.unconditionally) -> None:
        self.checkpointer = checkpointer
        self.before_write = before_write
        self._steps = 0
        self._profiler: profile | None = None
        self._began = 0.0
        self._before: tuple[float, float] = (0.0, 0.0)
        self._mark = 0.0
        self._seconds: dict[str, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin to record, or the forward pass of a recorded step."""
        if self._steps == FIRST_STEP:
            self._seconds = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
            self._before = self._waited(trainer)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(activities=activities)
            self._profiler.start()
            self._began = time.monotonic()
        self._mark = self._now()

    def on_before_zero_grad(self, *args: Any) -> None:
        """The forward pass is over."""
        self._add("forward")

    def on_after_backward(self, *args: Any) -> None:
        """The backward pass is over, and with it the gradients' reduction."""
        self._add("backward")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """The update is over."""
        self._add("optimizer")
        self._steps += 1

    def between_steps(self, trainer: pl.Trainer) -> None:
        """Everything that belongs to a step is over; write the trace when it was the last to be recorded."""
        if self._steps >= FIRST_STEP + STEPS:
            self._write(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that is shorter ends the recording."""
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """So does the end of training."""
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if self._profiler is None:
            return
        total = self._now() - self._began
        self._profiler.stop()
        recorded, self._profiler = self._profiler, None
        steps = self._steps - FIRST_STEP
        waited, stalled = (now - then for now, then in zip(self._waited(trainer), self._before, strict=True))
        events = recorded.events()  # type: ignore[no-untyped-call]
        communication = sum(e.time_range.elapsed_us() / 1e6 for e in events if e.name.startswith(COMMUNICATION))
        parts = {"data wait": waited, **self._seconds, "checkpoint": stalled}
        parts["other"] = max(total - sum(parts.values()), 0.0)
        shares = [f"{part} {1000 * spent / steps:.1f} ({spent / total:.0%})" for part, spent in parts.items()]
        log.info(
            "a step takes %.1f ms: %s; within them %.1f ms of communication, which may overlap",
            1000 * total / steps,
            ", ".join(shares),
            1000 * communication / steps,
        )
        name = f"rank{trainer.global_rank}-step{trainer.global_step - steps}.pt.trace.json"
        uri = storage.join(trainer.default_root_dir, FOLDER, f"{name}.gz")
        with tempfile.TemporaryDirectory() as folder:
            recorded.export_chrome_trace(f"{folder}/{name}")
            trace = gzip.compress((Path(folder) / name).read_bytes())
        try:
            storage.write_bytes(uri, trace, self.before_write)
            log.info("wrote the trace of %d steps to %s", steps, uri)
        except StorageError as error:
            log.warning("the trace could not be written: %s", error)

    def _waited(self, trainer: pl.Trainer) -> tuple[float, float]:
        loader = trainer.train_dataloader
        return (loader.wait_seconds if loader is not None else 0.0), self.checkpointer.stall_seconds

    def _add(self, part: str) -> None:
        if self._profiler is not None:
            now = self._now()
            self._seconds[part] += now - self._mark
            self._mark = now

    def _now(self) -> float:
        if self._profiler is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic()
