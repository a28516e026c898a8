"""Bounds by which advice tells an observation from chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SIGMAS = 4.0
"""Standard errors that an observation must differ by. A normal variable does so once in 30,000 times: a hundred
validations with ten kinds of advice give a false alarm in 3 of 100 runs at most."""

TREND_SIGMAS = 2.33
"""The same of the trend of a loss, which other conditions confirm: once in 100 times."""

RISE = 0.10
"""Relative rise of a loss, reported from this value on; less is usual between epochs."""

RISING_VALIDATIONS = 5
"""Validations after the lowest loss from which on there can be a trend: 5 values are in rising order once in 120 times
by chance, 4 once in 24 times."""


class Bounds(NamedTuple):
    """Confidence interval of a share."""

    low: float
    high: float


def bounds(share: float, count: int) -> Bounds:
    """Confidence interval of a share that was observed in ``count`` samples (Agresti & Coull, 1998), at SIGMAS."""
    total = count + SIGMAS**2
    centre = (share * count + SIGMAS**2 / 2) / total
    half = SIGMAS * math.sqrt(centre * (1 - centre) / total)
    return Bounds(max(centre - half, 0.0), min(centre + half, 1.0))


def rise(losses: Sequence[float]) -> int | None:
    """Position of the lowest loss, if losses have risen since; None if they have not, or if it may be chance.

    The last three are each higher by :data:`RISE`. The rise exceeds the noise between neighbours, as second differences
    show it, and the values have a trend by the test of Mann and Kendall.
    """
    values = np.asarray(losses, np.float64)
    best = int(values.argmin()) if len(values) else 0
    after = values[best + 1 :]
    if len(after) < RISING_VALIDATIONS or after[-3:].min() < values[best] * (1 + RISE):
        return None
    # Neighbours on a straight line have no second difference; those with noise have one of variance 6 σ². The median
    # of a normal variable's absolute value is 0.67 σ.
    curvature = np.abs(np.diff(values, 2))
    noise = max(math.sqrt(float((curvature[best:] ** 2).mean())), float(np.median(curvature)) / 0.67) / math.sqrt(6)
    if float(np.median(after[-3:])) - values[best] < SIGMAS * noise:
        return None
    count = len(after)
    concordant = float(np.sign(after[None, :] - after[:, None])[np.triu_indices(count, 1)].sum())
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return best if concordant >= TREND_SIGMAS * deviation else None
