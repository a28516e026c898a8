"""Callbacks of runs on XLA: cache of compiled steps, compilation counts, profiler trace."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job import storage
from job.errors import StorageError, StorageOutage
from job.process import temporary
from job.process.periodic import Periodic

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 30.0
TRACED = (5, 10)
"""First and last step of a trace, counted from this attempt: the first ones compile."""


class CompilationCache(Callback):
    """Cache of compiled steps in ``run_dir/xla``, so that a restart need not compile them again.

    Args:
        run_dir: of the run.

    Attributes:
        folder: the local copy, with the compiled steps of earlier attempts where they can be read.
    """

    def __init__(self, run_dir: str) -> None:
        self.folder = temporary.folder("xla")
        self.uri = storage.join(run_dir, "xla")
        self._published: set[str] = set()
        self._publisher: Periodic | None = None
        try:
            if storage.exists(self.uri):
                keys = {file.key for file in storage.list_files(self.uri)}
                self._published = {key for key in keys if re.fullmatch(r"\w+", key)}  # torch-xla's names are hashes
            for key in self._published:
                storage.download(storage.join(self.uri, key), self.folder / key)
        except StorageError as error:
            log.warning("compiled steps of earlier attempts could not be read: %s", error)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to publish."""
        if trainer.is_global_zero:
            self._publisher = Periodic("xla-cache", PUBLISH_SECONDS, self.publish)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publish the rest."""
        self._close(publish=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Publish the rest (a preemption is an exception, too), unless the bucket fails."""
        self._close(publish=not isinstance(exception, StorageOutage))

    def _close(self, *, publish: bool) -> None:
        if self._publisher is not None:
            self._publisher.stop()
            self._publisher = None
            if publish:
                self.publish()

    def publish(self) -> None:
        """Upload newly compiled steps; if the bucket cannot be reached, the next call does."""
        try:
            for file in sorted(path for path in self.folder.iterdir() if path.name != temporary.OWNER):
                if file.is_file() and file.name not in self._published:
                    storage.upload(file, storage.join(self.uri, file.name))
                    self._published.add(file.name)
        except StorageError as error:
            log.warning("compiled steps could not be kept in %s: %s", self.uri, error)


class Counts(Callback):
    """Logs ``xla/compilations``, ``xla/cache_misses`` and ``xla/host_waits`` after each epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the counts since the process began."""
        values = {f"xla/{name}": float(value) for name, value in counts().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)


class Trace(Callback):
    """Traces a few steps of host 0, for TensorBoard's profile plugin.

    Args:
        uri: folder of the run's events.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._steps = 0
        self._folder: Path | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start and stop the trace between steps."""
        from torch_xla.debug import profiler

        self._steps += 1
        if self._steps == TRACED[0] and trainer.is_global_zero:
            self._folder = temporary.folder("trace")
            profiler.start_trace(str(self._folder))
        elif self._steps == TRACED[1] + 1:
            self._end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the trace of a shorter run."""
        self._end()

    def _end(self) -> None:
        from torch_xla.debug import profiler

        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        profiler.stop_trace()
        try:
            for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != temporary.OWNER):
                storage.upload(file, storage.join(self.uri, str(file.relative_to(folder))))
            log.info("a trace of steps %d to %d lies in %s", *TRACED, self.uri)
        except StorageError as error:
            log.warning("the trace stays in %s: %s", folder, error)


def counts() -> dict[str, int]:
    """Counts since the process began.

    ``compilations``: graphs compiled, one per graph of constant shapes; ``cache_misses``: those that earlier attempts
    had not compiled either; ``host_waits``: values that the host fetched.
    """
    from torch_xla.debug import metrics

    compiled, fetched = metrics.metric_data("CompileTime"), metrics.metric_data("TransferFromDeviceTime")
    return {
        "compilations": int(compiled[0]) if compiled else 0,
        "cache_misses": int(metrics.counter_value("PersistentCacheMiss") or 0),
        "host_waits": int(fetched[0]) if fetched else 0,
    }
