"""Checkpoint schedule, and the entries that are added to Lightning's; here all ranks agree to save or to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Any, Protocol, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from job import storage
from job.checkpoint import callback_settings
from job.checkpoint.confusion import ConfusionMatrix
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.manifest import FORMAT, kept_metrics
from job.checkpoint.retention import compare_ranking, validation_identity
from job.checkpoint.settings import CheckpointSettings
from job.checkpoint.state import (
    CALLBACKS_KEY,
    COMPATIBILITY_KEY,
    CONFUSION_KEY,
    FORMAT_KEY,
    MANIFEST_KEY,
    STOPPED_KEY,
    manifest_entry,
)
from job.checkpoint.store import FOLDER, SUFFIX
from job.cluster import ranks
from job.data.datamodule import image_data
from job.errors import CheckpointError, ConfigError, Preempted
from job.lightning_internals import mark_validation_unfinished
from job.resilience.flags import AsyncFlags
from job.resilience.preemption import Preemption

log = logging.getLogger(__name__)


class Fingerprinted(Protocol):
    """A module whose runs resume from checkpoints."""

    def fingerprint(self) -> dict[str, Any]:
        """Settings, by option, that a run which resumes must share."""

    def resume_hint(self, different: Collection[str]) -> str:
        """Explanation of settings that differ, for the message; empty, or a sentence after a space."""


class Checkpointer(Checkpoint):
    """Saves checkpoints at the end of epochs and, optionally, within epochs.

    Args:
        settings: when, and by which metric they are ranked.
        run_dir: folder of the run.
        io: writes them.
        preemption: says whether this process is to stop.
    """

    def __init__(
        self, settings: CheckpointSettings, run_dir: str, io: BackgroundCheckpointIO, preemption: Preemption
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir
        self.io = io
        self.preemption = preemption
        self.stall_seconds = 0.0
        self._flags: AsyncFlags
        self._stopping = False
        self._next: dict[str, int] = {}
        self._saved: tuple[int, int] | None = None
        self._saved_metrics = False
        self._validated_at = -1
        self._warned_of_accumulation = False
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the ranking with that of earlier checkpoints, and exchange flags with the other ranks from here on.

        Raises:
            CheckpointError: no earlier checkpoint holds the metric.
        """
        ranks.from_rank_zero(lambda: compare_ranking(trainer, self.run_dir, self.settings))
        if schedule := callback_settings.scheduler(trainer):
            # Lightning sets it at the start of an epoch, which a run that resumes within one does not pass.
            trainer.accumulate_grad_batches = schedule.get_accumulate_grad_batches(trainer.current_epoch)
        self._flags = AsyncFlags(2)

    def between_steps(self, trainer: pl.Trainer) -> None:
        """Save if a checkpoint is due; stop if any rank has received a signal."""
        batches = trainer.fit_loop.batch_idx + 1
        due = self._exchange_flags() | self._steps_are_over(trainer.global_step)
        accumulating = batches % trainer.accumulate_grad_batches != 0
        if self._stopping and self._saved is not None and self._saved[0] == trainer.global_step:
            self._stop(trainer)
        validated = self._validated_at == trainer.global_step and self._is_epoch_to_save(trainer)
        if validated and accumulating and not self._warned_of_accumulation:
            self._warned_of_accumulation = True
            log.warning(
                "no checkpoint after a validation within an accumulation window: a run cannot resume there. Choose "
                "a --trainer.val_check_interval that is a multiple of --trainer.accumulate_grad_batches (%d).",
                trainer.accumulate_grad_batches,
            )
        if batches == 0 or accumulating:
            return  # Lightning cannot resume here: one more step, then
        if due or validated or self._stopping:
            self._save(trainer, epoch=trainer.current_epoch, batch=batches)
        if self._stopping:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Within a fit, stop if any rank has received a signal; the next attempt repeats the validation."""
        if trainer.state.fn != "fit":
            return
        self._exchange_flags()
        if self._stopping:
            self._save(trainer, epoch=trainer.current_epoch, batch=trainer.fit_loop.batch_idx + 1)
            self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the step of the metrics."""
        self._validated_at = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a checkpoint is due; stop if any rank has received a signal."""
        self._exchange_flags()
        if self._is_epoch_to_save(trainer) or trainer.should_stop or self._stopping:
            self._save(trainer, epoch=trainer.current_epoch + 1, batch=0)
        if self._stopping:
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait until the last checkpoint is committed."""
        self._flags.drain()
        self.io.wait()

    def _exchange_flags(self) -> bool:
        """Exchange flags with all ranks: remember a request to stop, return whether ``every_minutes`` have passed."""
        self.io.raise_failure()
        minutes = self.settings.every_minutes
        overdue = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        stop, due = self._flags.exchange([self.preemption.requested, overdue])
        self._stopping |= stop
        return due

    def _steps_are_over(self, global_step: int) -> bool:
        every = self.settings.every_n_steps
        return every is not None and global_step % every == 0

    def _is_epoch_to_save(self, trainer: pl.Trainer) -> bool:
        done = trainer.current_epoch + 1
        return done % self.settings.every_n_epochs == 0 or done == trainer.max_epochs

    def _stop(self, trainer: pl.Trainer) -> None:
        self.io.wait()
        self._flags.drain()
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
        measured, again = self._validated_at == trainer.global_step, self._saved == (trainer.global_step, epoch)
        if again and (self._saved_metrics or not measured):
            return
        began = time.monotonic()
        self._next = {"epoch": epoch, "batch": batch}
        # A run that was stopped in a validation, and resumed, validates again at the step of its checkpoint.
        kind = "-validated" if again else ""
        name = f"epoch={epoch:03d}-step={trainer.global_step:08d}{kind}{SUFFIX}"
        trainer.save_checkpoint(storage.join(self.run_dir, FOLDER, name))
        self._saved, self._saved_metrics = (trainer.global_step, epoch), measured
        self._saved_at = time.monotonic()
        self.stall_seconds += self._saved_at - began

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the manifest's fields and what a resume compares (a Lightning hook)."""
        if trainer.validating:
            mark_validation_unfinished(checkpoint)
        # Lightning's metrics are those of the last validation, however long ago that was.
        measured = trainer.callback_metrics if self._validated_at == trainer.global_step else {}
        metrics = {name: float(value) for name, value in measured.items() if name.startswith("val/")}
        if metrics and self.settings.metric not in metrics:
            names = ", ".join(sorted(metrics)[:20])
            raise ConfigError(
                f"--checkpoint.monitor {self.settings.metric!r} is not logged. There are: {names}. A metric that is "
                "undefined for the validation images is left out, as val/mAP where none of them has a label."
            )
        checkpoint[FORMAT_KEY] = FORMAT
        checkpoint[MANIFEST_KEY] = {
            **self._next,
            "global_step": trainer.global_step,
            "monitor": self.settings.metric,
            "mode": self.settings.ranking_mode,
            "metrics": kept_metrics(metrics, self.settings.metric),
            "validation": validation_identity(trainer) if metrics else "",
        }
        checkpoint[COMPATIBILITY_KEY] = self._compatibility(trainer)
        # Lightning forgets it, and would train one more epoch at every further start.
        checkpoint[STOPPED_KEY] = bool(trainer.should_stop)
        checkpoint[CALLBACKS_KEY] = callback_settings.settings_of_all(trainer.callbacks)  # type: ignore[attr-defined]
        if metrics:
            cells = pl_module.evaluation.confusion  # type: ignore[union-attr]
            checkpoint[CONFUSION_KEY] = ConfusionMatrix(cells, len(image_data(trainer).classes))  # type: ignore[arg-type]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume with another data set or other settings than the checkpoint's, naming the difference."""
        if trainer.state.fn != "fit":
            return
        saved, current = checkpoint[COMPATIBILITY_KEY], self._compatibility(trainer)
        if FORMAT_KEY not in checkpoint:  # earlier versions compared fewer settings
            current = {key: value for key, value in current.items() if key in saved}
        different = {key: new for key, new in current.items() if saved.get(key) != new}
        if different:
            listed = "; ".join(f"{key} was {saved.get(key)}, is {new}" for key, new in different.items())
            hint = cast("Fingerprinted", pl_module).resume_hint(different)
            raise CheckpointError(
                f"this run cannot go on from its checkpoint: {listed}.{hint} Use the settings and the data it was "
                f"started with, or another --run_dir; --init_from={self.run_dir} starts that from these weights."
            )
        manifest = manifest_entry(checkpoint)
        self._saved, self._saved_metrics = (manifest.global_step, manifest.epoch), bool(manifest.metrics)
        self._restore_callbacks(trainer, checkpoint, manifest.epoch)

    def _restore_callbacks(self, trainer: pl.Trainer, checkpoint: dict[str, Any], epoch: int) -> None:
        """Keep the configured settings of callbacks; a run stopped by a callback with equal settings stays stopped."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        current = callback_settings.settings_of_all(callbacks)
        callback_settings.keep_configured(checkpoint["callbacks"], callbacks)
        changed = callback_settings.changes(checkpoint.get(CALLBACKS_KEY, current), current)
        stopped = checkpoint.get(STOPPED_KEY, False)
        if changed:
            log.warning(
                "callback settings changed since the last attempt; the new ones are used: %s%s",
                "; ".join(changed),
                ". A callback had stopped this run; training continues" if stopped else "",
            )
        elif stopped:
            trainer.should_stop = True
            if epoch >= (trainer.min_epochs or 0):
                log.warning(
                    "a callback (%s) stopped this run after epoch %d; it is complete. To continue training, choose a "
                    "larger patience by --early_stopping or in --trainer.callbacks, or remove the callback.",
                    ", ".join(current),
                    epoch,
                )

    def _compatibility(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Settings that a run which resumes must share, by name."""
        data, module = image_data(trainer), cast("Fingerprinted", trainer.lightning_module)
        accumulation = {"trainer.accumulate_grad_batches": callback_settings.accumulation(trainer)}
        return {**data.fingerprint(), **module.fingerprint(), **accumulation}
