"""Metrics, compared with scikit-learn."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score, top_k_accuracy_score
from support import cells_of

from job.model.evaluation import Evaluation
from job.model.metrics import EvaluationMetrics
from job.model.scores import BinnedScores


def test_metrics_ignore_masked_samples_and_agree_with_scikit_learn() -> None:
    torch.manual_seed(0)
    chances, labels, losses = torch.rand(60, 3).softmax(dim=1), torch.randint(0, 3, (60,)), torch.rand(60)
    mask = torch.rand(60) > 0.2
    metrics = EvaluationMetrics("abc")
    for part in torch.arange(60).chunk(4):
        metrics.update(losses[part], chances[part], labels[part], mask[part], part)
    evaluation = metrics.compute()
    values, confusion = evaluation.metrics, evaluation.confusion
    true, guess = labels[mask].numpy(), chances[mask].argmax(dim=1).numpy()
    assert values["accuracy"] == pytest.approx(accuracy_score(true, guess))
    assert values["f1"] == pytest.approx(f1_score(true, guess, average="macro"))
    assert values["auroc"] == pytest.approx(roc_auc_score(true, chances[mask].numpy(), multi_class="ovr"))
    assert values["loss"] == pytest.approx(losses[mask].mean().item())
    assert confusion.dtype == np.int64
    expected = confusion_matrix(true, guess)
    assert confusion.tolist() == cells_of(expected).tolist()
    assert values["accuracy_of/b"] == pytest.approx((expected[1, 1] / expected[1].sum()).item())


def test_undefined_metrics_are_absent() -> None:
    """With one class present there is no AUROC (torchmetrics returns 0); without samples no metric."""
    metrics = EvaluationMetrics("abc")
    chances, mask = torch.rand(4, 3).softmax(dim=1), torch.ones(4, dtype=torch.bool)
    metrics.update(torch.rand(4), chances, torch.ones(4, dtype=torch.int64), mask, torch.arange(4))
    values = metrics.compute().metrics
    assert set(values) == {"loss", "accuracy", "f1", "ece", "accuracy_of/b"}
    assert all(math.isfinite(value) for value in values.values())
    metrics.reset()
    metrics.update(torch.full((4,), math.nan), chances, torch.ones(4, dtype=torch.int64), ~mask, torch.arange(4))
    assert metrics.compute().metrics == {}
    metrics.reset()

    metrics.update(torch.tensor([math.nan, 1, 1, 1]), chances, torch.tensor([0, 0, 1, 1]), mask, torch.arange(4))
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
    assert isinstance(metrics.scores, BinnedScores)
    for part in torch.arange(4000).chunk(3):
        mask = torch.ones(len(part), dtype=torch.bool)
        metrics.update(torch.rand(len(part)), chances[part], labels[part], mask, part)
    evaluation = metrics.compute()
    values, confusion = evaluation.metrics, evaluation.confusion
    assert not [name for name in values if name.startswith("accuracy_of/")]
    assert confusion[:, 2].sum() == 4000
    exact = roc_auc_score(labels, chances, multi_class="ovr")
    assert values["auroc"] == pytest.approx(exact, abs=evaluation.errors["auroc"])
    assert 0 < evaluation.errors["auroc"] < 1e-3


def data_of(samples: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Losses, probabilities, labels, mask and sample ids."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator)
    logits[torch.arange(samples), labels] += 1.5
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    mask = torch.rand(samples, generator=generator) > 0.1
    return losses, logits.softmax(dim=1), labels, mask, torch.arange(samples)


def evaluation_of(classes: int, data: tuple[torch.Tensor, ...], size: int = 32, samples: int = 0) -> Evaluation:
    metrics = EvaluationMetrics([f"c{n}" for n in range(classes)], samples=samples, synchronise=False)
    for part in torch.arange(len(data[0])).split(size):
        metrics.update(*(tensor[part] for tensor in data))
    return metrics.compute()


def test_the_worst_errors_are_the_wrong_predictions_of_the_highest_loss() -> None:
    losses, probabilities, labels, mask, samples = data = data_of(1000, 5)
    worst = evaluation_of(5, data).worst
    predicted = probabilities.argmax(dim=1)
    wrong = samples[mask & (predicted != labels)]
    expected = wrong[losses[wrong].argsort(descending=True)][:64].tolist()
    assert [each.sample for each in worst] == expected
    for each in worst:
        assert each.labels == (int(labels[each.sample]),)
        assert each.predicted == (int(predicted[each.sample]),)
        assert each.confidence == pytest.approx(float(probabilities[each.sample].max()))
        assert each.loss == pytest.approx(float(losses[each.sample]))
    few = tuple(tensor[:20] for tensor in data)
    assert {each.sample for each in evaluation_of(5, few).worst} == set(wrong[wrong < 20].tolist())


@pytest.mark.parametrize("samples", [10, 64, 1000, 12_345])
def test_examples_are_spread_and_do_not_depend_on_predictions_or_batches(samples: int) -> None:
    losses, probabilities, labels, mask, ids = data_of(samples, 3)
    every = torch.ones_like(mask)
    examples = evaluation_of(3, (losses, probabilities, labels, every, ids)).examples
    selected = [each.sample for each in examples]
    assert selected == sorted(set(selected))
    assert len(selected) == min(samples, 64)
    gaps = np.diff([-1, *selected, samples])
    assert gaps.max() <= 4 * max(samples / 64, 1)
    other = evaluation_of(3, (losses.flip(0), probabilities, labels, every, ids), size=7).examples
    assert [each.sample for each in other] == selected
    fewer = [each.sample for each in evaluation_of(3, (losses, probabilities, labels, mask, ids)).examples]
    assert not set(fewer) & set(ids[~mask].tolist())
    assert set(selected) & set(ids[mask].tolist()) <= set(fewer)


@pytest.mark.parametrize(("classes", "samples"), [(2, 1000), (12, 1000), (12, 60_000), (120, 1000)])
def test_ece_and_top_5_agree_with_formulas_of_their_own(classes: int, samples: int) -> None:
    data = data_of(1000, classes)
    evaluation = evaluation_of(classes, data, samples=samples)
    _, probabilities, labels, mask, _ = data
    scores, true = probabilities[mask].double().numpy(), labels[mask].numpy()
    confidence, correct = scores.max(axis=1), scores.argmax(axis=1) == true
    edges = np.linspace(0, 1, 16)
    ece = sum(
        abs(confidence[inside].mean() - correct[inside].mean()) * inside.mean()
        for low, high in itertools.pairwise(edges)
        if (inside := (confidence >= low) & ((confidence < high) | (high == 1))).any()
    )
    assert evaluation.metrics["ece"] == pytest.approx(ece, abs=1e-6)
    if classes > 10:
        expected = top_k_accuracy_score(true, scores, k=5, labels=np.arange(classes))
        assert evaluation.metrics["top5_accuracy"] == pytest.approx(expected)
    else:
        assert "top5_accuracy" not in evaluation.metrics
    counts = evaluation.scores
    assert counts is not None
    if classes > 50:
        assert counts.positives.shape == counts.negatives.shape == (1, len(counts.lowest))
        assert (counts.positives.sum(), counts.negatives.sum()) == (len(true), len(true) * (classes - 1))
        return
    for c in range(classes):
        assert (int(counts.positives[c].sum()), int(counts.negatives[c].sum())) == (
            (true == c).sum(),
            (true != c).sum(),
        )
    for place in (0, 700, 1100, 1500):
        threshold = counts.lowest[place]
        above = (scores >= threshold).sum(axis=0)
        assert (counts.positives + counts.negatives)[:, place:].sum(axis=1) == pytest.approx(above, abs=2)


def rank_of_two(rank: int, folder: str, classes: int, samples: int) -> None:
    """Evaluate this rank's share of each batch, and save the result."""
    torch.set_num_threads(1)  # the process is forked
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metrics = EvaluationMetrics([f"c{n}" for n in range(classes)], samples=samples)
    data = data_of(1000, classes)
    for part in torch.arange(1000).split(50):
        metrics.update(*(tensor[part[rank * 25 : (rank + 1) * 25]] for tensor in data))
    Path(folder, str(rank)).write_bytes(pickle.dumps(metrics.compute()))
    dist.destroy_process_group()


@pytest.mark.parametrize(("classes", "samples"), [(12, 1000), (120, 60_000)])
def test_two_ranks_evaluate_as_one(classes: int, samples: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_of_two, args=(n, str(tmp_path), classes, samples)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    one = evaluation_of(classes, data_of(1000, classes), samples=samples)
    first, second = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2))  # noqa: S301
    assert first.metrics == second.metrics
    for other in (first, second):
        assert other.metrics == pytest.approx(one.metrics)
        assert (other.worst, other.examples) == (one.worst, one.examples)
        assert other.confusion.tolist() == one.confusion.tolist()
        assert other.calibration.counts.tolist() == one.calibration.counts.tolist()
        assert (other.scores is None) == (one.scores is None)
        if one.scores is not None:
            assert other.scores.positives.tolist() == one.scores.positives.tolist()
