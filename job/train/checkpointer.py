"""When a checkpoint is taken, what it holds besides Lightning's own, and which ones are kept.

The one place where all ranks agree to save or to stop.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Literal, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from job import storage
from job.cluster.votes import Votes
from job.errors import CheckpointError, ConfigError, Preempted, StorageError
from job.logging.tensorboard import BucketTensorBoardLogger
from job.model.module import TransferLearningModel
from job.train import checkpoint
from job.train.checkpoint import FOLDER, SUFFIX, Manifest
from job.train.checkpoint_io import FACTS, BackgroundCheckpointIO
from job.train.preemption import Preemption

log = logging.getLogger(__name__)

REQUIRED = "resume_requires"
"""Key of a checkpoint: settings by name that a run which resumes from it must share."""


class Checkpointer(Checkpoint):
    """Takes checkpoints at the end of epochs and, if asked, within them.

    Args:
        every_n_epochs: epochs between two checkpoints; the last epoch always has one.
        every_n_steps: optimizer steps between two checkpoints within an epoch; default: none.
        every_minutes: minutes between two checkpoints within an epoch; default: none.
        monitor: logged metric that ranks checkpoints.
        mode: which way the metric is better.
        keep_last: newest checkpoints to keep, at least 1.
        keep_best: best checkpoints to keep, besides.
        keep_every_n_epochs: keep the checkpoint of every n-th epoch for good; default: none.
        upload_seconds: how long an unreachable bucket is waited for before the run gives up.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        every_minutes: float | None = None,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every_n_epochs: int | None = None,
        upload_seconds: float = 600.0,
    ) -> None:
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("every_n_steps", every_n_steps, 1),
            ("keep_last", keep_last, 1),
            ("keep_best", keep_best, 0),
            ("keep_every_n_epochs", keep_every_n_epochs, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--checkpoint.{name} must be at least {least}, not {value}.")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.monitor = monitor
        self.mode = mode
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every_n_epochs = keep_every_n_epochs
        self.run_dir = ""
        self.stall_seconds = 0.0
        self.io = BackgroundCheckpointIO(upload_seconds, after_commit=self._remove_superseded)
        self.preemption = Preemption(0.0)
        self._votes: Votes
        self._stopping = False
        self._next: dict[str, int] = {}
        self._saved: tuple[int, int] | None = None
        self._validated_at = -1
        self._saved_at = time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Learn the run_dir from the trainer, and let every checkpoint have its events published before it."""
        self.run_dir = trainer.default_root_dir
        for logger in trainer.loggers:
            if isinstance(logger, BucketTensorBoardLogger):
                self.io.before_commit = logger.publish

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Meet the other ranks."""
        self._votes = Votes(2)

    def between_steps(self, trainer: pl.Trainer) -> None:
        """Save when it is time; stop when any rank was told to."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        due = self._vote() | self._steps_are_over(trainer.global_step)
        accumulating = progress.current.ready % trainer.accumulate_grad_batches != 0
        if self._stopping and self._saved is not None and self._saved[0] == trainer.global_step:
            self._stop(trainer)
        if progress.current.ready == 0 or accumulating:
            return  # Lightning cannot resume here: one more step, then
        if due or self._stopping:
            self._save(trainer, epoch=trainer.current_epoch, batch=progress.current.ready)
        if self._stopping:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Within a fit, stop when any rank was told to; the next start validates anew."""
        if trainer.state.fn != "fit":
            return
        self._vote()
        if self._stopping:
            batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self._save(trainer, epoch=trainer.current_epoch, batch=batches)
            self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note of which step the metrics are."""
        self._validated_at = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save when it is time; stop when any rank was told to."""
        self._vote()
        done = trainer.current_epoch + 1
        due = done % self.every_n_epochs == 0 or done == trainer.max_epochs or trainer.should_stop
        if due or self._stopping:
            self._save(trainer, epoch=done, batch=0)
        if self._stopping:
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run is over when its last checkpoint is committed."""
        self._votes.drain()
        self.io.wait()

    def _vote(self) -> bool:
        """Exchange flags with all ranks; notes a wish to stop, returns whether minutes say that a save is due."""
        self.io.raise_failure()
        overdue = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        stop, due = self._votes.cast([self.preemption.requested, overdue])
        self._stopping |= stop
        return due

    def _steps_are_over(self, global_step: int) -> bool:
        return self.every_n_steps is not None and global_step % self.every_n_steps == 0

    def _stop(self, trainer: pl.Trainer) -> None:
        self.io.wait()
        self._votes.drain()
        raise Preempted(
            f"stopped on request after step {trainer.global_step}, which is saved in {self.run_dir}. The same command "
            "goes on from there."
        )

    def _save(self, trainer: pl.Trainer, *, epoch: int, batch: int) -> None:
        """Take a checkpoint of this moment, on all ranks together, unless there is one.

        Args:
            epoch: epochs completed.
            batch: batches done of the next.

        Raises:
            StorageError: an earlier upload failed for good.
        """
        if self._saved == (trainer.global_step, epoch):
            return
        began = time.monotonic()
        self._next = {"epoch": epoch, "batch": batch}
        name = f"epoch={epoch:03d}-step={trainer.global_step:08d}{SUFFIX}"
        trainer.save_checkpoint(storage.join(self.run_dir, FOLDER, name))
        self._saved = (trainer.global_step, epoch)
        self._saved_at = time.monotonic()
        self.stall_seconds += self._saved_at - began

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the facts of the manifest, and what a run that resumes must share."""
        if trainer.validating:
            # What Lightning takes for a validation that was begun and is to be run.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for count in ("total", "current"):
                progress[count].update(ready=1, started=1, processed=0, completed=0)
            progress["is_last_batch"] = False
        # Lightning's metrics are those of the last validation, however long ago that was.
        measured = trainer.callback_metrics if self._validated_at == trainer.global_step else {}
        metrics = {name: float(value) for name, value in measured.items() if name.startswith("val/")}
        if metrics and self.monitor not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"--checkpoint.monitor {self.monitor!r} is not logged. There are: {known}.")
        checkpoint[FACTS] = {
            **self._next,
            "global_step": trainer.global_step,
            "monitor": self.monitor,
            "mode": self.mode,
            "metrics": metrics,
            "confusion_matrix": pl_module.confusion if metrics else [],
        }
        checkpoint[REQUIRED] = self._required(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume with another data set or other settings than the checkpoint's, naming the difference."""
        if trainer.state.fn != "fit":
            return
        saved, ours = checkpoint.get(REQUIRED, {}), self._required(trainer)
        different = [f"{key} was {saved.get(key)}, is {ours[key]}" for key in ours if saved.get(key) != ours[key]]
        if different:
            raise CheckpointError(
                f"this run cannot go on from its checkpoint: {'; '.join(different)}. Use the settings and the data it "
                "was started with, or another --run_dir."
            )
        self._saved = (checkpoint["global_step"], checkpoint[FACTS]["epoch"])

    def _required(self, trainer: pl.Trainer) -> dict[str, Any]:
        data, module = trainer.datamodule, cast("TransferLearningModel", trainer.lightning_module)  # type: ignore[attr-defined]
        own = {"trainer.accumulate_grad_batches": trainer.accumulate_grad_batches}
        return {**data.fingerprint(), **module.fingerprint(), **own}

    def _remove_superseded(self) -> None:
        """Delete what is no longer kept. Runs after a commit, so that there is always a newer one."""
        try:
            committed = checkpoint.manifests(self.run_dir)
            for manifest in self._superseded(committed):
                self.io.before_write()
                checkpoint.remove(storage.join(self.run_dir, FOLDER, manifest.file))
        except StorageError as error:
            log.warning("checkpoints that are no longer needed could not be removed: %s", error)

    def _superseded(self, committed: list[Manifest]) -> list[Manifest]:
        kept = [*committed[-self.keep_last :], *checkpoint.ranked(committed)[: self.keep_best]]
        if self.keep_every_n_epochs is not None:
            kept += [m for m in committed if m.batch == 0 and m.epoch % self.keep_every_n_epochs == 0]
        return [manifest for manifest in committed if manifest not in kept]
