"""What can be checked of a fit in seconds, before it waits for the other nodes."""

from __future__ import annotations

from job.check.access import remove_probe, require_data, write_probe
from job.data.datamodule import ImageDataModule
from job.model.backbone import build_skeleton
from job.model.config import ModelConfig


def check(config: ModelConfig, data: ImageDataModule, run_dir: str, *, writes: bool) -> None:
    """Raise the error of a fit that cannot start: unknown backbone, missing data, no access.

    ``python -m job check`` finds out more (:mod:`job.check.preflight`), by the same functions.

    Args:
        config: hyperparameters of the model.
        data: the images.
        run_dir: folder of all results.
        writes: also check that this process may write to run_dir.

    Raises:
        JobError: a subclass says what is wrong.
    """
    build_skeleton(config.backbone, data.image_size)
    require_data(data)
    if writes:
        remove_probe(write_probe(run_dir))  # training does without the right to delete
