"""Distributed training of image classifiers from object stores, with exact resume after preemption."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.api import fit
    from job.data.datamodule import ImageDataModule
    from job.errors import JobError
    from job.model.module import TransferLearningModel
    from job.monitoring.report.content import Report
    from job.predict import MultilabelPrediction, Prediction, Predictor, load

__all__ = [
    "ImageDataModule",
    "JobError",
    "MultilabelPrediction",
    "Prediction",
    "Predictor",
    "Report",
    "TransferLearningModel",
    "fit",
    "load",
]

_MODULES = {
    "ImageDataModule": "job.data.datamodule",
    "JobError": "job.errors",
    "MultilabelPrediction": "job.predict",
    "Prediction": "job.predict",
    "Predictor": "job.predict",
    "Report": "job.monitoring.report.content",
    "TransferLearningModel": "job.model.module",
    "fit": "job.api",
    "load": "job.predict",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: loader processes import this package, and need no model.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
