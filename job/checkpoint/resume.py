"""The checkpoint that a fit resumes from, by the option ``--resume``."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job import checkpoint, storage
from job.checkpoint import abandoned
from job.checkpoint.abandoned import StepBack
from job.checkpoint.manifest import Manifest
from job.checkpoint.ranking import order, ranked
from job.cluster import ranks
from job.errors import CheckpointError, ConfigError, StorageError, StorageOutage

log = logging.getLogger(__name__)

Resume = Literal["auto", "never", "must", "best"]

NAMES_SHOWN = 5


class ResumePoint(NamedTuple):
    """Where a run continues.

    Attributes:
        manifest: of the checkpoint.
        step_back: the checkpoints to abandon when training starts; None: the run does not go back.
    """

    manifest: Manifest
    step_back: StepBack | None = None


def resume_point(run_dir: str, resume: Resume, configuration: str) -> ResumePoint | None:
    """The checkpoint to resume from; None starts a new run. Called on rank 0, which holds the lease.

    With "best", later checkpoints are abandoned. A restart with the same configuration does not go back again, but
    continues from the newest checkpoint since: whatever restarts a process gives it the same options.

    Args:
        run_dir: of the run.
        resume: the option.
        configuration: of this attempt.

    Raises:
        ConfigError: ``resume`` is "never", and there are checkpoints.
        CheckpointError: there is no checkpoint that ``resume`` needs, or none of them can be read.
    """
    if resume == "best":
        return _best(run_dir, hashlib.sha256(configuration.encode()).hexdigest())
    if resume == "never":
        scan = checkpoint.scan(run_dir)
        if count := len(scan.good) + len(scan.damaged) + len(scan.newer):
            raise ConfigError(
                f"{run_dir} holds {count} checkpoint(s) of an earlier run, and --resume is never. "
                "Choose another --run_dir, or --resume=auto."
            )
        return None
    newest = checkpoint.newest_verified(run_dir)
    if newest is None and resume == "must":
        raise CheckpointError(f"--resume is must, but {run_dir} holds no checkpoint.")
    return None if newest is None else ResumePoint(newest)


class StepBackWriter(Callback):
    """Writes down which checkpoints are abandoned when training starts: a rejected start changes nothing.

    Args:
        step_back: names them; None: none.
        before_write: called immediately before the write; raises if this job may not write to run_dir.
    """

    def __init__(self, step_back: StepBack | None, before_write: Callable[[], None] = storage.unconditionally) -> None:
        self.step_back = step_back
        self.before_write = before_write

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, before anything is trained.

        Raises:
            StorageError: the bucket does not take it.
        """
        step_back = self.step_back
        if step_back is not None:
            ranks.from_rank_zero(lambda: self._write(trainer.default_root_dir, step_back))

    def _write(self, run_dir: str, step_back: StepBack) -> None:
        folder = storage.join(run_dir, checkpoint.FOLDER)
        uri = storage.join(folder, abandoned.next_file_name(entry.key for entry in storage.list_files(folder)))
        storage.write_bytes(uri, abandoned.encode(step_back), self.before_write)
        if names := step_back.abandoned:
            further = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            log.warning(
                "%d later checkpoint(s) are abandoned, and deleted after the next one: %s%s. Until then, deleting %s "
                "undoes it",
                len(names),
                ", ".join(names[:NAMES_SHOWN]),
                further,
                uri,
            )


def require_epochs_left(run_dir: str, resumed: Manifest, max_epochs: int | None) -> None:
    """Refuse to resume a run that has trained for longer than it is to train.

    Raises:
        ConfigError: it has.
    """
    if max_epochs is None or max_epochs < 0 or (resumed.epoch, resumed.batch) <= (max_epochs, 0):
        return
    part = f" and {resumed.batch} batches of the next" if resumed.batch else ""
    least = resumed.epoch + bool(resumed.batch)
    raise ConfigError(
        f"the run in {run_dir} has trained {resumed.epoch} epochs{part}, and --trainer.max_epochs is {max_epochs}. Use "
        f"at least {least} to continue it, or another --run_dir. Its best checkpoint predicts as it is."
    )


def _best(run_dir: str, configuration: str) -> ResumePoint:
    scanned = checkpoint.scan(run_dir)
    manifests, steps_back = checkpoint.usable(scanned), scanned.steps_back
    if steps_back and steps_back[-1].configuration == configuration:
        newest = checkpoint.newest_verified(run_dir)
        if newest is not None:
            log.info(
                "--resume is best: with these options the run went back to %s before, and continues from its newest "
                "checkpoint. Change an option to go back again",
                steps_back[-1].resumed,
            )
            return ResumePoint(newest)
    best = _first_verified(run_dir, ranked(manifests))
    if best is None:
        raise CheckpointError(
            f"--resume is best, but {run_dir} holds no checkpoint with a validation. Use --resume=auto, which starts a "
            "new run where there is none."
        )
    log.info("--resume is best: %s has the best %s, %.4g", best.file, best.monitor, best.value)
    later = [manifest.file for manifest in manifests if order(manifest) > order(best)]
    return ResumePoint(best, StepBack(configuration, best.file, later))


def _first_verified(run_dir: str, candidates: Sequence[Manifest]) -> Manifest | None:
    for manifest in candidates:
        try:
            checkpoint.verify(run_dir, manifest)
        except StorageOutage:
            raise
        except (CheckpointError, StorageError) as error:
            log.warning("cannot resume from the best checkpoint, trying the next best: %s", error)
        else:
            return manifest
    return None
