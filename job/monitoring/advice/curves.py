"""Advice from the curves of loss and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from job.monitoring.advice.context import Advice, Context
from job.monitoring.advice.statistics import bounds, rise
from job.monitoring.history import ValidationRecord

SCORES = ("val/accuracy", "val/mAP")
"""The metric by which a validation is compared with others: the first of these that it has."""

STANDING_STILL = 0.01
"""Gain in accuracy below which it stands still: a percentage point."""

FAR_APART = 0.10
"""Difference in accuracy, reported from this value on if it is significant."""

LOW_KAPPA = 0.40
"""Share of the way from guessing to perfect accuracy below which a model is poor: an agreement by Cohen's kappa below
0.4 is "fair" at most (Landis & Koch, 1977)."""

MATURE = 2 / 3
"""Share of a run after which its accuracy can be judged."""

EARLY_VALIDATIONS = 5
"""First validations in which a high loss is that of the learning rate, and not of overfitting."""

ABOVE_GUESSING, AS_GUESSING = 1.25, 0.9
"""Loss, relative to that of guessing, from which on training has diverged, and down to which nothing is learnt."""

HARDLY_FALLS, HARDLY_FALLS_VALIDATIONS = 0.02, 4
"""Relative fall of the loss, and validations in which a loss that falls less hardly falls at all."""


def learning_rate(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """A learning rate that is too high, at the start or after unfreezing, or too low."""
    return _fallen(history, context) or _too_high(history, context) or _too_low(history, context)


def _too_high(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """The first losses are above that of guessing, twice in a row."""
    latest = history[-2:]
    if len(latest) < 2 or len(history) > EARLY_VALIDATIONS or context.has_several_labels:
        return None
    guessing = _uniform_loss(context)  # of a network that has not begun to learn how frequent classes are
    losses, accuracies = _values(latest, "val/loss"), _values(latest, "val/accuracy")
    if len(losses) < 2 or min(losses) < ABOVE_GUESSING * guessing or not all(_is_low(a, context) for a in accuracies):
        return None
    return Advice(
        "learning_rate",
        f"The validation loss is {losses[-1]:.3g} after epoch {latest[-1].epoch}; guessing has {guessing:.3g}.",
        f"The learning rate may be too high: lower --lr (it is {context.lr:.2g}), or find one by python -m job tune.",
    )


def _fallen(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """Accuracy is far below its best, twice in a row, and the loss has risen."""
    scored = [record for record in history if _score(record) is not None and _value(record, "val/loss") is not None]
    if len(scored) < 3 or context.has_several_labels:
        return None
    scores, losses = [_score(record) or 0.0 for record in scored], _values(scored, "val/loss")
    best = int(np.argmax(scores[:-2]))
    latest = max(scores[-2:])
    far = scores[best] - latest >= FAR_APART
    significant = bounds(scores[best], context.val_images).low > bounds(latest, context.val_images).high
    if not far or not significant or not losses[best] or min(losses[-2:]) < 1.5 * losses[best]:
        return None
    first, last = scored[best].epoch, scored[-1].epoch
    unfrozen = [m for m in context.milestones if first <= m < last]
    change = (
        f"Lower --model.backbone_lr_factor (it is {context.backbone_lr_factor:.2g}), the learning rate of the layers "
        f"that were unfrozen after epoch {unfrozen[-1]}."
        if unfrozen
        else f"Lower --lr (it is {context.lr:.2g}), or give a --trainer.gradient_clip_val."
    )
    return Advice(
        "learning_rate",
        f"Validation accuracy was {scores[best]:.3f} in epoch {first} and is {scores[-1]:.3f} in epoch {last}, at "
        f"{losses[-1] / losses[best]:.1f} times the loss.",
        change,
    )


def _too_low(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """The loss is that of guessing and hardly falls, while all layers train that the run trains."""
    if not history or context.next_milestone(history[-1].epoch) is not None:
        return None
    unfrozen = max((m for m in context.milestones if m < history[-1].epoch), default=0)
    history = [record for record in history if record.epoch > unfrozen]
    losses, accuracies = _values(history, "val/loss"), _values(history, "val/accuracy")
    if len(losses) < HARDLY_FALLS_VALIDATIONS or not accuracies or context.has_several_labels or not losses[0]:
        return None
    guessing = _guessing_loss(context)
    warming_up = _highest_lr(history[-1]) > _highest_lr(history[0])
    falls = 1 - min(losses[1:]) / losses[0]
    above_chance = bounds(accuracies[-1], context.val_images).low > _chance(context)
    if warming_up or falls >= HARDLY_FALLS or losses[-1] < AS_GUESSING * guessing or above_chance:
        return None
    if losses[-1] > ABOVE_GUESSING * _uniform_loss(context):
        return None
    return Advice(
        "learning_rate",
        f"The validation loss hardly falls: it was {losses[0]:.3g} and is {losses[-1]:.3g} after epoch "
        f"{history[-1].epoch}; guessing has {guessing:.3g}.",
        f"The learning rate may be too low: raise --lr (it is {context.lr:.2g}), or find one by python -m job tune. "
        "If no rate helps, look whether labels match their images.",
    )


def overfitting(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """Training accuracy is far above validation accuracy, twice in a row."""
    pairs = [
        (train, val)
        for record in history[-2:]
        if (train := _value(record, "train/accuracy")) is not None
        and (val := _value(record, "val/accuracy")) is not None
    ]
    # The accuracy on mixed images or equally frequent classes is that of another distribution.
    if len(pairs) < 2 or context.mixes_images or context.is_balanced:
        return None
    for train, val in pairs:
        significant = bounds(train, context.train_images).low > bounds(val, context.val_images).high
        if train - val < FAR_APART or not significant:
            return None
    changes = [] if context.has_augmentation else ["augmentation by --data.augment"]
    changes += [] if context.label_smoothing else ["--model.label_smoothing 0.1"]
    changes.append("weight decay (--model.optimizer torch.optim.AdamW --model.optimizer.weight_decay 0.05)")
    changes.append("later --model.milestones, which keep layers frozen for longer")
    train, val = pairs[-1]
    return Advice(
        "overfitting",
        f"Accuracy is {train:.3f} in training and {val:.3f} in validation (epoch {history[-1].epoch}): the model "
        "overfits.",
        f"Try {_listed(changes)}.",
    )


def rising_loss(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """Validation loss has risen since some epoch while accuracy stood still."""
    measured = [record for record in history if _value(record, "val/loss") is not None]
    position = rise(_values(measured, "val/loss"))
    if position is None or context.next_milestone(measured[-1].epoch) is not None:
        return None
    scores = [_score(record) for record in measured]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    gain = max(known[position + 1 :]) - max(known[: position + 1])
    if gain >= STANDING_STILL or max(known) - known[-1] >= FAR_APART:  # the latter is more than a rise of the loss
        return None
    lowest, last = measured[position], measured[-1]
    best = measured[int(np.argmax(known))].epoch
    change = (
        "Early stopping is on and will end the run"
        if context.early_stopping
        else "Stop early: the same command with --early_stopping 5 goes on with it"
    )
    return Advice(
        "rising_loss",
        f"Validation loss has risen since epoch {lowest.epoch} (from {_value(lowest, 'val/loss'):.3g} to "
        f"{_value(last, 'val/loss'):.3g} in epoch {last.epoch}) while accuracy stood still at {known[-1]:.3f}.",
        f"{change}. Epoch {best} was best, whose checkpoint predicts.",
    )


def head_past_best(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """The loss of a frozen backbone's head has risen, long before layers are unfrozen."""
    milestone = context.next_milestone(history[-1].epoch)
    measured = [record for record in history if _value(record, "val/loss") is not None]
    if milestone is None or milestone != context.milestones[0]:
        return None
    position = rise(_values(measured, "val/loss"))
    if position is None:
        return None
    best, last = measured[position], measured[-1]
    shift = milestone - best.epoch
    earlier = [best.epoch, *(max(m - shift, best.epoch) for m in context.milestones[1:])]
    return Advice(
        "head_past_best",
        f"The head was best in epoch {best.epoch}: since then its validation loss has risen from "
        f"{_value(best, 'val/loss'):.3g} to {_value(last, 'val/loss'):.3g}, and the backbone stays frozen until "
        f"epoch {milestone}.",
        f"In the next run, unfreeze earlier by --model.milestones [{','.join(map(str, earlier))}].",
    )


def underfitting(history: Sequence[ValidationRecord], context: Context) -> Advice | None:
    """Accuracy is low in training and in validation, late in the run."""
    last = history[-1]
    train, val = _value(last, "train/accuracy"), _value(last, "val/accuracy")
    if train is None or val is None or context.max_epochs is None or context.mixes_images or context.is_balanced:
        return None
    if len(history) < 3 or last.epoch < MATURE * context.max_epochs or context.next_milestone(last.epoch) is not None:
        return None
    losses = _values(history, "val/loss")
    guesses = not losses or losses[-1] >= AS_GUESSING * _guessing_loss(context)  # the learning rate's advice
    if guesses or not _is_low(val, context) or bounds(train, context.train_images).high >= _low_accuracy(context):
        return None
    changes = []
    if _values(history[-3:], "val/loss") == sorted(losses[-3:], reverse=True):
        changes.append(f"more epochs (--epochs, now {context.max_epochs}), since the loss still falls")
    if context.milestones and context.milestones[0] >= context.max_epochs:
        changes.append("unfreezing the backbone by --model.milestones within the run")
    changes += [f"a higher --lr (it is {context.lr:.2g})", "a larger --model.backbone"]
    return Advice(
        "underfitting",
        f"Accuracy is low in training ({train:.3f}) as well as in validation ({val:.3f}) after epoch {last.epoch} of "
        f"{context.max_epochs}.",
        f"The model underfits: try {_listed(changes)}.",
    )


def _value(record: ValidationRecord, name: str) -> float | None:
    return record.metrics.get(name)


def _values(records: Sequence[ValidationRecord], name: str) -> list[float]:
    return [value for record in records if (value := record.metrics.get(name)) is not None]


def _score(record: ValidationRecord) -> float | None:
    return next((value for name in SCORES if (value := record.metrics.get(name)) is not None), None)


def _highest_lr(record: ValidationRecord) -> float:
    return max(record.lr.values(), default=0.0)


def _chance(context: Context) -> float:
    """Accuracy of predicting always the most frequent class."""
    counts = context.class_counts
    return max(counts) / max(sum(counts), 1) if counts else 0.0


def _low_accuracy(context: Context) -> float:
    """Accuracy below which a model is poor, by :data:`LOW_KAPPA`."""
    chance = _chance(context)
    return chance + LOW_KAPPA * (1 - chance)


def _is_low(accuracy: float, context: Context) -> bool:
    return bounds(accuracy, context.val_images).high < _low_accuracy(context)


def _uniform_loss(context: Context) -> float:
    """Cross-entropy of a model that gives each class the same probability."""
    return math.log(max(len(context.class_counts), 2))


def _guessing_loss(context: Context) -> float:
    """Cross-entropy of a model that knows no more than how frequent classes are in training."""
    counts = [count for count in context.class_counts if count]
    if context.is_balanced or len(counts) < 2:
        return _uniform_loss(context)
    shares = np.asarray(counts, np.float64) / sum(counts)
    return float(-(shares * np.log(shares)).sum())


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
