"""The backbone and its pretrained weights."""

from __future__ import annotations

from collections.abc import Iterator

from job import storage
from job.check.finding import Finding, ok
from job.data.datamodule import ImageDataModule
from job.errors import WeightsError
from job.model.backbone import build_backbone, build_skeleton
from job.model.config import ModelConfig
from job.model.loading import read_pretrained, weights_file

WEIGHTS = "weights"
MEND = "Correct --model.backbone or --model.weights; none starts from random weights."
LIBRARY_WEIGHTS = ("DEFAULT", "none")
SAFETENSORS_LENGTH = 8
"""Bytes of a .safetensors file that hold the length of its header, JSON."""
TORCH_BEGINNINGS = (b"PK\x03\x04", b"\x80")
"""First bytes of a file of torch.save: a zip archive, or a pickle in the format before torch 1.6."""


def weights(config: ModelConfig, data: ImageDataModule) -> Iterator[Finding]:
    """Build the backbone, and load its weights into it: names, shapes and, of a checkpoint, its SHA-256 must fit.

    Raises:
        JobError: a subclass says what does not fit.
    """
    build_skeleton(config.backbone, data.image_size)  # an unknown name costs no download
    backbone = build_backbone(config.backbone, read_pretrained(config.weights), data.image_size)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    origin = {"none": "random weights", "DEFAULT": "the library's pretrained weights"}
    yield ok(
        WEIGHTS,
        f"{config.backbone}, {parameters / 1e6:.3g} M parameters, with "
        f"{origin.get(config.weights, f'the weights {config.weights}')}.",
    )


def require_weights(weights: str) -> None:
    """Look up the file of ``--model.weights``, and read its first bytes, not the tensors.

    Args:
        weights: a URI, or DEFAULT or none, of which nothing is looked up.

    Raises:
        WeightsError: it is no file of tensors.
        CheckpointError: it is a run_dir without checkpoint.
        StorageError: it is missing, or this process may not read it.
    """
    if weights in LIBRARY_WEIGHTS:
        return
    file = weights_file(weights)
    size = storage.info(file).get("size")
    with storage.open_for_reading(file) as stream:
        first = stream.read(SAFETENSORS_LENGTH + 1)
    if file.lower().endswith(".safetensors"):
        header = int.from_bytes(first[:SAFETENSORS_LENGTH], "little")
        is_readable = first.endswith(b"{") and (size is None or SAFETENSORS_LENGTH + header <= size)
    else:
        is_readable = first.startswith(TORCH_BEGINNINGS)
    if not is_readable:
        raise WeightsError(
            f"{weights} is not a file of tensors, or is cut off. Give --model.weights a file that torch.save or "
            "safetensors wrote, or the run_dir of a run."
        )
