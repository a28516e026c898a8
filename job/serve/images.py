"""From an image of a request to the network's input."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
from torch import Tensor

from job.data.augment import ResizeMode, resize
from job.data.decode import ImageTooLarge, decode
from job.data.python_images import pixels_of
from job.errors import DataError

Image = bytes | npt.NDArray[np.uint8]
"""An encoded image, or uint8 [H, W, C]."""

LARGE = 16_000_000
"""Pixels above which an image is decoded alone: a process needs the memory of one of them, whatever its threads."""

_one_large = threading.Lock()


def prepare(image: Image, size: int, mode: ResizeMode, max_image_pixels: int) -> Tensor:
    """uint8 [3, S, S] of one image, as :meth:`job.predict.predictor.Predictor.predict` prepares it.

    Args:
        image: encoded or as pixels.
        size: S.
        mode: how images are made square.
        max_image_pixels: height times width of the largest image.

    Raises:
        DataError: it is no readable image, or too large.
    """
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
        if height * width > max_image_pixels:
            raise DataError(f"is refused: {width} x {height} pixels, more than max_image_pixels ({max_image_pixels:,})")
        return resize(pixels_of(image, size, max_image_pixels), size, mode)
    try:
        return resize(decode(image, size, min(LARGE, max_image_pixels)), size, mode)
    except ImageTooLarge:
        if max_image_pixels <= LARGE:
            raise
    with _one_large:
        return resize(decode(image, size, max_image_pixels), size, mode)


def reason(error: DataError) -> str:
    """Why an image cannot be read, for the client."""
    text = str(error)
    return text if text.startswith(("a ", "an ", "floats")) else f"the image {text}"
