"""Scores of each class, all or histograms, from which AUROC, average precision, thresholds and curves follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from job.model.evaluation import ScoreHistograms

BINS, FEWEST_BINS = 2048, 128
LOG_ODDS = 16.0
"""Bins have equal widths in log-odds from -16 to 16, beyond which float32 rounds a probability to 0 or 1."""

MOST_COUNTS = 1 << 23
"""Counts of a histogram of all classes, 32 MiB, up to which each class has :data:`BINS`."""

EXACT_CLASSES, EXACT_SAMPLES = 100, 50_000
"""Sizes up to which all probabilities are kept, 20 MB at the limits."""

DEFAULT_THRESHOLD = 0.5
"""Threshold of a class that validation has no positive sample of."""

Floats = npt.NDArray[np.float64]


class Ranking(NamedTuple):
    """The samples of one class by descending score, in groups of equal scores or of neighbouring ones.

    Attributes:
        positives: positive samples per group.
        negatives: negative samples per group.
        lowest: lowest score of each group.
        highest: highest score of each group.
    """

    positives: Floats
    negatives: Floats
    lowest: Floats
    highest: Floats

    def average_precision(self) -> float:
        """Sum over the groups of (recall gained * precision), as scikit-learn's; NaN without positive samples."""
        positives, predicted = self.positives.cumsum(), (self.positives + self.negatives).cumsum()
        total = self.positives.sum()
        return float((self.positives * positives / predicted).sum() / total) if total else float("nan")

    def auroc(self) -> float:
        """Share of the pairs of a positive and a negative sample that are in order; one half for those of one group.

        NaN without positive or without negative samples.
        """
        pairs = self.positives.sum() * self.negatives.sum()
        below = self.negatives.sum() - self.negatives.cumsum()
        return float((self.positives * (below + self.negatives / 2)).sum() / pairs) if pairs else float("nan")

    def auroc_error(self) -> float:
        """Largest difference from the AUROC of the scores themselves, where a group is one of neighbouring scores."""
        pairs = self.positives.sum() * self.negatives.sum()
        return float((self.positives * self.negatives).sum() / (2 * pairs)) if pairs else float("nan")

    def average_precision_error(self) -> float:
        """Largest difference from the average precision of the scores themselves, as of :meth:`auroc_error`."""
        samples, total = self.positives + self.negatives, self.positives.sum()
        return float((self.positives * samples / samples.cumsum()).sum() / total) if total else float("nan")

    def best_threshold(self) -> float:
        """The threshold of the highest F1, in the middle between two groups; the default without positive samples."""
        total = self.positives.sum()
        if not total:
            return DEFAULT_THRESHOLD
        positives, predicted = self.positives.cumsum(), (self.positives + self.negatives).cumsum()
        best = int(np.argmax(2 * positives / (predicted + total)))
        below = self.highest[best + 1] if best + 1 < len(self.highest) else 0.0
        return float((self.lowest[best] + below) / 2)

    def confusion(self, threshold: float) -> list[list[int]]:
        """[[true negatives, false positives], [false negatives, true positives]] at a threshold.

        A group that a threshold of other data divides is taken whole: predicted if its middle is.
        """
        predicted = (self.lowest + self.highest) / 2 >= threshold
        positives, negatives = int(self.positives[predicted].sum()), int(self.negatives[predicted].sum())
        return [
            [int(self.negatives.sum()) - negatives, negatives],
            [int(self.positives.sum()) - positives, positives],
        ]


class CollectedScores(Metric):
    """All probabilities and labels, from which metrics are exact."""

    full_state_update = False
    probabilities: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_classes: int, *, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.num_classes = num_classes
        for name in ("probabilities", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add samples: probabilities float [N, C]; labels int64 [N], or multi-hot, uint8 [N, C]."""
        self.probabilities.append(probabilities)
        self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Probabilities and labels of all ranks."""
        # On XLA what was summed over ranks lies on the chips.
        return dim_zero_cat(self.probabilities).cpu(), dim_zero_cat(self.labels).cpu()

    def rankings(self) -> Iterator[Ranking]:
        """The ranking of each class, in groups of equal scores, so that its metrics are exact."""
        probabilities, labels = (tensor.numpy() for tensor in self._samples())
        for number, scores in enumerate(probabilities.T):
            positive = labels[:, number] > 0 if labels.ndim == 2 else labels == number
            groups, members = np.unique(-scores.astype(np.float64), return_inverse=True)
            positives = np.bincount(members[positive], minlength=len(groups)).astype(np.float64)
            negatives = np.bincount(members[~positive], minlength=len(groups)).astype(np.float64)
            yield Ranking(positives, negatives, -groups, -groups)

    def histograms(self) -> ScoreHistograms:
        """Histograms of each class's scores."""
        return self._binned().histograms()

    def pooled(self) -> ScoreHistograms:
        """Histograms of the scores of all classes together."""
        return self._binned().pooled()

    def _binned(self) -> BinnedScores:
        binned = BinnedScores(self.num_classes, sync_on_compute=False)
        binned.update(*self._samples())
        return binned

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Probabilities [N, C] and labels [N] or [N, C]: torchmetrics squeezes the tensors of a single sample."""
        probabilities, labels = self.compute()
        probabilities = probabilities.reshape(-1, self.num_classes)
        has_several = labels.numel() == probabilities.numel() and labels.dtype == torch.uint8
        return probabilities, labels.reshape(-1, self.num_classes) if has_several else labels.reshape(-1)


class BinnedScores(Metric):
    """Histograms of the log-odds of positive and negative samples, whose memory does not grow with their number.

    A bin counts as a group of equal scores. So the average precision of a class differs from the exact one by at most
    the mean, over the positive samples, of the share that the sample's bin has of all samples scored as high or higher,
    and AUROC by at most half the share of pairs of a positive and a negative sample that are in one bin. Both bounds
    are computed with the metrics (:meth:`Ranking.auroc_error`, :meth:`Ranking.average_precision_error`): about 1e-3
    unless most scores of a class are equal. Thresholds lie between bins, 1/64 apart in log-odds, which resolve the
    small probabilities of many classes.

    Above 4,096 classes bins are 2, 4, 8 or 16 times as wide, and both bounds grow by that factor. So each of the two
    histograms takes at most 32 MiB up to 65,536 classes.
    """

    full_state_update = False
    positives: Tensor
    every: Tensor

    def __init__(self, num_classes: int, *, sync_on_compute: bool) -> None:
        super().__init__(sync_on_compute=sync_on_compute, dist_sync_fn=_sum_over_ranks)
        self.num_classes = num_classes
        self.bins = bins_of(num_classes)
        for name in ("positives", "every"):
            self.add_state(name, torch.zeros(num_classes, self.bins, dtype=torch.int32), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add samples: probabilities float [N, C]; labels int64 [N], or multi-hot, uint8 [N, C]."""
        places = _bins(probabilities.float(), self.bins)
        places += torch.arange(self.num_classes, dtype=torch.int32) * self.bins
        own = places[labels > 0] if labels.ndim == 2 else places.gather(1, labels[:, None])
        # Class by class, whose histogram stays in the processor's cache.
        for counts, indices in ((self.every, places.t().flatten()), (self.positives, own.flatten())):
            # bincount would allocate all of a histogram for each batch.
            counts.view(-1).index_add_(0, indices, torch.ones(1, dtype=counts.dtype).expand(len(indices)))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Histograms of the positive and of all samples of all ranks, int32 [C, bins]."""
        # On XLA what was summed over ranks lies on the chips.
        return self.positives.cpu(), self.every.cpu()

    def rankings(self) -> Iterator[Ranking]:
        """The ranking of each class, in groups of one bin."""
        edges = 1 / (1 + np.exp(-np.linspace(-LOG_ODDS, LOG_ODDS, self.bins + 1)))
        lowest, highest = edges[:-1][::-1], edges[1:][::-1]
        for counts in zip(*(tensor.numpy() for tensor in self.compute()), strict=True):
            positives, samples = (each[::-1] for each in counts)
            filled = np.flatnonzero(samples)
            hits = positives[filled].astype(np.float64)
            yield Ranking(hits, samples[filled] - hits, lowest[filled], highest[filled])

    def histograms(self) -> ScoreHistograms:
        """Histograms of each class's scores."""
        positives, samples = (each.numpy().astype(np.int64) for each in self.compute())
        return ScoreHistograms(positives, samples - positives, _lowest(self.bins))

    def pooled(self) -> ScoreHistograms:
        """Histograms of the scores of all classes together."""
        positives, samples = (each.numpy().sum(0, np.int64, keepdims=True) for each in self.compute())
        return ScoreHistograms(positives, samples - positives, _lowest(self.bins))


def make_scores(num_classes: int, samples: int, *, sync_on_compute: bool) -> CollectedScores | BinnedScores:
    """All scores of a data set of this size, or histograms of them where it is large."""
    exact = num_classes <= EXACT_CLASSES and samples <= EXACT_SAMPLES
    return (CollectedScores if exact else BinnedScores)(num_classes, sync_on_compute=sync_on_compute)


def bins_of(num_classes: int) -> int:
    """Bins of each class: :data:`BINS`, or fewer by a power of two where there are many classes."""
    bins = BINS
    while bins > FEWEST_BINS and bins * num_classes > MOST_COUNTS:
        bins //= 2
    return bins


def _bins(probabilities: Tensor, bins: int) -> Tensor:
    """Bin of each probability, int32 of the same shape, from 0 to ``bins`` - 1; NaN counts as one half."""
    log_odds = torch.logit(probabilities, eps=1e-30)
    return log_odds.mul_(bins / (2 * LOG_ODDS)).add_(bins / 2).nan_to_num_(bins / 2).clamp_(0, bins - 1).int()


def _lowest(bins: int) -> Floats:
    """Lowest probability of each bin; the first one has everything below, too."""
    lowest = 1 / (1 + np.exp(-np.linspace(-LOG_ODDS, LOG_ODDS, bins + 1)[:-1]))
    lowest[0] = 0.0
    return lowest


def _sum_over_ranks(counts: Tensor, group: Any = None) -> list[Tensor]:
    """The sum over all ranks, as the only element of a list that torchmetrics sums; a collective operation.

    torchmetrics gathers the histograms of all ranks: memory that grows with their number.
    """
    if dist.get_backend(group) == "xla":
        return gather_all_tensors(counts, group)
    total = counts.clone()  # the state of this rank is restored after the computation
    dist.all_reduce(total, group=group)
    return [total]
