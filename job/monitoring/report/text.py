"""Values as a person reads them."""

from __future__ import annotations

METRICS = ("accuracy", "top5_accuracy", "mAP", "f1", "macro_f1", "micro_f1", "auroc", "loss", "ece")
"""Validation metrics that a summary shows, where a task has them, in this order."""

TIMES = {
    "step": "training steps",
    "features": "backbone features",
    "validation": "validation",
    "data_wait": "waiting for data",
    "startup": "start-up",
    "checkpoint_stall": "waiting for checkpoints",
    "recomputed": "recomputed steps",
    "other": "between attempts, other",
}
"""Parts of ``seconds``, as of :func:`job.monitoring.accounting.totals`, and their titles, in the order of a summary."""


def number(value: float | None, digits: int = 4) -> str:
    """A measured value; an en dash for none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share, with one digit; an en dash for none."""
    return "–" if value is None else f"{value:.1%}"


def size(count: float) -> str:
    """A number of bytes, in decimal units."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} B"
