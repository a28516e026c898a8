"""Layout of TensorBoard's custom scalars tab: training and validation in one chart each."""

from __future__ import annotations

from typing import Any


def layout() -> dict[str, dict[str, list[Any]]]:
    """Charts by category, for ``add_custom_scalars``; a tag is a regular expression that matches from the beginning."""
    return {
        "Quality": {
            "loss": _lines("(train|val)/loss(_epoch)?$"),
            "accuracy": _lines("(train|val)/(accuracy|top5_accuracy|mAP)$"),
            "F1 and AUROC": _lines("(train|val)/(f1|macro_f1|micro_f1|auroc)$"),
            "calibration error": _lines("val/ece(_calibrated)?$"),
            "accuracy per class": _lines("val/(accuracy|average_precision)_of/"),
        },
        "Training": {
            "learning rate": _lines("lr/"),
            "gradient norm": _lines("train/grad_norm"),
            "images per second": _lines("train/images_per_second$"),
        },
        "Machine": {
            "use": _lines("system/"),
            "wall time": _lines("wall_time/"),
        },
    }


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]
