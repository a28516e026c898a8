"""Scores of a cross-validation: per fold, their ranking, and how far the best one may be luck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from job.sweep.heads import HeadBatch, Rows, Targets

SCORES_ELEMENTS = 1 << 23
"""Scores of multi-label heads that are held at once: their order and their counts take 300 MB."""

ROUNDING = 1e-12
"""Scores whose difference is smaller are equal."""

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FoldScore:
    """The scores of a head on the samples that it has not trained on.

    Attributes:
        value: accuracy; mean average precision where images have several labels. NaN if it has diverged.
        loss: cross-entropy, unsmoothed.
    """

    value: float
    loss: float


def score_heads(batch: HeadBatch, features: Rows, targets: Targets, folds: npt.NDArray[np.int64]) -> list[FoldScore]:
    """Score every head of a batch on the fold that it leaves out, in the order of heads.

    Heads of one fold must be neighbours.
    """
    scores: list[FoldScore] = []
    numbers = [head.fold for head in batch.heads]
    start = 0
    while start < len(numbers):
        end = start + numbers[start:].count(numbers[start])
        samples = np.flatnonzero(folds == numbers[start])
        step = end - start
        if targets.several_labels:
            step = max(SCORES_ELEMENTS // max(len(samples) * targets.num_classes, 1), 1)
        for first in range(start, end, step):
            chosen = slice(first, min(first + step, end))
            score = _precision_scores if targets.several_labels else _accuracy_scores
            scores += score(batch, features, targets, samples, chosen)
        start = end
    return scores


def _accuracy_scores(
    batch: HeadBatch, features: Rows, targets: Targets, samples: npt.NDArray[np.int64], heads: slice
) -> list[FoldScore]:
    count = heads.stop - heads.start
    correct = torch.zeros(count, dtype=torch.float64, device=batch.device)
    loss, valid = correct.clone(), 0.0
    for logits, rows in batch.logits(features, samples, heads):
        labels, counts = targets.values[rows], targets.valid[rows]
        if targets.num_logits == 1:
            predicted = (logits[:, :, 0] > 0).long()
            losses = F.softplus(logits[:, :, 0] * (1 - 2 * labels[:, None]))
        else:
            predicted = logits.argmax(2)
            losses = logits.logsumexp(2) - logits.gather(2, labels[:, None, None].expand(-1, count, 1))[:, :, 0]
        correct += ((predicted == labels[:, None]) & counts[:, None]).sum(0)
        loss += (losses * counts[:, None]).sum(0, dtype=torch.float64)
        valid += float(counts.sum())
    return _scores(correct / max(valid, 1), loss / max(valid, 1))


def _precision_scores(
    batch: HeadBatch, features: Rows, targets: Targets, samples: npt.NDArray[np.int64], heads: slice
) -> list[FoldScore]:
    blocks = [
        (logits[targets.valid[rows]], rows[targets.valid[rows]])
        for logits, rows in batch.logits(features, samples, heads)
    ]
    logits, labels = torch.cat([block for block, _ in blocks]), targets.values[torch.cat([rows for _, rows in blocks])]
    losses = F.softplus(logits) - logits * labels[:, None]
    return _scores(mean_average_precision(logits, labels), losses.double().mean((0, 2)))


def mean_average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes of the average precision, float64 [K], as val/mAP has it.

    Args:
        scores: float [N, K, C].
        labels: multi-hot, [N, C]; a class without a positive sample does not count.
    """
    order = scores.argsort(0, descending=True)
    hits = labels[:, None].expand_as(scores).gather(0, order).double()
    places = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[:, None, None]
    positives = labels.sum(0).double()
    precision = (hits.cumsum(0) / places * hits).sum(0) / positives.clamp(min=1)
    counted = positives > 0
    return precision[:, counted].mean(1)


def _scores(values: Tensor, losses: Tensor) -> list[FoldScore]:
    pairs = zip(values.tolist(), losses.tolist(), strict=True)
    return [FoldScore(value if math.isfinite(loss) else math.nan, loss) for value, loss in pairs]


def ranking(values: Matrix, losses: Matrix) -> list[int]:
    """Numbers of the trials, best first: by mean score, equal ones by mean loss; diverged ones last.

    Args:
        values: [T, folds].
        losses: the same shape.
    """
    means, loss_means = values.mean(1), losses.mean(1)
    return sorted(
        range(len(values)),
        key=lambda trial: (
            math.isnan(means[trial]),
            0.0 if math.isnan(means[trial]) else -round(means[trial], 9),
            0.0 if math.isnan(loss_means[trial]) else loss_means[trial],
            trial,
        ),
    )


@dataclass(frozen=True)
class Luck:
    """How far the best score may be luck.

    Attributes:
        standard_error: of a trial's mean over the folds, from what neither trial nor fold explains.
        expected: by how much the best of so many trials exceeds their common mean, if all were equally good.
        trials: number of trials that have not diverged.
        within: trials whose mean is not further than ``expected`` below the best, the best included.
    """

    standard_error: float
    expected: float
    trials: int
    within: int


def luck_of(values: Matrix) -> Luck | None:
    """The luck in the best of several trials; None for fewer than two that have not diverged.

    Trials are scored on the same samples, so that a fold which is hard for all says nothing about a difference between
    them: the noise is the interaction of trial and fold, as in a two-way analysis of variance. Worse trials vary more:
    the noise is that of the better half. Trials that resemble one another have less luck than this, which supposes them
    independent.

    Args:
        values: scores, [T, folds]; NaN for diverged trials.
    """
    finite = values[np.isfinite(values).all(1)]
    if len(finite) < 2:
        return None
    means = finite.mean(1)
    better = finite[np.argsort(-means, kind="stable")[: max(len(finite) // 2, 2)]]
    residual = better - better.mean(1, keepdims=True) - better.mean(0, keepdims=True) + better.mean()
    residual[np.abs(residual) < ROUNDING] = 0.0
    rows, folds = better.shape
    error = math.sqrt(float((residual**2).sum()) / ((rows - 1) * (folds - 1)) / folds)
    expected = error * expected_maximum(len(finite))
    return Luck(error, expected, len(finite), int((means >= means.max() - expected - ROUNDING).sum()))


def expected_maximum(count: int) -> float:
    """Mean of the largest of ``count`` standard normal numbers (Blom, 1958)."""
    return NormalDist().inv_cdf((count - math.pi / 8) / (count - math.pi / 4 + 1)) if count > 1 else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of a trial's scores, over its folds."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
