"""Images that are blank, tiny or of an odd shape, in absolute terms and in comparison with the rest of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job.audit.pixels import Records

BLANK = 5.0
"""Standard deviation of the brightest or darkest channel, of 255, below which an image shows nothing …"""
BLANK_SHARE = 0.25
"""… if it is also below this share of the median."""
TINY = 32
"""Shorter side in pixels below which an image is tiny …"""
TINY_SHARE = 0.5
"""… if it is also below this share of the median."""
ODD = 3.0
"""Ratio of the sides from which on the shape is odd …"""
ODD_SHARE = 2.0
"""… if it is also this many times the median."""


@dataclass(frozen=True)
class ImageFaults:
    """Faults of images, each bool [N].

    Attributes:
        blank: nearly one colour.
        tiny: of few pixels.
        odd: much longer in one direction.
        ratio: longer side divided by the shorter one, float64 [N]; 1 for unreadable images.
    """

    blank: npt.NDArray[np.bool_]
    tiny: npt.NDArray[np.bool_]
    odd: npt.NDArray[np.bool_]
    ratio: npt.NDArray[np.float64]


def find_faults(records: Records) -> ImageFaults:
    """Judge each readable image by its size and its contrast.

    Args:
        records: of all images, [N].
    """
    readable = records["readable"]
    height, width = records["height"].astype(np.float64), records["width"].astype(np.float64)
    shorter = np.minimum(height, width)
    ratio = np.where(readable, np.maximum(height, width) / np.maximum(shorter, 1), 1.0)
    deviation = records["deviation"].astype(np.float64)
    blank = deviation < min(BLANK, BLANK_SHARE * _median(deviation, readable))
    # All images of a data set of drawings on white, or of digits of 8 pixels, are no faults.
    blank |= deviation == 0
    tiny = shorter < min(TINY, TINY_SHARE * _median(shorter, readable))
    odd = ratio > max(ODD, ODD_SHARE * _median(ratio, readable))
    return ImageFaults(readable & blank, readable & tiny, readable & odd, ratio)


def _median(values: npt.NDArray[np.float64], readable: npt.NDArray[np.bool_]) -> float:
    return float(np.median(values[readable])) if readable.any() else 0.0
