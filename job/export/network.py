"""The network of a checkpoint as other programs run it: from images to class probabilities, in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from job.export.formats import InputKind
from job.export.manifest import ModelDescription
from job.model.calibrator import Calibrator
from job.model.classifier import Classifier
from job.model.tasks import TASKS

Array = npt.NDArray[np.generic]
Run = Callable[[Array], npt.NDArray[np.float32]]
"""Runs an exported network: from a batch of its kind of input to probabilities, float [B, C]."""


class ProbabilityNetwork(nn.Module):
    """Backbone and head in the default memory format, from normalised images to probabilities.

    Args:
        net: the network, which is copied.
        calibrator: of its probabilities; None: they are not calibrated.
    """

    def __init__(self, net: Classifier, calibrator: Calibrator | None = None) -> None:
        super().__init__()
        self.scale: Tensor | None
        self.offset: Tensor | None
        scale, offset = (None, None) if calibrator is None else calibrator.factors()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.backbone = copy.deepcopy(net.backbone).to(memory_format=torch.contiguous_format)
        self.head = copy.deepcopy(net.head)
        self.probabilities = TASKS[net.task].probabilities
        self.requires_grad_(False)
        self.eval()

    def forward(self, normalised: Tensor) -> Tensor:
        """Float [B, 3, S, S] to probabilities, float [B, C]."""
        logits = self.head(self.backbone(normalised))
        if self.scale is not None and self.offset is not None:
            logits = logits * self.scale + self.offset
        return self.probabilities(logits)

    def calibrated_head(self) -> nn.Sequential:
        """The head with the calibration in its last layer, so that its outputs are calibrated logits."""
        head = copy.deepcopy(self.head)
        last = head[-1]
        assert isinstance(last, nn.Linear)
        if self.scale is not None and self.offset is not None:
            scale = self.scale.expand_as(last.bias)
            with torch.no_grad():
                last.weight.mul_(scale[:, None])
                last.bias.mul_(scale).add_(self.offset)
        return head


class TorchPreprocessing(nn.Module):
    """From one kind of input to normalised images, float [B, 3, S, S].

    Resizing is that of :func:`job.data.augment.resize`, in floats, since torch resizes uint8 on CPUs only. Its
    result is rounded to whole levels, and differs as that of
    :mod:`job.export.onnx_preprocessing`.

    Args:
        kind: of the input.
        image_size: S.
        resize: "squash" or "crop".
        mean: per channel, of images in [0, 1].
        std: per channel.
    """

    def __init__(
        self, kind: InputKind, image_size: int, resize: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.kind, self.image_size, self.resize = kind, image_size, resize
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(list(mean)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images of the kind to normalised images."""
        if self.kind == "normalised":
            return images
        pixels = images.permute(0, 3, 1, 2).float()
        if self.kind == "image":
            pixels = self._resized(pixels)
        return (pixels / 255 - self.mean) / self.std

    def _resized(self, pixels: Tensor) -> Tensor:
        size = self.image_size
        if self.resize == "squash":
            return _interpolated(pixels, size, size)
        height, width = pixels.shape[2:]
        shorter: int = torch.sym_min(height, width)  # type: ignore[assignment]
        height, width = size * height // shorter, size * width // shorter
        pixels = _interpolated(pixels, height, width)
        # Indices, not slices: torch.export would specialise on the strides of a slice.
        offsets = torch.arange(size, device=pixels.device)
        rows, columns = offsets + _centre(height - size), offsets + _centre(width - size)
        return pixels.index_select(2, rows).index_select(3, columns)


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's network, and its description.

    Attributes:
        net: the network as :mod:`job.predict` runs it.
        network: the same for other programs.
        calibrator: of both; None: probabilities are not calibrated.
        description: labels, preprocessing and origin.
    """

    net: Classifier
    network: ProbabilityNetwork
    description: ModelDescription
    calibrator: Calibrator | None = None

    @torch.inference_mode()
    def probabilities(self, pixels: Tensor) -> npt.NDArray[np.float32]:
        """What the checkpoint predicts: uint8 [B, 3, S, S] to float [B, C]."""
        logits = self.net(pixels)
        if self.calibrator is not None:
            logits = self.calibrator.apply(logits)
        values: npt.NDArray[np.float32] = TASKS[self.net.task].probabilities(logits).numpy()
        return values

    def input_of(self, pixels: Tensor, kind: InputKind) -> Array:
        """Resized images, uint8 [B, 3, S, S], as one kind of input."""
        if kind != "normalised":
            return pixels.permute(0, 2, 3, 1).contiguous().numpy()
        normalised: Array = ((pixels.float() / 255 - self.net.mean) / self.net.std).contiguous().numpy()
        return normalised


def _interpolated(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize columns, then rows, and round after each (a half upwards), as Pillow and torchvision do with uint8."""
    pixels = F.interpolate(pixels, size=(pixels.shape[2], width), mode="bilinear", antialias=True).add(0.5).floor()
    return F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True).add(0.5).floor()


def _centre(margin: int) -> int:
    """Half of a margin, rounded half to even, as torchvision's ``center_crop``; of a symbolic integer, too."""
    half = margin // 2
    return half + (margin % 2) * (half % 2)
