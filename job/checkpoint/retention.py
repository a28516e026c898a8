"""What is kept of a run's checkpoints, and whether those of earlier starts compare with this one's."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import pytorch_lightning as pl

from job import checkpoint, storage
from job.checkpoint.manifest import Manifest, Mode
from job.checkpoint.ranking import implied_mode
from job.errors import CheckpointError, JobError, LeaseError, StorageOutage

log = logging.getLogger(__name__)

SECONDS_BETWEEN_REFUSED_REMOVALS = 3600.0
"""How long retention rests after a bucket refused it: a retention policy may let an object go later."""


class Retention:
    """Deletes checkpoints that are no longer kept; a bucket that refuses it costs room, not the run."""

    def __init__(self) -> None:
        self._refused_at = -math.inf
        self._warned = False

    def remove(
        self,
        run_dir: str,
        superseded: Callable[[list[Manifest]], list[Manifest]],
        before_write: Callable[[], None],
    ) -> None:
        """Delete those of a run's checkpoints that ``superseded`` selects.

        Args:
            before_write: called before each deletion; raises LeaseError if this job may not write to run_dir.
        """
        if time.monotonic() - self._refused_at < SECONDS_BETWEEN_REFUSED_REMOVALS:
            return
        try:
            for manifest in superseded(checkpoint.manifests(run_dir)):
                before_write()
                checkpoint.remove(storage.join(run_dir, checkpoint.FOLDER, manifest.file))
        except LeaseError:
            raise
        except JobError as error:
            if not isinstance(error, StorageOutage):  # rights or a retention policy: it would be refused each time
                self._refused_at = time.monotonic()
            if not self._warned:
                self._warned = True
                log.warning(
                    "checkpoints that are no longer needed stay in %s, which takes room; the run goes on: %s",
                    storage.join(run_dir, checkpoint.FOLDER),
                    error,
                )


def compare_ranking(trainer: pl.Trainer, run_dir: str, monitor: str, mode: Mode) -> None:
    """Warn where earlier checkpoints of a run were ranked by something else.

    Raises:
        CheckpointError: none of them holds the metric.
    """
    implied = implied_mode(monitor)
    if implied not in (None, mode):
        log.warning("--checkpoint.mode is %s: the checkpoint with the worst %s is best", mode, monitor)
    measured = [m for m in checkpoint.manifests(run_dir) if m.metrics]
    if not measured:
        return
    if not any(monitor in m.metrics for m in measured):
        known = ", ".join(sorted({name for m in measured for name in m.metrics})[:20])
        raise CheckpointError(
            f"the checkpoints in {run_dir} hold no {monitor!r} to be ranked by. They hold: {known}. "
            "Choose one of these by --checkpoint.monitor, or another --run_dir."
        )
    before = measured[-1]
    if (before.monitor, before.mode) != (monitor, mode):
        log.warning(
            "the best checkpoint was the one with the %s %s; from the next checkpoint on all are ranked anew, and "
            "the best is the one with the %s %s",
            "highest" if before.mode == "max" else "lowest",
            before.monitor,
            "highest" if mode == "max" else "lowest",
            monitor,
        )
    current = validation_identity(trainer)
    if before.validation and before.validation != current:
        log.warning(
            "the validation samples changed: they were %s, are %s. The ranking starts anew: earlier checkpoints "
            "do not compete for the best one; the best of them is kept",
            before.validation,
            current,
        )


def validation_identity(trainer: pl.Trainer) -> str:
    """Which samples are validated: their number, a hash of their keys and labels, and a limit where there is one."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    identity: str = data.parts["val"].fingerprint()
    batches, limit = math.ceil(len(data.parts["val"]) / data.global_batch_size), trainer.limit_val_batches
    used = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    return identity if used == batches else f"{identity}, the first {used} of {batches} batches"
