"""Advice: each sick history gets exactly its kind, and healthy ones none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import cells_of

from job.data.repeated_images import RepeatedImages
from job.model.evaluation import CALIBRATION_BINS, Calibration, Evaluation
from job.monitoring.advice import Context, advise
from job.monitoring.advice.statistics import bounds, rise
from job.monitoring.history import ValidationRecord

IMAGES = 1000
CONTEXT = Context(class_counts=(500, 500), train_images=1000, val_images=IMAGES, max_epochs=20)
FALLING = [0.3 + 0.4 * 0.6**epoch for epoch in range(10)]
RISING = [0.5, 0.4, 0.35, 0.36, 0.40, 0.44, 0.47, 0.51, 0.56, 0.60]


def records(
    losses: Sequence[float],
    accuracies: float | Sequence[float] = 0.9,
    train: float | Sequence[float] | None = None,
    seconds: float = 100.0,
    **fields: Any,
) -> list[ValidationRecord]:
    """A validation per loss, after each epoch."""

    def at(values: float | Sequence[float], number: int) -> float:
        return values if isinstance(values, (int, float)) else values[number]

    return [
        ValidationRecord(
            epoch=number + 1,
            global_step=10 * (number + 1),
            metrics={
                "val/loss": loss,
                "val/accuracy": at(accuracies, number),
                **({} if train is None else {"train/accuracy": at(train, number)}),
            },
            lr={"head": 1e-3},
            seconds=seconds * (number + 1),
            **fields,
        )
        for number, loss in enumerate(losses)
    ]


def evaluation(
    confusion: Sequence[Sequence[int]] = ((450, 50), (50, 450)),
    confidences: float | np.ndarray = 0.9,
    seed: int = 0,
    correct: float | None = None,
) -> Evaluation:
    """A validation with this confusion matrix, calibrated unless ``correct``, the share of right ones, is given."""
    matrix = np.array(confusion)
    rng = np.random.default_rng(seed)
    values = np.broadcast_to(confidences, int(matrix.sum()))
    hits = rng.random(len(values)) < (values if correct is None else correct)
    bins = np.minimum((values * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    calibration = Calibration(
        np.bincount(bins, minlength=CALIBRATION_BINS).astype(np.int64),
        np.bincount(bins, values, minlength=CALIBRATION_BINS),
        np.bincount(bins, hits, minlength=CALIBRATION_BINS).astype(np.int64),
    )
    return Evaluation({}, cells_of(matrix), calibration)


HEALTHY = evaluation()


def kinds(
    history: list[ValidationRecord],
    found: Evaluation = HEALTHY,
    classes: Sequence[str] = ("cat", "dog"),
    **changes: Any,
) -> list[str]:
    return [each.kind for each in advise(history, found, classes, replace(CONTEXT, **changes))]


SICK: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "diverged at the start": (
        "learning_rate",
        {"history": records([5.0, 4.0], 0.5)},
        ["4 after epoch 2; guessing has 0.693", "lower --lr (it is 0.001)"],
    ),
    "falls after unfreezing": (
        "learning_rate",
        {
            "history": records([0.5, 0.3, 0.3, 0.9, 1.0], [0.8, 0.9, 0.9, 0.6, 0.55]),
            "milestones": (3,),
            "backbone_lr_factor": 0.1,
        },
        ["was 0.900 in epoch 2 and is 0.550 in epoch 5", "--model.backbone_lr_factor (it is 0.1)", "after epoch 3"],
    ),
    "falls without unfreezing": (
        "learning_rate",
        {"history": records([0.5, 0.3, 0.3, 0.9, 1.0], [0.8, 0.9, 0.9, 0.6, 0.55])},
        ["Lower --lr", "--trainer.gradient_clip_val"],
    ),
    "learns nothing": (
        "learning_rate",
        {"history": records([0.694, 0.693, 0.693, 0.6925], 0.51)},
        ["hardly falls", "python -m job tune", "labels match"],
    ),
    "overfits": (
        "overfitting",
        {"history": records(FALLING, 0.80, 0.99), "found": evaluation([[400, 100], [100, 400]], 0.8)},
        ["0.990 in training and 0.800 in validation", "--data.augment", "weight decay"],
    ),
    "loss rises": (
        "rising_loss",
        {"history": records(RISING)},
        ["since epoch 3 (from 0.35 to 0.6 in epoch 10)", "stood still at 0.900", "--early_stopping 5", "Epoch 1 was"],
    ),
    "loss rises with early stopping": (
        "rising_loss",
        {"history": records(RISING, [0.8, 0.85, 0.9, *[0.89] * 7]), "early_stopping": True},
        ["Early stopping is on", "Epoch 3 was best"],
    ),
    "head trains for too long": (
        "head_past_best",
        {"history": records(RISING), "milestones": (12, 16)},
        ["best in epoch 3", "frozen until epoch 12", "--model.milestones [3,7]"],
    ),
    "underfits": (
        "underfitting",
        {
            "history": records([0.68 - 0.005 * n for n in range(15)], 0.6, 0.62),
            "found": evaluation([[300, 200], [200, 300]], 0.6),
        },
        ["0.620", "0.600", "--epochs, now 20", "a higher --lr"],
    ),
    "stays frozen and underfits": (
        "underfitting",
        {
            "history": records([0.62] * 15, 0.6, 0.62),
            "found": evaluation([[300, 200], [200, 300]], 0.6),
            "milestones": (20,),
        },
        ["unfreezing the backbone by --model.milestones"],
    ),
    "overconfident": (
        "calibration",
        {"history": records(FALLING, 0.8), "found": evaluation([[400, 100], [100, 400]], 0.97, correct=0.8)},
        ["mean confidence is 0.970", "Of 1,000 predictions with a confidence of 90%", "--model.label_smoothing 0.1"],
    ),
    "underconfident with label smoothing": (
        "calibration",
        {"history": records(FALLING), "found": evaluation(confidences=0.7, correct=0.9), "label_smoothing": 0.4},
        ["underconfident", "Lower --model.label_smoothing"],
    ),
    "a class is never predicted": (
        "never_predicted",
        {
            "history": records(FALLING),
            "found": evaluation([[900, 0], [100, 0]], 0.9),
            "class_counts": (900, 100),
        },
        ["1 of 2 classes", "dog (100)", "--data.sampling balanced"],
    ),
    "a frequent class is never predicted": (
        "never_predicted",
        {"history": records(FALLING, 0.7), "found": evaluation([[700, 0], [300, 0]], 0.7)},
        ["confusion matrix"],
    ),
    "a rare class is seldom recognised": (
        "imbalance",
        {
            "history": records(FALLING),
            "found": evaluation([[890, 10], [60, 40]], 0.9),
            "class_counts": (1000, 90),
        },
        ["1 of 2 classes", "40% of theirs are recognised, of the others' 99%", "dog (90)", "--model.class_weights"],
    ),
    "the loader starves": (
        "data_wait",
        {"history": records(FALLING, data_wait=0.4), "num_workers": 2, "available_cpus": 8},
        ["40% of the time", "--data.num_workers to 8 (it is 2)"],
    ),
    "the cache is too small": (
        "data_wait",
        {"history": records(FALLING, data_wait=0.4), "data_bytes": 100 * 10**9, "cache_bytes": 10**10},
        ["--data.cache_gb to 105 (it is 10)"],
    ),
    "all CPUs decode": (
        "data_wait",
        {"history": records(FALLING, data_wait=0.4), "num_workers": 8, "available_cpus": 8},
        ["take more CPUs", "--data.image_size (it is 224)"],
    ),
    "placeholders": (
        "repeated_images",
        {"history": records(FALLING), "repeated_images": RepeatedImages(90, 320, 2051, ("a.jpg", "b.jpg"))},
        ["About 90 of 320", "2,051 bytes", "a.jpg, b.jpg"],
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_gets_exactly_its_advice(name: str) -> None:
    kind, run, words = SICK[name]
    assert kinds(**run) == [kind]
    history, found, classes = run["history"], run.get("found", HEALTHY), ("cat", "dog")
    context = replace(CONTEXT, **{key: value for key, value in run.items() if key not in ("history", "found")})
    (advice,) = advise(history, found, classes, context)
    text = f"{advice.message} {advice.suggestion}"
    assert all(word in text for word in words), text
    assert advice.message.endswith(".") and advice.suggestion.endswith(".")


@pytest.mark.parametrize(
    "run",
    [
        {"history": []},
        {"history": records([5.0], 0.5)},  # a first epoch alone, whose running statistics are young
        {"history": records([5.0, 0.5, 0.4], [0.5, 0.8, 0.9])},
        {"history": records([0.69, 0.60], 0.1), "class_counts": (900, 100)},  # above the entropy of the classes
        {"history": records(RISING, np.linspace(0.8, 0.9, 10).tolist())},  # accuracy rises with the loss
        {"history": records(RISING), "milestones": (5, 12), "max_epochs": 20},  # more layers will be unfrozen
        {"history": records([0.35, *RISING[3:7]])},  # not for long
        {"history": records(FALLING, 0.80, 0.99), "val_images": 30},
        {"history": records(FALLING, 0.80, 0.99), "mixes_images": True},
        {"history": records(FALLING, [0.8] * 9 + [0.98], 0.99)},
        {"history": records([0.68] * 5, 0.6, 0.62)},  # a quarter of the run
        {"history": records([0.694, 0.693, 0.693, 0.6925], 0.51), "has_several_labels": True},
        {"history": records(FALLING[:2]), "found": evaluation(confidences=0.97, correct=0.8)},
        {"history": records(FALLING), "found": evaluation([[20, 4], [4, 20]], 0.97, correct=0.8)},
        {"history": records(FALLING), "found": evaluation(confidences=0.7, correct=0.9)},  # still learning
        {"history": records(FALLING), "found": evaluation([[900, 0], [9, 0]], 0.9)},
        {"history": records(FALLING[:2]), "found": evaluation([[900, 0], [100, 0]], 0.9)},
        {"history": records(FALLING), "found": evaluation([[890, 10], [60, 40]], 0.9), "class_counts": (1000, 300)},
        {"history": records(FALLING), "found": evaluation([[890, 10], [1, 2]], 0.9), "class_counts": (1000, 9)},
        {
            "history": records(FALLING),
            "found": evaluation([[890, 10], [60, 40]], 0.9),
            "class_counts": (1000, 9),
            "is_balanced": True,
        },
        {"history": records(FALLING, seconds=1.0, data_wait=0.4)},
        {"history": records(FALLING, data_wait=0.4), "has_cached_features": True},
    ],
)
def test_too_little_is_no_reason_for_advice(run: dict[str, Any]) -> None:
    assert kinds(**run) == []


@pytest.mark.parametrize("losses", [[0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.9, 1.0], [0.5, 0.0, 0.3, 0.9, 1.0]])
def test_a_loss_of_zero_is_possible(losses: list[float]) -> None:
    for accuracy in (1.0, 0.5):
        assert "calibration" not in kinds(records(losses, accuracy))


def test_warm_up_is_no_low_learning_rate() -> None:
    still = records([0.694, 0.693, 0.693, 0.6925], 0.51)
    warming = [
        ValidationRecord(r.epoch, r.global_step, r.metrics, {"head": 1e-5 * 2**number})
        for number, r in enumerate(still)
    ]
    assert kinds(still) == ["learning_rate"]
    assert kinds(warming) == []


@given(
    seed=st.integers(0, 2**32 - 1),
    epochs=st.integers(1, 60),
    classes=st.sampled_from([2, 3, 10, 100]),
    val_images=st.sampled_from([20, 100, 1000, 20_000]),
    milestones=st.sampled_from([(), (5, 10), (0,), (1000,)]),
    skewed=st.booleans(),
)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_healthy_run_gets_no_advice(
    seed: int, epochs: int, classes: int, val_images: int, milestones: tuple[int, ...], skewed: bool
) -> None:
    """Losses that fall to a plateau with noise, accuracies of a binomial, confidences that are calibrated."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(50, 400 if skewed else 60, classes)
    chance = counts.max() / counts.sum()
    best = 1 - (1 - chance) * rng.uniform(0.01, 0.5)
    pace, noise = rng.uniform(0.2, 0.8), rng.uniform(0, 0.05)
    context = replace(
        CONTEXT,
        class_counts=tuple(counts.tolist()),
        train_images=int(counts.sum()),
        val_images=val_images,
        max_epochs=epochs,
        milestones=milestones,
    )
    end, guessing = math.log(classes) * rng.uniform(0.05, 0.5), math.log(classes)
    history: list[ValidationRecord] = []
    for epoch in range(1, epochs + 1):
        progress = 1 - pace**epoch
        accuracy = chance + (best - chance) * progress
        loss = (guessing + (end - guessing) * progress) * math.exp(rng.normal(0, noise))
        measured = rng.binomial(val_images, accuracy) / val_images
        train = rng.binomial(context.train_images, min(accuracy + rng.uniform(-0.1, 0.05), 1)) / context.train_images
        history.append(
            ValidationRecord(
                epoch=epoch,
                global_step=epoch,
                metrics={"val/loss": loss, "val/accuracy": measured, "train/accuracy": train},
                lr={"head": 1e-3},
                data_wait=rng.uniform(0, 0.15),
                seconds=100.0 * epoch,
            )
        )
        labels = rng.choice(classes, val_images, p=counts / counts.sum())
        confidences = rng.beta(8 * accuracy, 8 * (1 - accuracy), val_images)
        right = rng.random(val_images) < confidences
        predicted = np.where(right, labels, rng.integers(0, classes, val_images))
        confusion = np.zeros((classes, classes), np.int64)
        np.add.at(confusion, (labels, predicted), 1)
        bins = np.minimum((confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        calibration = Calibration(
            np.bincount(bins, minlength=CALIBRATION_BINS),
            np.bincount(bins, confidences, minlength=CALIBRATION_BINS),
            np.bincount(bins, right, minlength=CALIBRATION_BINS),
        )
        found = Evaluation({}, cells_of(confusion), calibration)
        assert advise(history, found, [f"class {number}" for number in range(classes)], context) == []


def test_a_trend_is_told_from_noise() -> None:
    assert rise(RISING) == 2
    assert rise(FALLING) is None
    assert rise([1.0, 0.5, 0.9, 0.6, 0.8, 0.7, 0.85, 0.65]) is None
    assert rise([]) is None
    plateaus = np.random.default_rng(0).normal(1, 0.1, (2000, 15))
    assert sum(rise(values.tolist()) is not None for values in plateaus) <= 5  # 0.25 %, at a noise of 10 %


@pytest.mark.parametrize(("share", "count"), [(0.0, 10), (0.5, 100), (1.0, 1000), (0.97, 30)])
def test_bounds_hold_the_share(share: float, count: int) -> None:
    low, high = bounds(share, count)
    assert 0 <= low <= share <= high <= 1
    assert (low, high) != (share, share)


def test_names_of_classes_cannot_act_as_lines_of_their_own() -> None:
    found = evaluation([[900, 0], [100, 0]], 0.9)
    (advice,) = advise(records(FALLING), found, ["cat", "x\n\x1b[31m" + "y" * 500], CONTEXT)
    assert "\n" not in advice.message
    assert "\x1b" not in advice.message
    assert len(advice.message) < 300


def test_advice_on_several_labels_counts_each_class() -> None:
    several = Evaluation({}, np.array([[[500, 20], [20, 460]], [[800, 0], [200, 0]]]))
    assert kinds(records(FALLING), several, has_several_labels=True) == ["never_predicted"]
