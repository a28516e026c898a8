"""Outliers: images whose features resemble those of no other images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from job.audit.copies import unit
from job.audit.pool import ImagePool
from job.audit.search import Samples, nearest_similarity

NEIGHBOURS = 10
FEWEST = 30
"""Images below which nothing is called an outlier."""
MOST_REFERENCES = 20_000
"""Images that each is compared with, drawn at random of more."""
DEVIATIONS = 3.5
"""Robust standard deviations below the median from which on an image is an outlier."""
TO_STANDARD_DEVIATION = 1.4826
"""Of a normal distribution, in median absolute deviations."""


def find_outliers(
    pool: ImagePool, samples: Samples, device: torch.device, seed: int = 0
) -> tuple[Samples, npt.NDArray[np.float32]]:
    """Images that resemble their nearest neighbours much less than most do, and by how much: the mean cosine.

    Args:
        pool: the images.
        samples: one image per group of copies: a copy would be its own neighbour.
        device: that computes.
        seed: of the images to compare with, of more than :data:`MOST_REFERENCES`.
    """
    if len(samples) < FEWEST:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    references = samples
    if len(samples) > MOST_REFERENCES:
        references = np.sort(np.random.default_rng(seed).choice(samples, MOST_REFERENCES, replace=False))
    similarity = nearest_similarity(lambda rows: unit(pool.rows(rows)), samples, references, NEIGHBOURS, device)
    median = np.median(similarity)
    spread = TO_STANDARD_DEVIATION * np.median(np.abs(similarity - median))
    is_outlier = similarity < median - DEVIATIONS * max(spread, 1e-4)
    return samples[is_outlier], similarity[is_outlier]
