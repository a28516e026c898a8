"""Classify images with a checkpoint: in Python, and millions of them into a folder of predictions."""

from job.predict.predictor import MultilabelPrediction, Prediction, Predictor, load

__all__ = ["MultilabelPrediction", "Prediction", "Predictor", "load"]
