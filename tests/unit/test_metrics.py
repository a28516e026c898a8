"""Metrics, compared with scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score

from job.model.auroc import BinnedAUROC
from job.model.metrics import EvaluationMetrics


def test_metrics_ignore_masked_samples_and_agree_with_scikit_learn() -> None:
    torch.manual_seed(0)
    chances, labels, losses = torch.rand(60, 3).softmax(dim=1), torch.randint(0, 3, (60,)), torch.rand(60)
    mask = torch.rand(60) > 0.2
    metrics = EvaluationMetrics("abc")
    for part in torch.arange(60).chunk(4):
        metrics.update(losses[part], chances[part], labels[part], mask[part])
    evaluation = metrics.compute()
    values, confusion = evaluation.metrics, evaluation.confusion
    true, guess = labels[mask].numpy(), chances[mask].argmax(dim=1).numpy()
    assert values["accuracy"] == pytest.approx(accuracy_score(true, guess))
    assert values["f1"] == pytest.approx(f1_score(true, guess, average="macro"))
    assert values["auroc"] == pytest.approx(roc_auc_score(true, chances[mask].numpy(), multi_class="ovr"))
    assert values["loss"] == pytest.approx(losses[mask].mean().item())
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == confusion_matrix(true, guess).tolist()
    assert values["accuracy_of/b"] == pytest.approx((confusion[1, 1] / confusion[1].sum()).item())


def test_undefined_metrics_are_absent() -> None:
    """With one class present there is no AUROC (torchmetrics returns 0); without samples no metric."""
    metrics = EvaluationMetrics("abc")
    chances, mask = torch.rand(4, 3).softmax(dim=1), torch.ones(4, dtype=torch.bool)
    metrics.update(torch.rand(4), chances, torch.ones(4, dtype=torch.int64), mask)
    values = metrics.compute().metrics
    assert set(values) == {"loss", "accuracy", "f1", "accuracy_of/b"}
    assert all(math.isfinite(value) for value in values.values())
    metrics.reset()
    metrics.update(torch.full((4,), math.nan), chances, torch.ones(4, dtype=torch.int64), ~mask)
    assert metrics.compute().metrics == {}
    metrics.reset()

    metrics.update(torch.tensor([math.nan, 1, 1, 1]), chances, torch.tensor([0, 0, 1, 1]), mask)
    values = metrics.compute().metrics
    assert math.isnan(values["loss"])  # not the mean of the rest
    true = torch.tensor([0, 0, 1, 1])
    expected = [roc_auc_score(true == c, chances[:, c]) for c in (0, 1)]
    assert values["auroc"] == pytest.approx(np.mean(expected))


def test_many_classes_have_no_per_class_metrics_and_a_binned_auroc() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 120, (4000,))
    logits = torch.randn(4000, 120)
    logits[torch.arange(4000), labels] += 2
    chances = logits.softmax(dim=1)
    metrics = EvaluationMetrics([f"c{n}" for n in range(120)])
    assert isinstance(metrics.auroc, BinnedAUROC)
    for part in torch.arange(4000).chunk(3):
        mask = torch.ones(len(part), dtype=torch.bool)
        metrics.update(torch.rand(len(part)), chances[part], labels[part], mask)
    evaluation = metrics.compute()
    values, confusion = evaluation.metrics, evaluation.confusion
    assert not [name for name in values if name.startswith("accuracy_of/")]
    assert confusion.shape == (120, 120)
    exact = roc_auc_score(labels, chances, multi_class="ovr")
    assert values["auroc"] == pytest.approx(exact, abs=1e-3)
