"""The images of all parts as one sequence, with their features."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job.data.index.index import Index
from job.features.extract import Features

ROWS = 1 << 16
"""Samples whose names or labels are looked up together."""


class ImagePool:
    """The images of all parts: the sample ids of a part follow those of the one before it.

    Args:
        features: of each part, by its name.

    Attributes:
        parts: names of the parts.
        labels: int64 [N], class numbers; -1 where there is none, or any number of them.
        valid: bool [N]; False for an unreadable image.
        classes: names of the classes.
    """

    def __init__(self, features: Mapping[str, Features]) -> None:
        self.features = dict(features)
        self.parts = tuple(features)
        self._starts = [0, *itertools.accumulate(len(each) for each in features.values())]
        self.labels = np.concatenate([each.labels for each in features.values()])
        self.valid = np.concatenate([each.valid for each in features.values()])
        self.classes = next(iter(features.values())).classes

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def width(self) -> int:
        """Number of features per image."""
        return int(next(iter(self.features.values())).values.shape[1])

    @property
    def has_several_labels(self) -> bool:
        """Whether images have any number of labels."""
        return any(each.index.has_several_labels for each in self.features.values())

    def indexes(self) -> dict[str, Index]:
        """The index of each part."""
        return {part: each.index for part, each in self.features.items()}

    def part_of(self, sample: int) -> tuple[str, int]:
        """(part, sample id in its index)."""
        number = bisect.bisect_right(self._starts, sample) - 1
        return self.parts[number], sample - self._starts[number]

    def part_numbers(self) -> npt.NDArray[np.int64]:
        """Number of the part of each image, int64 [N]."""
        return np.repeat(np.arange(len(self.parts)), np.diff(self._starts))

    def samples_of(self, part: str) -> range:
        """The samples of a part."""
        number = self.parts.index(part)
        return range(self._starts[number], self._starts[number + 1])

    def rows(self, samples: npt.NDArray[np.int64], epoch: int | None = None) -> Tensor:
        """Features of some samples, float32 [len(samples), F]; the same in each epoch."""
        values = np.empty((len(samples), self.width), np.float32)
        for part, chosen, own in self._by_part(samples):
            values[chosen] = self.features[part].values[own]
        return torch.from_numpy(values)

    def uris(self, samples: npt.NDArray[np.int64]) -> list[str]:
        """URIs of some samples, in the given order."""
        uris = np.empty(len(samples), object)
        for part, chosen, own in self._by_part(samples):
            uris[chosen] = self.features[part].uris(own.tolist())
        return [str(uri) for uri in uris]

    def multi_hot_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """uint8 [len(samples), C]: 1 for each label of some samples; a single label counts, too."""
        targets = np.zeros((len(samples), len(self.classes)), np.uint8)
        for part, chosen, own in self._by_part(samples):
            index = self.features[part].index
            if index.has_several_labels:
                targets[chosen] = index.multi_hot_of(own)
            else:
                labelled = np.flatnonzero(index.labels[own] >= 0)
                targets[chosen[labelled], index.labels[own][labelled]] = 1
        return targets

    def rarest_labels(self) -> npt.NDArray[np.int64]:
        """The class of each image that the fewest images of its part have, int64 [N]; -1 where there is none."""
        return np.concatenate([each.index.rarest_labels().astype(np.int64) for each in self.features.values()])

    def label_names(self, samples: npt.NDArray[np.int64]) -> list[list[str]]:
        """Class names of some samples, in the given order."""
        if not self.has_several_labels:
            return [[self.classes[label]] if label >= 0 else [] for label in self.labels[samples].tolist()]
        names: list[list[str]] = []
        for start in range(0, len(samples), ROWS):
            targets = self.multi_hot_of(samples[start : start + ROWS])
            names += [[self.classes[number] for number in np.flatnonzero(row)] for row in targets]
        return names

    def label_keys(self, samples: npt.NDArray[np.int64]) -> Sequence[tuple[str, ...]]:
        """The labels of some samples, to be compared; empty where there is none."""
        return [tuple(names) for names in self.label_names(samples)]

    def _by_part(
        self, samples: npt.NDArray[np.int64]
    ) -> list[tuple[str, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """(part, places in ``samples``, sample ids in its index) for each part that has some."""
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        return [
            (self.parts[number], chosen, samples[chosen] - self._starts[number])
            for number in np.unique(numbers).tolist()
            for chosen in [np.flatnonzero(numbers == number)]
        ]
