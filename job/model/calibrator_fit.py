"""Fits a :class:`~job.model.calibrator.Calibrator` to validation logits, and measures it on logits unknown to it.

All is computed by NumPy in float64 on one thread, so that the same logits always give the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job.model.calibrator import HIGHEST_SCALE, LOWEST_SCALE, MOST_OFFSET, Calibrator
from job.model.evaluation import CALIBRATION_BINS, Calibration, CalibratorFit
from job.model.selective import risk_coverage

LEAST_SAMPLES = 50
"""Validation samples, of which 40 fit the calibrator of a fold."""
LEAST_OF_CLASS = 10
"""Samples with, and without, a class whose logits Platt scaling transforms."""
FOLDS = 5
NUMBERS_AT_ONCE = 1 << 18
"""Logits that are converted to float64 at once, so that memory does not grow with their number."""
MOST_STEPS = 100
MOST_HALVINGS = 20
TOLERANCE = 1e-8

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]


def fit_temperature(logits: Logits, labels: Labels) -> CalibratorFit:
    """Fit a temperature by the cross-entropy of the labels.

    Where no temperature helps, it is 1, and the reason says why.

    Args:
        logits: [N, num_logits]; one logit is that of the second of two classes.
        labels: class numbers, [N].
    """
    if (reason := _unusable(logits)) is not None:
        return CalibratorFit(None, reason, len(labels))
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    whole = _Cross(logits, labels.astype(np.int64))
    before = whole.evaluated(np.ones(len(labels)))
    unchanged = Calibrator("temperature", len(labels), risk_coverage=risk_coverage(before.confidences, before.correct))
    fit = CalibratorFit(unchanged, "", len(labels), before.diagram())
    if before.correct.all():
        return fit.without("all validation predictions are right, so that their confidence is not too high")
    if not before.correct.any():
        return fit.without("all validation predictions are wrong")
    inverse = _inverse_temperature(whole)
    if inverse is None:
        return fit.without(
            f"the confidence of predictions does not follow their accuracy: no temperature from {LOWEST_SCALE} to "
            f"{HIGHEST_SCALE:.0f} fits"
        )
    folds = _folds(len(labels))
    inverses = np.empty(len(labels))
    for fold in range(FOLDS):
        rest = _Cross(logits[folds != fold], labels[folds != fold].astype(np.int64))
        # None at a bound, as of a fold whose training part has no wrong prediction: the loss below shows it.
        inverses[folds == fold] = _inverse_temperature(rest, start=inverse) or 1 / LOWEST_SCALE
    after = whole.evaluated(inverses)
    if after.losses.mean() >= before.losses.mean():
        return fit.without(
            f"a temperature (of {1 / inverse:.3f}) does not lower the loss of validation images that it was not "
            "fitted to"
        )
    curve = risk_coverage(after.confidences, after.correct)
    calibrator = Calibrator("temperature", len(labels), temperature=1 / inverse, risk_coverage=curve)
    return fit.with_calibrator(calibrator, after.diagram())


def fit_platt(logits: Logits, labels: Labels) -> CalibratorFit:
    """Fit scale and offset of each class by the binary cross-entropy of its labels.

    A class keeps its logits where it has too few samples, or where the fit does not lower the loss of samples that it
    was not fitted to. Targets are smoothed as Platt's, and the steps are those of Lin, Lin and Weng, "A note on Platt's
    probabilistic outputs for support vector machines" (2007).

    Args:
        logits: [N, C].
        labels: multi-hot, [N, C].
    """
    if (reason := _unusable(logits)) is not None:
        return CalibratorFit(None, reason, len(labels))
    targets: Bools = labels > 0
    count, classes = logits.shape
    identity = np.stack([np.ones(classes), np.zeros(classes)])
    before = np.broadcast_to(identity[:, None], (2, count, classes))
    losses_before, diagram_before = _decisions(logits, targets, before)
    fit = CalibratorFit(None, "", count, diagram_before)
    positives = targets.sum(axis=0)
    usable = (positives >= LEAST_OF_CLASS) & (count - positives >= LEAST_OF_CLASS)
    if not usable.any():
        return fit.without(f"no class has {LEAST_OF_CLASS} validation images with it, and as many without it")
    chosen = np.flatnonzero(usable)
    pairs = identity.copy()
    pairs[:, chosen] = _platt(logits[:, chosen], targets[:, chosen])
    folds = _folds(count)
    crossed = np.array(before)
    for fold in range(FOLDS):
        rest, held = folds != fold, folds == fold
        fitted = _platt(logits[rest][:, chosen], targets[rest][:, chosen], start=pairs[:, chosen])
        crossed[:, np.ix_(held, chosen)[0], chosen] = fitted[:, None]
    losses_after, _ = _decisions(logits, targets, crossed)
    helps = usable & (losses_after < losses_before) & _is_within_bounds(pairs)
    if not helps.any():
        return fit.without("Platt scaling lowers the loss of no class on validation images that it was not fitted to")
    pairs[:, ~helps] = identity[:, ~helps]
    crossed[:, :, ~helps] = identity[:, None, ~helps]
    _, diagram_after = _decisions(logits, targets, crossed)
    calibrator = Calibrator("platt", count, scale=pairs[0].tolist(), offset=pairs[1].tolist())
    return fit.with_calibrator(calibrator, diagram_after)


def _unusable(logits: Logits) -> str | None:
    if len(logits) < LEAST_SAMPLES:
        return f"{len(logits)} validation images are too few: {LEAST_SAMPLES} are needed"
    if not np.isfinite(logits).all():
        return "the network's outputs are not finite"
    return None


def _folds(count: int) -> npt.NDArray[np.int64]:
    """Fold of each sample; samples come in the order of their ids, in which neighbours are often alike."""
    return np.arange(count) % FOLDS


def _chunks(logits: Logits) -> Iterator[slice]:
    rows = max(NUMBERS_AT_ONCE // logits.shape[1], 1)
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


@dataclass(frozen=True)
class _Evaluated:
    """Loss, confidence and correctness of each sample."""

    losses: Floats
    confidences: Floats
    correct: Bools

    def diagram(self) -> Calibration:
        return _diagram(self.confidences, self.correct)


@dataclass(frozen=True)
class _Cross:
    """Cross-entropy of logits [N, C] and labels [N] under inverse temperatures."""

    logits: Logits
    labels: npt.NDArray[np.int64]

    def slope_and_curvature(self, inverse: float) -> tuple[float, float]:
        """First and second derivative of the mean cross-entropy by the inverse temperature, in which it is convex."""
        slope = curvature = 0.0
        for rows in _chunks(self.logits):
            centred = self._centred(rows)
            weights = np.exp(inverse * centred)
            weights /= weights.sum(axis=1, keepdims=True)
            mean = (weights * centred).sum(axis=1)
            slope += float((mean - self._own(centred, rows)).sum())
            curvature += float(((weights * centred * centred).sum(axis=1) - mean * mean).sum())
        return slope / len(self.labels), curvature / len(self.labels)

    def evaluated(self, inverses: Floats) -> _Evaluated:
        """Loss, confidence and correctness of each sample under its own inverse temperature."""
        losses, confidences = np.empty(len(self.labels)), np.empty(len(self.labels))
        for rows in _chunks(self.logits):
            scaled = self._centred(rows) * inverses[rows, None]
            total = np.exp(scaled).sum(axis=1)
            losses[rows] = np.log(total) - self._own(scaled, rows)
            confidences[rows] = 1 / total  # the largest of the centred logits is 0
        return _Evaluated(losses, confidences, self.logits.argmax(axis=1) == self.labels)

    def _centred(self, rows: slice) -> Floats:
        part = self.logits[rows].astype(np.float64)
        part -= part.max(axis=1, keepdims=True)
        return part

    def _own(self, values: Floats, rows: slice) -> Floats:
        own: Floats = np.take_along_axis(values, self.labels[rows, None], axis=1)[:, 0]
        return own


def _inverse_temperature(cross: _Cross, start: float = 1.0) -> float | None:
    """The minimum of a convex function, by Newton's method within a bracket that shrinks; None at its bounds."""
    low, high, inverse = 1 / HIGHEST_SCALE, 1 / LOWEST_SCALE, start
    for _ in range(MOST_STEPS):
        slope, curvature = cross.slope_and_curvature(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        following = inverse - slope / curvature if curvature > 0 else low
        if not low < following < high:
            following = (low * high) ** 0.5
        if abs(following - inverse) <= TOLERANCE * inverse:
            break
        inverse = following
    is_inside = 1.001 / HIGHEST_SCALE < inverse < 0.999 / LOWEST_SCALE
    return inverse if is_inside else None


def _platt(logits: Logits, labels: Bools, start: Floats | None = None) -> Floats:
    """Scale and offset of each class, [2, C], by Newton's method with step halving, of all classes together."""
    positives = labels.sum(axis=0).astype(np.float64)
    negatives = len(labels) - positives
    targets = np.stack([1 / (negatives + 2), (positives + 1) / (positives + 2)])
    pairs = np.stack([np.ones(logits.shape[1]), np.zeros(logits.shape[1])]) if start is None else start.copy()
    moving = np.arange(logits.shape[1])  # classes that have not converged
    for _ in range(MOST_STEPS):
        part = _Binary(logits[:, moving], labels[:, moving], targets[:, moving])
        following = part.stepped(pairs[:, moving])
        moves = np.abs(following - pairs[:, moving]) > TOLERANCE * np.maximum(np.abs(following), 1)
        pairs[:, moving] = following
        moving = moving[moves.any(axis=0)]
        if not len(moving):
            break
    return pairs


@dataclass(frozen=True)
class _Binary:
    """Binary cross-entropy of each class, summed over samples: logits and labels [N, C], smoothed targets [2, C]."""

    logits: Logits
    labels: Bools
    targets: Floats

    def stepped(self, pairs: Floats) -> Floats:
        """Scale and offset after one step, [2, C], at which no class has a higher loss."""
        following: Floats
        current, slope_a, slope_b, aa, ab, bb = self._derivatives(pairs)
        determinant = np.maximum(aa * bb - ab * ab, 1e-300)
        step = np.stack([bb * slope_a - ab * slope_b, aa * slope_b - ab * slope_a]) / determinant
        limit = current + 1e-12 * np.abs(current)  # rounding of the sums
        for _ in range(MOST_HALVINGS):
            following = pairs - step
            worse = ~(self._loss(following) <= limit)
            if not worse.any():
                return following
            step[:, worse] /= 2
        following[:, worse] = pairs[:, worse]
        return following

    def _loss(self, pairs: Floats) -> Floats:
        total = np.zeros(pairs.shape[1])
        for _, scaled, wanted in self._scaled(pairs):
            total += _loss(scaled, wanted)
        return total

    def _derivatives(self, pairs: Floats) -> Floats:
        """Loss, first derivatives by scale and offset, and second ones; [6, C]."""
        sums = np.zeros((6, pairs.shape[1]))
        for values, scaled, wanted in self._scaled(pairs):
            probabilities = _sigmoid(scaled)
            errors, weights = probabilities - wanted, probabilities * (1 - probabilities)
            sums[0] += _loss(scaled, wanted)
            terms = (errors * values, errors, weights * values * values, weights * values, weights)
            sums[1:] += np.stack([term.sum(axis=0) for term in terms])
        sums[[3, 5]] += 1e-12  # of a class whose weights round to 0
        return sums

    def _scaled(self, pairs: Floats) -> Iterator[tuple[Floats, Floats, Floats]]:
        for rows in _chunks(self.logits):
            values = self.logits[rows].astype(np.float64)
            yield values, values * pairs[0] + pairs[1], np.where(self.labels[rows], self.targets[1], self.targets[0])


def _loss(scaled: Floats, wanted: Floats | Bools) -> Floats:
    """Binary cross-entropy of each class, summed over samples, [C]."""
    total: Floats = (np.maximum(scaled, 0) + np.log1p(np.exp(-np.abs(scaled))) - wanted * scaled).sum(axis=0)
    return total


def _is_within_bounds(pairs: Floats) -> Bools:
    within: Bools = (pairs[0] >= LOWEST_SCALE) & (pairs[0] <= HIGHEST_SCALE) & (np.abs(pairs[1]) <= MOST_OFFSET)
    return within


def _decisions(logits: Logits, labels: Bools, pairs: Floats) -> tuple[Floats, Calibration]:
    """Sum of each class's losses, [C], and the diagram of all decisions at 0.5.

    Args:
        logits: [N, C].
        labels: [N, C].
        pairs: scale and offset of each sample and class, [2, N, C].
    """
    losses, confidence = np.zeros(logits.shape[1]), np.zeros(CALIBRATION_BINS)
    counts, correct = (np.zeros(CALIBRATION_BINS, np.int64) for _ in range(2))
    for rows in _chunks(logits):
        scaled = logits[rows].astype(np.float64) * pairs[0, rows] + pairs[1, rows]
        losses += _loss(scaled, labels[rows])
        part = _diagram(_sigmoid(np.abs(scaled)).ravel(), ((scaled >= 0) == labels[rows]).ravel())
        counts, confidence, correct = counts + part.counts, confidence + part.confidence, correct + part.correct
    return losses, Calibration(counts, confidence, correct)


def _sigmoid(values: Floats) -> Floats:
    # exp of a large number is infinite, and the result 0
    with np.errstate(over="ignore"):
        result: Floats = 1 / (1 + np.exp(-values))
    return result


def _diagram(confidences: Floats, correct: Bools) -> Calibration:
    bins = (confidences * CALIBRATION_BINS).astype(np.int64).clip(0, CALIBRATION_BINS - 1)
    return Calibration(
        np.bincount(bins, minlength=CALIBRATION_BINS),
        np.bincount(bins, confidences, CALIBRATION_BINS).astype(np.float64),
        np.bincount(bins[correct], minlength=CALIBRATION_BINS),
    )
