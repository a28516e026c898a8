"""Retention of checkpoints, and comparison of their ranking with that of earlier attempts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import pytorch_lightning as pl

from job import checkpoint, storage
from job.checkpoint.manifest import Manifest
from job.checkpoint.ranking import best_of_each_validation, implied_mode
from job.checkpoint.settings import CheckpointSettings
from job.data.datamodule import image_data
from job.errors import CheckpointError, JobError, LeaseError, StorageOutage

log = logging.getLogger(__name__)

SECONDS_BETWEEN_REFUSED_REMOVALS = 3600.0
"""How long retention rests after a bucket refused it: a retention policy may let an object go later."""


class Retention:
    """Deletes superseded checkpoints; if the bucket refuses that, warns and continues.

    Args:
        settings: say which are kept.
        run_dir: folder of the run.
        before_write: called before each deletion; raises LeaseError if this job may not write to run_dir.
    """

    def __init__(
        self,
        settings: CheckpointSettings,
        run_dir: str,
        before_write: Callable[[], None] = storage.unconditionally,
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir
        self.before_write = before_write
        self._refused_at = -math.inf
        self._warned = False

    def superseded(self, committed: list[Manifest]) -> list[Manifest]:
        """Those of a run's checkpoints that are not kept."""
        settings = self.settings
        best = best_of_each_validation(committed, settings.keep_best)
        kept = {manifest.file for manifest in [*committed[-settings.keep_last :], *best]}
        return self._not_kept_for_ever([manifest for manifest in committed if manifest.file not in kept])

    def _not_kept_for_ever(self, committed: list[Manifest]) -> list[Manifest]:
        every = self.settings.keep_every_n_epochs
        return [m for m in committed if every is None or m.batch != 0 or m.epoch % every != 0]

    def remove_superseded(self) -> None:
        """Delete what is not kept; called after a commit, so that there is always a newer checkpoint."""
        if time.monotonic() - self._refused_at < SECONDS_BETWEEN_REFUSED_REMOVALS:
            return
        try:
            scanned = checkpoint.scan(self.run_dir)
            abandoned = self._not_kept_for_ever(scanned.abandoned)
            for manifest in [*self.superseded(checkpoint.usable(scanned)), *abandoned]:
                self.before_write()
                checkpoint.remove(storage.join(self.run_dir, checkpoint.FOLDER, manifest.file))
        except LeaseError:
            raise
        except JobError as error:
            if not isinstance(error, StorageOutage):  # rights or a retention policy: it would be refused each time
                self._refused_at = time.monotonic()
            if not self._warned:
                self._warned = True
                log.warning(
                    "old checkpoints in %s could not be deleted and occupy space; training continues: %s",
                    storage.join(self.run_dir, checkpoint.FOLDER),
                    error,
                )


def compare_ranking(trainer: pl.Trainer, run_dir: str, settings: CheckpointSettings) -> None:
    """Warn if earlier checkpoints of a run were ranked by another metric or on other samples.

    Raises:
        CheckpointError: none of them holds the metric.
    """
    monitor, mode = settings.metric, settings.ranking_mode
    implied = implied_mode(monitor)
    if implied not in (None, mode):
        log.warning("--checkpoint.mode is %s: the checkpoint with the worst %s is best", mode, monitor)
    measured = [m for m in checkpoint.manifests(run_dir) if m.metrics]
    if not measured:
        return
    if not any(monitor in m.metrics for m in measured):
        names = ", ".join(sorted({name for m in measured for name in m.metrics})[:20])
        raise CheckpointError(
            f"the checkpoints in {run_dir} hold no {monitor!r} to be ranked by. They hold: {names}. "
            "Choose one of these by --checkpoint.monitor, or another --run_dir."
        )
    before = measured[-1]
    if (before.monitor, before.mode) != (monitor, mode):
        log.warning(
            "checkpoints were ranked by the %s %s; from the next checkpoint on, all are ranked by the %s %s",
            "highest" if before.mode == "max" else "lowest",
            before.monitor,
            "highest" if mode == "max" else "lowest",
            monitor,
        )
    current = validation_identity(trainer)
    if before.validation and before.validation != current:
        log.warning(
            "the validation samples changed from %s to %s. Metrics cannot be compared, so earlier checkpoints "
            "are ranked separately; the best of them is kept",
            before.validation,
            current,
        )


def validation_identity(trainer: pl.Trainer) -> str:
    """Identity of the validation samples: their number, a hash of keys and labels, and a limit if there is one."""
    data = image_data(trainer)
    identity = data.parts["val"].fingerprint()
    batches, limit = math.ceil(len(data.parts["val"]) / data.global_batch_size), trainer.limit_val_batches
    used = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    return identity if used == batches else f"{identity}, the first {used} of {batches} batches"
