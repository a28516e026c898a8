"""``sweep.json``: the scores of all trials, the best one, and how far it may be luck."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from job.model.spec import TaskName
from job.sweep.trials import MOST_FOLDS, MOST_TRIALS, ClassWeights

FILE = "sweep.json"
FORMAT = 1
"""Version of the file."""

Text = Annotated[str, Meta(max_length=65_536)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]


class TrialResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One trial.

    Attributes:
        backbone: architecture.
        lr: initial learning rate of AdamW.
        weight_decay: of AdamW.
        hidden: widths of the hidden layers.
        label_smoothing: label smoothing.
        class_weights: "none" or "balanced".
        dropout: of the inputs of each linear layer.
        folds: score per fold; null where the head has diverged.
        mean: of the folds.
        standard_error: of the mean.
        loss: cross-entropy, mean of the folds.
    """

    backbone: Text
    lr: float
    weight_decay: float
    hidden: Annotated[list[int], Meta(max_length=64)]
    label_smoothing: float
    class_weights: ClassWeights
    dropout: float
    folds: Annotated[list[float | None], Meta(max_length=MOST_FOLDS)]
    mean: float | None
    standard_error: float | None
    loss: float | None


class LuckResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the best score may be luck; see :class:`~job.sweep.scores.Luck`."""

    standard_error: float
    expected: float
    trials: Count
    within: Count


class SweepResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of the file.

    Attributes:
        task: of the model.
        metric: name of the scores.
        trials: best first.
        luck: None for fewer than two trials.
        validation: metrics of the first trial, trained on all training images, on the validation images.
        checkpoint: file name of its checkpoint, below ``checkpoints``.
        folds: folds of the cross-validation.
        epochs: epochs per head.
        batch_size: samples per step.
        train_images: number of training images.
        validation_images: number of validation images.
        repeated_images: training images whose features another one has, too.
        classes: number of classes.
        seconds: time of the sweep, with that of the features.
        format: version of this file.
    """

    task: TaskName
    metric: Literal["accuracy", "mAP"]
    trials: Annotated[list[TrialResult], Meta(min_length=1, max_length=MOST_TRIALS)]
    luck: LuckResult | None
    validation: dict[Text, float | None]
    checkpoint: Text
    folds: Count
    epochs: Count
    batch_size: Count
    train_images: Count
    validation_images: Count
    repeated_images: Count
    classes: Count
    seconds: float
    format: int = FORMAT
