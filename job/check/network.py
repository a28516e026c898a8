"""The backbone and its pretrained weights."""

from __future__ import annotations

from collections.abc import Iterator

from job.check.finding import Finding, ok
from job.data.datamodule import ImageDataModule
from job.model.backbone import build_backbone, build_skeleton
from job.model.config import ModelConfig
from job.model.loading import read_pretrained

WEIGHTS = "weights"
MEND = "Correct --model.backbone or --model.weights; none starts from random weights."


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
