"""Distributed image-classification training that survives the cloud."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.predict import Prediction, Predictor, load

__all__ = ["Prediction", "Predictor", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: loader processes import this package, and need no model.
    if name in __all__:
        from job import predict

        return getattr(predict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
