"""Search for images of the same content, such as the placeholder of a web server for images that are gone."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from job.data.fetch import Fetcher
from job.data.index.file import ROWS_PER_BATCH
from job.data.index.index import Index
from job.errors import DataError
from job.process.terminal import escape

MOST_ROWS = 1_000_000
"""Samples whose sizes are compared, from the first on."""

FEWEST, SMALLEST_SHARE = 20, 0.005
"""Images of one content that count as many, as a number and as a share."""

READ, SAME = 8, 6
"""Images of the most frequent size that are read, and how many of them must be the same."""

LONGEST_URI = 300
"""Characters of an example."""


@dataclass(frozen=True)
class RepeatedImages:
    """Images of the same content.

    Attributes:
        count: estimate of their number.
        total: images among which they are.
        size: of each, in bytes.
        examples: URIs of two of them.
    """

    count: int
    total: int
    size: int
    examples: tuple[str, ...]


def find_repeated_images(index: Index, cache_dir: str) -> RepeatedImages | None:
    """Many images of the same content, or None.

    Images of the most frequent size are candidates, and a few of them are read: sizes are in the index, contents are
    not.

    Args:
        index: of the images.
        cache_dir: local folder of copies of archives that cannot be read in parts.

    Raises:
        StorageError: they cannot be read.
    """
    batches = itertools.islice(index.batches(), -(-MOST_ROWS // ROWS_PER_BATCH))
    sizes = np.concatenate([np.empty(0, np.int64), *(batch.column("size").to_numpy() for batch in batches)])
    values, counts = np.unique(sizes[sizes > 0], return_counts=True)
    if not len(counts) or counts.max() < max(FEWEST, SMALLEST_SHARE * len(sizes)):
        return None
    candidates = np.flatnonzero(sizes == values[counts.argmax()])
    chosen = candidates[np.linspace(0, len(candidates) - 1, READ).astype(np.int64)]
    fetcher = Fetcher(index, cache_dir)
    samples: dict[tuple[bytes, int], list[int]] = {}
    for sample, fetched in zip(chosen.tolist(), fetcher.start(chosen).result(), strict=True):
        try:
            content = fetcher.content(fetched)
        except DataError:
            continue  # training reports it
        samples.setdefault((hashlib.sha256(content).digest(), len(content)), []).append(sample)
    (_, size), same = max(samples.items(), key=lambda item: len(item[1]), default=((b"", 0), []))
    if len(same) < SAME:
        return None
    count = round(len(candidates) * len(same) / READ * len(index) / len(sizes))
    examples = tuple(escape(index.uri(sample))[:LONGEST_URI] for sample in same[:2])
    return RepeatedImages(count, len(index), size, examples)
