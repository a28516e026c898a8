"""Comparison of an exported network with the checkpoint, on images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job.data.augment import resize
from job.data.decode import decode
from job.errors import DivergedError
from job.export.errors import ExportError
from job.export.formats import InputKind
from job.export.network import Run, TrainedModel

TOLERANCE = 1e-4
"""Largest difference of a probability for the same resized pixels; float32 on another library's kernels."""
RESIZE_TOLERANCE = 0.05
"""Largest mean difference of the most probable class's probability over whole images; see :func:`resize_difference`."""


def difference(run: Run, model: TrainedModel, kind: InputKind, pixels: Tensor) -> float:
    """Largest difference of a probability, in batches of one and of all other images.

    Args:
        run: runs the exported network.
        model: the checkpoint's.
        kind: of the exported network's input.
        pixels: resized images, uint8 [B, 3, S, S].

    Raises:
        DivergedError: the checkpoint's outputs are not finite.
        ExportError: the exported network returns another shape, or values that are not finite.
    """
    largest = 0.0
    for batch in (pixels[:1], pixels[1:]):
        if len(batch):
            expected, actual = model.probabilities(batch), run(model.input_of(batch, kind))
            if not np.isfinite(expected).all():
                raise DivergedError(
                    "the network's outputs are not finite: its weights have diverged. Use another checkpoint."
                )
            if actual.shape != expected.shape or not np.isfinite(actual).all():
                raise ExportError(
                    f"the exported network returns {actual.shape} values, or some that are not finite, where the "
                    f"checkpoint returns {expected.shape}. Choose another --format."
                )
            largest = max(largest, float(np.abs(actual - expected).max()))
    return largest


def require_equal(run: Run, model: TrainedModel, kind: InputKind, pixels: Tensor, name: str) -> float:
    """:func:`difference`, which has to be within :data:`TOLERANCE`.

    Raises:
        ExportError: it is not.
    """
    largest = difference(run, model, kind, pixels)
    if largest > TOLERANCE:
        raise ExportError(
            f"the {name} network differs from the checkpoint: a probability differs by {largest:.2g}, more than "
            f"{TOLERANCE:g}. Nothing was written. Choose another --format."
        )
    return largest


def resize_difference(run: Run, model: TrainedModel, encoded: list[bytes]) -> tuple[float, float]:
    """Compare whole images, decoded in full and resized by the exported network, with the package's own predictions.

    The package decodes large JPEGs at a fraction of their size, as training does; other programs decode in full.

    Args:
        run: runs the exported network, whose input is of kind "image".
        model: the checkpoint's network.
        encoded: image files that can be decoded; at least one.

    Returns:
        largest difference of a probability, and share of images whose most probable class changes.

    Raises:
        ExportError: predictions differ by more than resizing explains.
    """
    size, mode = model.description.image_size, model.description.resize
    prepared = torch.stack([resize(decode(content, size), size, mode) for content in encoded])
    expected = model.probabilities(prepared)
    wholes = [decode(content).permute(1, 2, 0).contiguous().numpy()[None] for content in encoded]
    actual = np.concatenate([run(whole) for whole in wholes])
    distance: npt.NDArray[np.float32] = np.abs(actual - expected).max(axis=1)
    if float(distance.mean()) > RESIZE_TOLERANCE:
        raise ExportError(
            f"the exported network predicts otherwise from whole images: probabilities differ by {distance.mean():.2g} "
            f"in the mean, more than {RESIZE_TOLERANCE:g}. Choose --input resized, and resize as export.json says."
        )
    return float(distance.max()), float((actual.argmax(axis=1) != expected.argmax(axis=1)).mean())
