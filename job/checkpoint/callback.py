"""When a checkpoint is taken, what it holds besides Lightning's own, and which ones are kept.

The one place where all ranks agree to save or to stop.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Literal, Protocol, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from job import storage
from job.checkpoint import callback_settings
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.manifest import FORMAT, kept_metrics
from job.checkpoint.ranking import best_of_each_validation, mode_of
from job.checkpoint.retention import Retention, compare_ranking, validation_identity
from job.checkpoint.state import CALLBACKS, CONFUSION, FACTS, FORMAT_KEY, REQUIRED, STOPPED, facts_of
from job.checkpoint.store import FOLDER, SUFFIX, Manifest
from job.cluster import ranks
from job.errors import CheckpointError, ConfigError, Preempted
from job.monitoring.tensorboard import BucketTensorBoardLogger
from job.resilience.flags import Votes
from job.resilience.preemption import Preemption

log = logging.getLogger(__name__)


class Fingerprinted(Protocol):
    """A module whose runs resume from checkpoints."""

    def fingerprint(self) -> dict[str, Any]:
        """Settings, by option, that a run which resumes must share."""


class Checkpointer(Checkpoint):
    """Takes checkpoints at the end of epochs and, if asked, within them.

    Args:
        every_n_epochs: epochs between two checkpoints; the last epoch always has one. In an epoch that has one, every
            validation (--trainer.val_check_interval) has one, too.
        every_n_steps: optimizer steps between two checkpoints within an epoch; default: none.
        every_minutes: minutes between two checkpoints within an epoch; default: none.
        monitor: validation metric that ranks checkpoints.
        mode: "max" or "min": whether a higher or a lower value is better. Default: by the metric's name, "min" for a
            loss or an error, "max" for accuracy, F1 and the like.
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
        mode: Literal["max", "min"] | None = None,
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
        self.mode = mode_of(monitor, mode)
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
        self._saved_metrics = False
        self._validated_at = -1
        self._warned_of_accumulation = False
        self._retention = Retention()
        self._saved_at = time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the run_dir from the trainer, and let every checkpoint have its events published before it."""
        self.run_dir = trainer.default_root_dir
        self.io.expected_loops = trainer.fit_loop.state_dict()
        for logger in trainer.loggers:
            if isinstance(logger, BucketTensorBoardLogger):
                self.io.before_commit = logger.publish

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the ranking with that of earlier checkpoints, and exchange flags with the other ranks from here on.

        Raises:
            CheckpointError: no earlier checkpoint holds the metric.
        """
        ranks.from_rank_zero(lambda: compare_ranking(trainer, self.run_dir, self.monitor, self.mode))
        if schedule := callback_settings.scheduler(trainer):
            # Lightning sets it at the start of an epoch, which a run that resumes within one does not pass.
            trainer.accumulate_grad_batches = schedule.get_accumulate_grad_batches(trainer.current_epoch)
        self._votes = Votes(2)

    def between_steps(self, trainer: pl.Trainer) -> None:
        """Save when it is time; stop when any rank was told to."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        due = self._vote() | self._steps_are_over(trainer.global_step)
        accumulating = progress.current.ready % trainer.accumulate_grad_batches != 0
        if self._stopping and self._saved is not None and self._saved[0] == trainer.global_step:
            self._stop(trainer)
        validated = self._validated_at == trainer.global_step and self._is_epoch_to_save(trainer)
        if validated and accumulating and not self._warned_of_accumulation:
            self._warned_of_accumulation = True
            log.warning(
                "a validation in the middle of accumulated batches has no checkpoint: no run can resume there. Choose "
                "a --trainer.val_check_interval that is a multiple of the %d batches of a step.",
                trainer.accumulate_grad_batches,
            )
        if progress.current.ready == 0 or accumulating:
            return  # Lightning cannot resume here: one more step, then
        if due or validated or self._stopping:
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
        if self._is_epoch_to_save(trainer) or trainer.should_stop or self._stopping:
            self._save(trainer, epoch=trainer.current_epoch + 1, batch=0)
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

    def _is_epoch_to_save(self, trainer: pl.Trainer) -> bool:
        done = trainer.current_epoch + 1
        return done % self.every_n_epochs == 0 or done == trainer.max_epochs

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
            known = ", ".join(sorted(metrics)[:20])
            raise ConfigError(f"--checkpoint.monitor {self.monitor!r} is not logged. There are: {known}.")
        checkpoint[FORMAT_KEY] = FORMAT
        checkpoint[FACTS] = {
            **self._next,
            "global_step": trainer.global_step,
            "monitor": self.monitor,
            "mode": self.mode,
            "metrics": kept_metrics(metrics, self.monitor),
            "validation": validation_identity(trainer) if metrics else "",
        }
        checkpoint[REQUIRED] = self._required(trainer)
        # Lightning forgets it, and would train one more epoch at every further start.
        checkpoint[STOPPED] = bool(trainer.should_stop)
        checkpoint[CALLBACKS] = callback_settings.settings_of_all(trainer.callbacks)  # type: ignore[attr-defined]
        if metrics:
            checkpoint[CONFUSION] = pl_module.confusion

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume with another data set or other settings than the checkpoint's, naming the difference."""
        if trainer.state.fn != "fit":
            return
        saved, ours = checkpoint[REQUIRED], self._required(trainer)
        if FORMAT_KEY not in checkpoint:  # earlier versions compared fewer settings
            ours = {key: value for key, value in ours.items() if key in saved}
        different = [f"{key} was {saved.get(key)}, is {ours[key]}" for key in ours if saved.get(key) != ours[key]]
        if different:
            raise CheckpointError(
                f"this run cannot go on from its checkpoint: {'; '.join(different)}. Use the settings and the data it "
                "was started with, or another --run_dir."
            )
        facts = facts_of(checkpoint)
        self._saved, self._saved_metrics = (facts.global_step, facts.epoch), bool(facts.metrics)
        self._restore_callbacks(trainer, checkpoint, facts.epoch)

    def _restore_callbacks(self, trainer: pl.Trainer, checkpoint: dict[str, Any], epoch: int) -> None:
        """Let the configured settings of callbacks hold; a run that a callback ended by the same ones stays ended."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        current = callback_settings.settings_of_all(callbacks)
        callback_settings.keep_configured(checkpoint["callbacks"], callbacks)
        changed = callback_settings.changes(checkpoint.get(CALLBACKS, current), current)
        stopped = checkpoint.get(STOPPED, False)
        if changed:
            log.warning(
                "settings of callbacks changed since the last start, and the new ones hold: %s%s",
                "; ".join(changed),
                ". The run, which a callback had ended, goes on" if stopped else "",
            )
        elif stopped:
            trainer.should_stop = True
            if epoch >= (trainer.min_epochs or 0):
                log.warning(
                    "this run was ended by a callback (%s) after epoch %d, and stays ended. To go on, change the "
                    "callback's settings in --trainer.callbacks, for example to a larger patience, or remove it.",
                    ", ".join(current),
                    epoch,
                )

    def _required(self, trainer: pl.Trainer) -> dict[str, Any]:
        data, module = trainer.datamodule, cast("Fingerprinted", trainer.lightning_module)  # type: ignore[attr-defined]
        own = {"trainer.accumulate_grad_batches": callback_settings.accumulation(trainer)}
        return {**data.fingerprint(), **module.fingerprint(), **own}

    def _remove_superseded(self) -> None:
        """Delete what is no longer kept. Runs after a commit, so that there is always a newer one."""
        self._retention.remove(self.run_dir, self._superseded, self.io.before_write)

    def _superseded(self, committed: list[Manifest]) -> list[Manifest]:
        kept = [*committed[-self.keep_last :], *best_of_each_validation(committed, self.keep_best)]
        if self.keep_every_n_epochs is not None:
            kept += [m for m in committed if m.batch == 0 and m.epoch % self.keep_every_n_epochs == 0]
        return [manifest for manifest in committed if manifest not in kept]
