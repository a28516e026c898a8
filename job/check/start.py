"""What can be checked of a command in seconds, before it waits for the other nodes.

``python -m job check`` finds out more (:mod:`job.check.preflight`), by the same functions.
"""

from __future__ import annotations

from job import checkpoint
from job.check.access import remove_probe, require_data, require_readable, write_probe
from job.check.network import require_weights
from job.checkpoint.initial import initial_checkpoint
from job.data.datamodule import ImageDataModule
from job.model.backbone import build_skeleton
from job.model.config import ModelConfig
from job.model.lora import adaptable_weights


def check(
    config: ModelConfig, data: ImageDataModule, run_dir: str, *, writes: bool, init_from: str | None = None
) -> None:
    """Raise the error of a fit that cannot start: unknown backbone, missing data or weights, no access.

    Args:
        config: hyperparameters of the model.
        data: the images.
        run_dir: folder of all results.
        writes: also check that this process may write to run_dir.
        init_from: run_dir, or checkpoint, of another run whose weights a new run starts with.

    Raises:
        JobError: a subclass says what is wrong.
    """
    skeleton = build_skeleton(config.backbone, data.image_size, config.pooling)
    if config.lora_rank:
        adaptable_weights(skeleton, config)
    require_data(data)
    if not checkpoint.scan(run_dir).good:  # the others are not read again
        require_weights(config.weights)
        if init_from is not None:
            initial_checkpoint(init_from)
    if writes:
        _require_writable(run_dir)


def check_evaluation(data: ImageDataModule, ckpt: str, run_dir: str, *, writes: bool) -> None:
    """Raise the error of an evaluation that cannot start: no checkpoint, missing data, no access.

    Args:
        data: the images.
        ckpt: a checkpoint file or a run_dir.
        run_dir: folder of the result.
        writes: also check that this process may write to run_dir.

    Raises:
        JobError: a subclass says what is wrong.
    """
    checkpoint.resolve(ckpt)
    require_data(data)
    if writes:
        _require_writable(run_dir)


def check_prediction(input: str, ckpt: str, output: str, *, writes: bool) -> None:
    """Raise the error of a prediction that cannot start: no checkpoint, missing images, no access.

    Args:
        input: URI of the images.
        ckpt: a checkpoint file or a run_dir.
        output: folder of the predictions.
        writes: also check that this process may write to it.

    Raises:
        JobError: a subclass says what is wrong.
    """
    checkpoint.resolve(ckpt)
    require_readable(input)
    if writes:
        _require_writable(output)


def _require_writable(folder: str) -> None:
    remove_probe(write_probe(folder))  # no command needs the right to delete
