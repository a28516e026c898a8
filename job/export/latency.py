"""Time per image of a network on this machine."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import numpy as np

from job.export.network import Array, Run

BATCH_SIZE = 16
MOST_SECONDS = 1.5
"""Time that each measurement takes, about."""
MOST_RUNS = 50


class Latency(NamedTuple):
    """Speed of a network.

    Attributes:
        milliseconds: median time of a batch of one image.
        images_per_second: in batches of :data:`BATCH_SIZE`, by the median time.
    """

    milliseconds: float
    images_per_second: float


def measure(run: Run, image: Array) -> Latency:
    """Time a network.

    Args:
        run: runs it.
        image: a batch of one image.
    """
    batch = np.repeat(image, BATCH_SIZE, axis=0)
    return Latency(_median_seconds(run, image) * 1e3, BATCH_SIZE / _median_seconds(run, batch))


def _median_seconds(run: Run, images: Array) -> float:
    run(images)  # allocates memory
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < MOST_RUNS and (not seconds or time.perf_counter() - began < MOST_SECONDS):
        start = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
