"""Groups of copies: images of equal content, and images that are one picture in another size, format or orientation.

Copies are found in two ways. Their grey copies of 16 x 16 pixels are equal up to brightness and contrast, in one of the
eight orientations that rotations by 90 degrees and reflections make. Or their features are nearly equal and their grey
copies similar, as after cropping or retouching. How equal depends on the data: where all images resemble one another,
as those of one device do, copies must be more similar than elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job.audit.pixels import GREY, Records
from job.audit.pool import ImagePool
from job.audit.search import Pairs, Samples, similar_pairs

PIXELS = 0.97
"""Least correlation of the grey copies of near duplicates, where there are too few images to judge by."""
PIXELS_SHARE, FEATURES_SHARE = 0.08, 0.2
"""Share of the usual distance of images, 1 minus their similarity, that copies keep to …"""
USUAL = 95.0
"""… which is that of the most similar 5 % of all pairs."""
PIXELS_WITH_FEATURES = 0.7
"""The same, where the features are nearly equal, too."""
SAMPLE = 512
"""Images by which it is judged how similar images are that are no copies."""
FEWEST = 40
"""Images below which nothing is judged by them."""
CHUNK = 4096
"""Pairs that are compared in all orientations together."""

Grey = npt.NDArray[np.float32]
Pixel = TypeVar("Pixel", np.uint8, np.int64)


@dataclass(frozen=True)
class Copies:
    """Groups of copies.

    Attributes:
        group: int64 [N], the first sample of each sample's group; itself where there is no copy.
        similarity: float32 [N], of each sample and the most similar one of its group; 0 without a copy.
        exact: bool [N], whether an earlier or later sample of the group has the same content.
    """

    group: Samples
    similarity: npt.NDArray[np.float32]
    exact: npt.NDArray[np.bool_]

    def groups(self) -> list[Samples]:
        """Sample ids of each group of at least two."""
        order = np.argsort(self.group, kind="stable")
        _, starts, counts = np.unique(self.group[order], return_index=True, return_counts=True)
        return [order[start : start + count] for start, count in zip(starts, counts, strict=True) if count > 1]


def find_copies(
    pool: ImagePool,
    records: Records,
    candidates: npt.NDArray[np.bool_],
    similarity: float,
    device: torch.device,
    seed: int = 0,
) -> Copies:
    """Find the groups of copies over all parts.

    Args:
        pool: the images.
        records: of the same images, [N].
        candidates: bool [N]; False for images that are not compared: unreadable or blank ones.
        similarity: least cosine of the centred features of near duplicates; 1: only pixels are compared.
        device: that computes.
        seed: of the search.
    """
    forest = Forest(len(pool))
    chosen = np.flatnonzero(candidates)
    for column in ("content", "pixels"):
        values = np.ascontiguousarray(records[column][chosen]).view("S16").view("V16")
        _, first, inverse = np.unique(values.view("<u8").reshape(-1, 2), axis=0, return_index=True, return_inverse=True)
        forest.join(chosen[first[inverse.reshape(-1)]], chosen, np.ones(len(chosen), np.float32))
    roots = forest.roots(chosen)
    _, counts = np.unique(roots, return_counts=True)
    is_exact = np.zeros(len(pool), np.bool_)
    is_exact[chosen] = np.isin(roots, np.unique(roots)[counts > 1])
    # Of each content one image stands for all.
    single = chosen[roots == chosen]
    grey = records["grey"]
    sample = single
    if len(single) > SAMPLE:
        sample = np.sort(np.random.default_rng(seed).choice(single, SAMPLE, replace=False))
    usual = usual_similarity(torch.from_numpy(standardised(grey[sample])))
    least = PIXELS if usual is None else 1 - PIXELS_SHARE * (1 - max(usual, 0.0))
    for pairs in similar_pairs(lambda rows: orientation_free(grey[rows]), single, least, device, seed=seed):
        forest.join(*_verified(pairs, grey, least))
    if similarity < 1 and len(single):
        mean = _mean_of(pool, single)

        def features(rows: Samples) -> Tensor:
            return unit(pool.rows(rows) - mean)

        usual = usual_similarity(features(sample))
        least = similarity if usual is None else max(similarity, 1 - FEATURES_SHARE * (1 - usual))
        for pairs in similar_pairs(features, single, least, device, seed=seed):
            forest.join(*_verified(pairs, grey, PIXELS_WITH_FEATURES))
    return Copies(forest.roots(np.arange(len(pool))), forest.similarity, is_exact)


class Forest:
    """Disjoint sets of samples, each named by its smallest member.

    Args:
        count: number of samples.

    Attributes:
        similarity: float32 [N], the largest similarity of each sample with another one that it was joined to.
    """

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count)
        self.similarity = np.zeros(count, np.float32)

    def roots(self, samples: Samples) -> Samples:
        """The smallest member of each sample's set."""
        roots = self._parents[samples]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        self._parents[samples] = roots
        return roots

    def join(self, first: Samples, second: Samples, similarity: npt.NDArray[np.float32]) -> None:
        """Join the sets of pairs of samples; a pair of one sample with itself says nothing."""
        differ = first != second
        first, second, similarity = first[differ], second[differ], similarity[differ]
        for side in (first, second):
            np.maximum.at(self.similarity, side, similarity)
        while len(first):
            one, other = self.roots(first), self.roots(second)
            differ = one != other
            first, second, one, other = first[differ], second[differ], one[differ], other[differ]
            # The larger root of each pair hangs below the smallest that it is joined with.
            np.minimum.at(self._parents, np.maximum(one, other), np.minimum(one, other))


def usual_similarity(vectors: Tensor) -> float | None:
    """Similarity that most pairs of images do not reach; None for too few of them.

    Args:
        vectors: of some images, float32 [B, F], of length 1.
    """
    if len(vectors) < FEWEST:
        return None
    rows, columns = torch.triu_indices(len(vectors), len(vectors), 1)
    return float(np.percentile((vectors @ vectors.T)[rows, columns].numpy(), USUAL))


def _mean_of(pool: ImagePool, samples: Samples) -> Tensor:
    """Mean of the features of some samples, float32 [F]."""
    total = torch.zeros(pool.width, dtype=torch.float64)
    for start in range(0, len(samples), CHUNK):
        total += pool.rows(samples[start : start + CHUNK]).sum(0, dtype=torch.float64)
    return (total / len(samples)).float()


def unit(values: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    return torch.nn.functional.normalize(values.float(), dim=1)


def standardised(grey: npt.NDArray[np.uint8]) -> Grey:
    """Grey copies without brightness and contrast, float32 [B, GREY * GREY], of mean 0 and length 1."""
    values = grey.reshape(len(grey), GREY * GREY).astype(np.float32)
    values -= values.mean(1, keepdims=True)
    result: Grey = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)
    return result


def orientation_free(grey: npt.NDArray[np.uint8]) -> Tensor:
    """Vectors that are equal for all orientations of an image, float32 [B, GREY * GREY], of length 1.

    The pixels that orientations exchange are sorted. Sorting brings vectors closer and never apart: copies are at
    least as similar as their pixels in the best orientation.
    """
    values = standardised(grey)
    result = np.empty_like(values)
    for size in np.unique(_ORBIT_SIZES):
        places = np.stack([orbit for orbit in _ORBITS if len(orbit) == size])
        result[:, places.reshape(-1)] = np.sort(values[:, places], axis=2).reshape(len(values), -1)
    return torch.from_numpy(result)


def orientations(grey: npt.NDArray[Pixel]) -> Iterator[npt.NDArray[Pixel]]:
    """Grey copies [B, GREY, GREY], or numbers of their pixels, in the eight orientations."""
    for mirrored in (grey, grey[:, :, ::-1]):
        for quarter in range(4):
            yield np.rot90(mirrored, quarter, axes=(1, 2))


def _verified(pairs: Pairs, grey: npt.NDArray[np.uint8], threshold: float) -> Pairs:
    """The pairs whose pixels correlate in one of the orientations, with the largest correlation."""
    first, second, _ = pairs
    correlations = [np.empty(0, np.float32)]
    for start in range(0, len(first), CHUNK):
        left = standardised(grey[first[start : start + CHUNK]])
        right = grey[second[start : start + CHUNK]]
        best = np.max([(left * standardised(each)).sum(1) for each in orientations(right)], axis=0)
        correlations.append(best)
    values = np.clip(np.concatenate(correlations), 0, 1)
    keep = values >= threshold
    return first[keep], second[keep], values[keep]


def _orbits() -> list[npt.NDArray[np.int64]]:
    """Places of a grey copy that the orientations exchange."""
    places = np.arange(GREY * GREY).reshape(1, GREY, GREY)
    moved = np.stack([each.reshape(-1) for each in orientations(places)], axis=1)
    return [np.unique(row) for row in np.unique(np.sort(moved, axis=1), axis=0)]


_ORBITS = _orbits()
_ORBIT_SIZES = np.array([len(orbit) for orbit in _ORBITS])
