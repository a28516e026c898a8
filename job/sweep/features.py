"""Features and targets of the images that a sweep trains and validates heads with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job.data.datamodule import ImageDataModule
from job.data.dataset import Preprocessing
from job.errors import ConfigError
from job.features.extract import ExtractionSettings, Features, features_of
from job.model.classifier import Classifier
from job.sweep.heads import Targets, class_weights_of

DEVICE_SHARE = 0.5
"""Share of an accelerator's free memory that features may take; larger ones stay in host memory."""


class FeatureRows:
    """Features of one part, as :class:`~job.sweep.heads.Rows`.

    Args:
        variants: float32 [V, N, F], one variant per augmentation.
        plain: float32 [N, F], of the images as validation sees them.
        preprocessing: chooses the variant of an epoch.
        seed: of this choice.
        device: that computes.
    """

    def __init__(
        self,
        variants: npt.NDArray[np.float32],
        plain: npt.NDArray[np.float32],
        preprocessing: Preprocessing,
        seed: int,
        device: torch.device,
    ) -> None:
        self._variants, self._plain = _tensor(variants), _tensor(plain)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if variants.nbytes + plain.nbytes < DEVICE_SHARE * free:
                self._variants, self._plain = self._variants.to(device), self._plain.to(device)
        self._preprocessing, self._seed = preprocessing, seed
        self._chosen: dict[int, npt.NDArray[np.int32]] = {}

    @property
    def plain(self) -> Tensor:
        """Features of the images as validation sees them, float32 [N, F]."""
        return self._plain

    def __len__(self) -> int:
        return len(self._plain)

    def rows(self, samples: npt.NDArray[np.int64], epoch: int | None) -> Tensor:
        """Features of some samples; see :meth:`job.sweep.heads.Rows.rows`."""
        chosen = torch.from_numpy(samples).to(self._plain.device)
        if epoch is None:
            return self._plain[chosen]
        if len(self._variants) == 1:
            return self._variants[0, chosen]
        numbers = torch.from_numpy(self._variants_of(epoch)[samples]).long()
        return self._variants[numbers.to(chosen.device), chosen]

    def _variants_of(self, epoch: int) -> npt.NDArray[np.int32]:
        """The variant of every sample in an epoch, as a fit chooses it."""
        if epoch not in self._chosen:
            numbers = (self._preprocessing.variant(self._seed, epoch, sample) for sample in range(len(self)))
            self._chosen[epoch] = np.fromiter(numbers, np.int32, len(self))
        return self._chosen[epoch]


@dataclass(frozen=True)
class PartFeatures:
    """Features and targets of one part.

    Attributes:
        rows: features.
        targets: of the same samples.
    """

    rows: FeatureRows
    targets: Targets


def part_features(
    net: Classifier, data: ImageDataModule, part: str, settings: ExtractionSettings, device: torch.device
) -> PartFeatures:
    """Compute the features of a part by a backbone, or find them; called on all ranks.

    Raises:
        ConfigError: the training images have an unlimited number of variants.
        DataError: images cannot be read.
    """
    index, plain = data.parts[part], data.preprocessing("val")
    preprocessing = data.preprocessing(part)
    if preprocessing.variants is None:
        raise ConfigError(
            "--data.augment draws new variants without limit, and a sweep trains on cached features. Limit the "
            "variants by --data.augment_views=4, or leave out --data.augment."
        )
    features = features_of(net, index, preprocessing, settings, seed=data.seed, cache=data.cache)
    values = features.values
    if preprocessing.augment is not None:
        values = features_of(net, index, plain, settings, seed=data.seed, cache=data.cache).values
    data.report_bad(features.bad)
    rows = FeatureRows(features.variants, values, preprocessing, data.seed, device)
    return PartFeatures(rows, _targets(features, net).to(device))


def _targets(features: Features, net: Classifier) -> Targets:
    """Labels and class weights."""
    index, classes = features.index, len(net.classes)
    values = torch.from_numpy(features.labels.astype(np.int64))
    if net.task == "multilabel":
        if index.has_several_labels:
            values = torch.from_numpy(index.multi_hot_of(np.arange(len(index)))).float()
        else:
            values = torch.nn.functional.one_hot(values.clamp(min=0), classes).float()
    valid = torch.from_numpy(np.array(features.valid))
    return Targets(values, valid, classes, class_weights_of(values, classes))


def _tensor(values: npt.NDArray[np.float32]) -> Tensor:
    """A tensor of the same memory, which is never written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)
