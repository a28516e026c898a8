"""The backbone and its pretrained weights."""

from __future__ import annotations

from collections.abc import Iterator

from job.check.finding import Finding, ok
from job.checkpoint.initial import initial_checkpoint
from job.data.datamodule import ImageDataModule
from job.model.backbone import build_backbone, build_skeleton
from job.model.config import ModelConfig
from job.model.loading import read_pretrained
from job.model.warm_start import read_warm_start

WEIGHTS = "weights"
MEND = "Correct --model.backbone, --model.weights or --init_from; --model.weights=none starts from random weights."


def weights(config: ModelConfig, data: ImageDataModule, init_from: str | None) -> Iterator[Finding]:
    """Build the backbone, and load its weights into it: names, shapes and, of a checkpoint, its SHA-256 must fit.

    Args:
        config: hyperparameters of the model.
        data: the images.
        init_from: run whose weights a new run starts from, in place of ``config.weights``.

    Raises:
        JobError: a subclass says what does not fit.
    """
    build_skeleton(config.backbone, data.image_size)  # an unknown name costs no download
    origin = {"none": "random weights", "DEFAULT": "the library's pretrained weights"}
    source = origin.get(config.weights, f"the weights {config.weights}")
    if init_from is None:
        pretrained = read_pretrained(config.weights)
    else:
        start = read_warm_start(initial_checkpoint(init_from), config.backbone)
        pretrained, source = start.backbone, f"the weights of {start.origin.uri}"
    backbone = build_backbone(config.backbone, pretrained, data.image_size)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    yield ok(WEIGHTS, f"{config.backbone}, {parameters / 1e6:.3g} M parameters, with {source}.")
