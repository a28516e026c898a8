"""The backbone and the weights that the run starts with."""

from __future__ import annotations

from collections.abc import Iterator

from job import checkpoint, storage
from job.check.finding import Finding, ok
from job.checkpoint.initial import initial_checkpoint, require_other_run
from job.data.datamodule import ImageDataModule
from job.errors import StorageError, WeightsError
from job.model.backbone import build_skeleton
from job.model.classifier import build_classifier
from job.model.config import ModelConfig
from job.model.loading import read_pretrained, weights_file
from job.model.lora import adaptable_weights
from job.model.warm_start import read_warm_start
from job.model.weights import PretrainedWeights
from job.train.fit import FitSettings

WEIGHTS = "weights"
MEND = "Correct --model.backbone, --data.image_size, --model.weights or --init_from, whichever this names."
_CLASSES = ("a", "b")
"""Stand for those of the data, of which the backbone knows nothing."""
_LIBRARY = {"none": "random weights", "DEFAULT": "the library's pretrained weights"}
_SAFETENSORS_LENGTH = 8
"""Bytes of a .safetensors file that hold the length of its header, JSON."""
_TORCH_BEGINNINGS = (b"PK\x03\x04", b"\x80")
"""First bytes of a file of torch.save: a zip archive, or a pickle in the format before torch 1.6."""


def weights(config: ModelConfig, data: ImageDataModule, settings: FitSettings) -> Iterator[Finding]:
    """Build the network, and load its weights: names, shapes and, of a checkpoint, its SHA-256 must fit.

    Args:
        config: hyperparameters of the model.
        data: the images.
        settings: of the fit, which says whether the run starts from another run's weights.

    Raises:
        JobError: a subclass says what does not fit.
    """
    skeleton = build_skeleton(config.backbone, data.image_size, config.pooling)  # an unknown name costs no download
    if config.lora_rank:
        adaptable_weights(skeleton, config)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    described = f"{config.backbone}, {parameters / 1e6:.3g} M parameters, with"
    if _has_checkpoint(settings.run_dir):
        yield ok(WEIGHTS, f"{described} those of the run's own checkpoint, from which it continues.")
        return
    values: str | PretrainedWeights
    if settings.init_from is not None:
        require_other_run(settings.init_from, settings.run_dir)
        values = read_warm_start(initial_checkpoint(settings.init_from), config.backbone, config.pooling).backbone
    else:
        values = read_pretrained(config.weights)
    build_classifier(config, values, classes=_CLASSES, image_size=data.image_size, device_type="cpu")
    if isinstance(values, str):
        yield ok(WEIGHTS, f"{described} {_LIBRARY[values]}.")
        return
    of_classes = f", of {len(values.classifier.classes):,} classes" if values.classifier is not None else ""
    yield ok(WEIGHTS, f"{described} {settings.init_from or config.weights}{of_classes}.")


def require_weights(weights: str) -> None:
    """Look up the file of ``--model.weights``, and read its first bytes, not the tensors.

    Args:
        weights: a URI, or DEFAULT or none, of which nothing is looked up.

    Raises:
        WeightsError: it is no file of tensors.
        CheckpointError: it is a run_dir without checkpoint.
        StorageError: it is missing, or this process may not read it.
    """
    if weights in _LIBRARY:
        return
    file = weights_file(weights)
    size = storage.info(file).get("size")
    with storage.open_for_reading(file) as stream:
        first = stream.read(_SAFETENSORS_LENGTH + 1)
    if file.lower().endswith(".safetensors"):
        header = int.from_bytes(first[:_SAFETENSORS_LENGTH], "little")
        is_readable = first.endswith(b"{") and (size is None or _SAFETENSORS_LENGTH + header <= size)
    else:
        is_readable = first.startswith(_TORCH_BEGINNINGS)
    if not is_readable:
        raise WeightsError(
            f"{weights} is not a file of tensors, or is cut off. Give --model.weights a file that torch.save or "
            "safetensors wrote, or the run_dir of a run."
        )


def _has_checkpoint(run_dir: str) -> bool:
    try:
        return bool(checkpoint.scan(run_dir).good)
    except StorageError:  # a check of its own reports it
        return False
