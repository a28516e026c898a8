"""Search for pairs of similar vectors by blocks of matrix products, in bounded memory.

Up to :data:`EXACT` vectors all pairs are compared. More are divided into cells: each vector belongs to those of the two
most similar of some vectors drawn at random, and only vectors of one cell are compared. Copies share a cell unless they
lie between three of them. Time then grows with N times the size of a cell, not with the square of N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

EXACT = 50_000
"""Vectors up to which all pairs are compared, and which a cell holds at most."""
CELL = 8_000
"""Vectors per cell, on average."""
BLOCK = 2048
"""Rows and columns of one matrix product."""
CELLS_PER_VECTOR = 2

Samples = npt.NDArray[np.int64]
Vectors = Callable[[Samples], Tensor]
"""Vectors of length 1, float32 [len(samples), F], of some samples."""
Pairs = tuple[Samples, Samples, npt.NDArray[np.float32]]
"""Two sample ids each, and their cosine."""


def similar_pairs(
    vectors: Vectors, samples: Samples, threshold: float, device: torch.device, *, seed: int = 0, exact: int = EXACT
) -> Iterator[Pairs]:
    """Pairs of samples whose vectors have a cosine of at least ``threshold``, block by block; some come twice.

    Args:
        vectors: of some samples.
        samples: sample ids to compare with one another.
        threshold: least cosine.
        device: that computes.
        seed: of the cells.
        exact: number of vectors up to which all pairs are compared.
    """
    for members in _cells(vectors, samples, np.random.default_rng(seed), device, exact):
        yield from _pairs_of(vectors, members, threshold, device)


def _pairs_of(vectors: Vectors, samples: Samples, threshold: float, device: torch.device) -> Iterator[Pairs]:
    blocks = [samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK)]
    for number, first in enumerate(blocks):
        left = vectors(first).to(device)
        for other in range(number, len(blocks)):
            second = blocks[other]
            cosines = left @ (left if other == number else vectors(second).to(device)).T
            if other == number:
                cosines = cosines.triu(1)
            rows, columns = (cosines >= threshold).nonzero(as_tuple=True)
            if len(rows):
                values = cosines[rows, columns].clamp(max=1.0).cpu().numpy()
                yield first[rows.cpu().numpy()], second[columns.cpu().numpy()], values


def _cells(
    vectors: Vectors, samples: Samples, generator: np.random.Generator, device: torch.device, exact: int
) -> Iterator[Samples]:
    """Sets of samples, within which pairs are searched."""
    if len(samples) <= exact:
        yield samples
        return
    count = max(len(samples) // min(CELL, exact), 2)
    pivots = vectors(np.sort(generator.choice(samples, count, replace=False))).to(device)
    nearest = np.empty((len(samples), CELLS_PER_VECTOR), np.int64)
    for start in range(0, len(samples), BLOCK):
        block = samples[start : start + BLOCK]
        nearest[start : start + len(block)] = (
            (vectors(block).to(device) @ pivots.T).topk(CELLS_PER_VECTOR, dim=1).indices.cpu().numpy()
        )
    for cell in range(count):
        members = samples[(nearest == cell).any(1)]
        if len(members) > 0.9 * len(samples):
            yield members  # vectors that are all alike cannot be divided further
        else:
            yield from _cells(vectors, members, generator, device, exact)


def nearest_similarity(
    vectors: Vectors, samples: Samples, references: Samples, k: int, device: torch.device
) -> npt.NDArray[np.float32]:
    """Mean cosine of each sample and the ``k`` most similar of some others, float32 [len(samples)].

    Args:
        vectors: of some samples.
        samples: sample ids.
        references: sample ids to compare with; a sample is not compared with itself.
        k: number of similar samples.
        device: that computes.
    """
    others = torch.cat([vectors(references[start : start + BLOCK]) for start in range(0, len(references), BLOCK)])
    others = others.to(device)
    own = torch.from_numpy(references).to(device)
    means = np.empty(len(samples), np.float32)
    for start in range(0, len(samples), BLOCK):
        block = samples[start : start + BLOCK]
        cosines = vectors(block).to(device) @ others.T
        cosines[own[None] == torch.from_numpy(block).to(device)[:, None]] = -1.0
        means[start : start + len(block)] = (
            cosines.topk(min(k, len(references) - 1), dim=1).values.mean(1).cpu().numpy()
        )
    return means
