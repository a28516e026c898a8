"""Ranking of checkpoints by one finite metric, in one direction, on one set of validation samples."""

from __future__ import annotations

import re
from collections.abc import Sequence

from job.checkpoint.manifest import Manifest, Mode
from job.errors import ConfigError

LOWER_IS_BETTER = frozenset(
    {
        "loss",
        "losses",
        "error",
        "err",
        "errors",
        "mae",
        "mse",
        "rmse",
        "msle",
        "nll",
        "ece",
        "brier",
        "perplexity",
        "ppl",
        "divergence",
        "distance",
        "hinge",
        "fpr",
        "fnr",
        "entropy",
        "latency",
        "crossentropy",
    }
)
HIGHER_IS_BETTER = frozenset(
    {
        "accuracy",
        "acc",
        "top1",
        "top5",
        "f1",
        "fbeta",
        "auc",
        "auroc",
        "auprc",
        "ap",
        "map",
        "precision",
        "recall",
        "iou",
        "miou",
        "dice",
        "jaccard",
        "kappa",
        "mcc",
        "r2",
        "score",
        "specificity",
        "sensitivity",
        "psnr",
        "ssim",
        "tpr",
        "tnr",
    }
)


def mode_of(metric: str, mode: Mode | None) -> Mode:
    """``mode``, or the direction in which the metric of this name is better.

    Raises:
        ConfigError: the name does not say.
    """
    if mode is not None:
        return mode
    if implied := implied_mode(metric):
        return implied
    raise ConfigError(
        f"--checkpoint.monitor {metric!r}: its name does not say whether a higher or a lower value is better. "
        "Give --checkpoint.mode max or --checkpoint.mode min."
    )


def implied_mode(metric: str) -> Mode | None:
    """The direction that the words of a metric's name imply: "min" for ``val/loss``, "max" for ``val/f1``."""
    # "val/accuracy_of/loss" is the accuracy of a class with the name "loss".
    name = metric.split("/")[min(1, metric.count("/"))].lower()
    words = set(re.split(r"[^a-z0-9]+", name))
    lower, higher = bool(words & LOWER_IS_BETTER), bool(words & HIGHER_IS_BETTER)
    if lower == higher:
        return None
    return "min" if lower else "max"


def same_validation(one: Manifest, other: Manifest) -> bool:
    """Whether two checkpoints were validated on the same samples, as far as is known."""
    return one.validation == other.validation or not one.validation or not other.validation


def ranked(candidates: Sequence[Manifest]) -> list[Manifest]:
    """Checkpoints that compete with the newest of ``candidates``, the best first, of equals the newest first.

    The newest one's metric and mode rank all of them. Left out are those in which that metric was not measured or is
    not finite, and those that were validated on other samples.
    """
    if not candidates:
        return []
    newest = max(candidates, key=order)
    last = max((m for m in candidates if m.metrics), key=order, default=newest)
    sign = 1 if newest.mode == "max" else -1
    valued = [
        (sign * value, order(m), m)
        for m in candidates
        if (value := m.measured(newest.monitor)) is not None and same_validation(m, last)
    ]
    return [m for *_, m in sorted(valued, key=lambda item: item[:2], reverse=True)]


def best_of_each_validation(candidates: Sequence[Manifest], count: int) -> list[Manifest]:
    """The ``count`` best checkpoints of every set of validation samples: those before a change stay comparable."""
    if not candidates:
        return []
    newest, kept = max(candidates, key=order), list(ranked(candidates)[:count])
    for identity in {m.validation for m in candidates if m.validation}:
        group = [m for m in candidates if m.validation == identity]
        if newest not in group:
            kept += ranked(group)[:count]
    return kept


def order(manifest: Manifest) -> tuple[int, int, int, bool]:
    """Sort key: the newest checkpoint last."""
    return manifest.global_step, manifest.epoch, manifest.batch, bool(manifest.metrics)
