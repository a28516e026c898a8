"""Heads that train together come out as heads that train alone, by torch's own optimizer and the task's own loss."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from job.data.sampler import ResumableBatchSampler
from job.errors import DataError
from job.model.config import ModelConfig
from job.model.head import build_head
from job.model.tasks import TASKS
from job.sweep.crossvalidation import blocks_of
from job.sweep.folds import copies, stratified_folds
from job.sweep.heads import (
    ALL_SAMPLES,
    Head,
    HeadBatch,
    Plan,
    Targets,
    class_weights_of,
    heads_per_block,
    initial_head,
)
from job.sweep.scores import expected_maximum, luck_of, mean_average_precision, ranking, score_heads
from job.sweep.trials import Trial

CPU = torch.device("cpu")
SAMPLES, WIDTH = 60, 8


class Matrix:
    """Features in memory, one variant per sample."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, samples: np.ndarray, epoch: int | None) -> Tensor:
        return self.values[torch.from_numpy(samples)]


def problem(classes: int, several_labels: bool = False) -> tuple[Matrix, Targets, np.ndarray]:
    generator = torch.Generator().manual_seed(classes)
    values = torch.randn(SAMPLES, WIDTH, generator=generator)
    weights = torch.randn(WIDTH, classes, generator=generator)
    scores = values @ weights + torch.linspace(1, 0, classes)
    labels = (scores > 0.5).float() if several_labels else scores.argmax(1)
    valid = torch.ones(SAMPLES, dtype=torch.bool)
    valid[3] = False
    targets = Targets(labels, valid, classes, class_weights_of(labels, classes))
    return Matrix(values), targets, np.arange(SAMPLES) % 3


def alone(
    head: Head, start: torch.nn.Sequential, plan: Plan, matrix: Matrix, targets: Targets, folds: np.ndarray
) -> torch.nn.Sequential:
    """Train one head by torch.optim and the loss of ``fit``, one step per batch."""
    network = build_head(
        WIDTH, [layer.out_features for layer in start if hasattr(layer, "out_features")][:-1], targets.num_logits
    )
    network.load_state_dict(start.state_dict())
    task_name = "multilabel" if targets.several_labels else "classification"
    config = ModelConfig(
        task=task_name,
        label_smoothing=head.label_smoothing,
        class_weights="balanced" if head.balanced else "none",
    )
    labels = targets.values.numpy()
    counts = labels.sum(0) if targets.several_labels else None
    attributes = {"labels": labels, "class_counts": lambda _: counts, "__len__": lambda _: SAMPLES}
    index: Any = type("TrainIndex", (), attributes)()
    task = TASKS[task_name](config, targets.num_classes, lambda: index)
    optimizer = torch.optim.AdamW(network.parameters(), lr=head.lr, weight_decay=head.weight_decay)
    scheduler = CosineAnnealingLR(optimizer, plan.epochs)
    sampler = ResumableBatchSampler(
        SAMPLES, plan.batch_size, rank=0, world_size=1, seed=plan.seed, shuffle=True, run_length=1
    )
    for epoch in range(plan.epochs):
        sampler.set_epoch(epoch)
        for indices in sampler:
            samples = indices.samples[indices.valid]
            samples = samples[folds[samples] != head.fold]
            rows = torch.from_numpy(samples)
            batch = {"features": matrix.values[rows]}
            batch["labels" if targets.several_labels else "label"] = targets.values[rows]
            losses = task.training_losses(batch, lambda batch: network(batch["features"]))
            loss = torch.where(targets.valid[rows], losses, 0.0).sum() / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network


@pytest.mark.parametrize("hidden", [[], [6], [6, 4]], ids=str)
@pytest.mark.parametrize(("classes", "several_labels"), [(2, False), (5, False), (4, True)])
def test_heads_train_as_alone(hidden: list[int], classes: int, several_labels: bool) -> None:
    matrix, targets, folds = problem(classes, several_labels)
    plan = Plan(epochs=4, batch_size=16, seed=7)
    start = initial_head(WIDTH, hidden, targets.num_logits, seed=1)
    heads = [
        Head(lr, weight_decay, smoothing, balanced, fold)
        for lr, (weight_decay, smoothing, balanced), fold in itertools.product(
            (0.003, 0.03), ((0.0, 0.0, False), (0.5, 0.0, True), (0.1, 0.2, False), (0.1, 0.1, True)), (ALL_SAMPLES, 0)
        )
    ]
    batch = HeadBatch(heads, start, 0.0, plan, CPU)
    batch.train(matrix, targets, torch.from_numpy(folds))
    for number, head in enumerate(heads):
        expected = alone(head, start, plan, matrix, targets, folds)
        result = build_head(WIDTH, hidden, targets.num_logits)
        batch.copy_to(result, number)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(result.state_dict()[name], value, atol=1e-5, rtol=1e-5, msg=f"{head} {name}")


def test_training_is_deterministic_with_dropout() -> None:
    matrix, targets, folds = problem(5)
    plan = Plan(epochs=2, batch_size=16, seed=3)
    start = initial_head(WIDTH, [6], targets.num_logits, seed=1)
    weights = []
    for dropout in (0.3, 0.3, 0.0):
        batch = HeadBatch([Head(0.01, 0.1, fold=fold) for fold in range(3)], start, dropout, plan, CPU)
        batch.train(matrix, targets, torch.from_numpy(folds))
        weights.append(batch.weights[0].detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.allclose(weights[0], weights[2])


def test_dropout_does_not_depend_on_the_other_heads() -> None:
    matrix, targets, folds = problem(5)
    plan = Plan(epochs=2, batch_size=16, seed=3)
    start = initial_head(WIDTH, [6, 4], targets.num_logits, seed=1)
    heads = [Head(0.01, 0.1, fold=fold) for fold in range(3)]
    together, alone = (HeadBatch(chosen, start, 0.3, plan, CPU) for chosen in (heads, heads[1:2]))
    for batch in (together, alone):
        batch.train(matrix, targets, torch.from_numpy(folds))
    for several, one in zip(together.weights, alone.weights, strict=True):
        torch.testing.assert_close(several[1], one[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("classes", "several_labels"), [(2, False), (5, False), (4, True)])
def test_scores_are_those_of_the_metrics(classes: int, several_labels: bool) -> None:
    matrix, targets, folds = problem(classes, several_labels)
    start = initial_head(WIDTH, [], targets.num_logits, seed=1)
    heads = [Head(lr, 0.0, fold=fold) for fold in range(3) for lr in (0.01, 0.1)]
    batch = HeadBatch(heads, start, 0.0, Plan(epochs=3, batch_size=16), CPU)
    batch.train(matrix, targets, torch.from_numpy(folds))
    scores = score_heads(batch, matrix, targets, folds)
    task_name = "multilabel" if several_labels else "classification"
    task = TASKS[task_name](ModelConfig(task=task_name), classes, lambda: None)
    for number, head in enumerate(heads):
        rows = torch.from_numpy(np.flatnonzero(folds == head.fold))
        network = initial_head(WIDTH, [], targets.num_logits, seed=9)
        batch.copy_to(network, number)
        metrics = task.make_metrics([str(name) for name in range(classes)], samples=SAMPLES, synchronise=False)
        labels = {"labels" if several_labels else "label": targets.values[rows]}
        with torch.no_grad():
            logits = network(matrix.values[rows])
        metrics.update_logits(**task.evaluate({**labels, "mask": targets.valid[rows], "sample": rows}, logits))
        values = metrics.compute().metrics
        assert scores[number].value == pytest.approx(values["mAP" if several_labels else "accuracy"], abs=1e-6)
        assert scores[number].loss == pytest.approx(values["loss"], rel=1e-5)


def test_diverged_heads_come_last() -> None:
    matrix, targets, folds = problem(5)
    start = initial_head(WIDTH, [6], targets.num_logits, seed=1)
    heads = [Head(lr, 0.0, fold=fold) for fold in range(3) for lr in (1e38, 0.01)]
    batch = HeadBatch(heads, start, 0.0, Plan(epochs=3, batch_size=16), CPU)
    batch.train(matrix, targets, torch.from_numpy(folds))
    scores = score_heads(batch, matrix, targets, folds)
    values = np.array([[score.value for score in scores[trial::2]] for trial in range(2)])
    losses = np.array([[score.loss for score in scores[trial::2]] for trial in range(2)])
    assert np.isnan(values[0]).all()
    assert np.isfinite(values[1]).all()  # not touched by its neighbour
    assert ranking(values, losses) == [1, 0]


def test_copies_share_a_fold_and_classes_are_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 16, generator=generator)
    values[150:170] = values[:20] * (1 + 1e-6)
    values[170:173] = values[5]
    groups = copies(values)
    assert len(np.unique(groups)) == 177
    assert (groups[150:170] == groups[:20]).all()
    assert len(set(groups[[5, 155, 170, 171, 172]].tolist())) == 1
    labels = np.arange(200) % 4
    labels[150:170], labels[170:173] = labels[:20], labels[5]
    folds = stratified_folds(labels, groups, 5, list("abcd"), seed=1)
    assert (folds[150:170] == folds[:20]).all()
    for label in range(4):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.max() - counts.min() <= 4  # a group of five is in one fold
    assert (stratified_folds(labels, groups, 5, list("abcd"), seed=1) == folds).all()


def test_too_few_images_of_a_class() -> None:
    labels = np.array([0] * 10 + [1] * 3)
    with pytest.raises(DataError, match=r"the class rare has 3 training image.*--sweep.folds=3"):
        stratified_folds(labels, np.arange(13), 5, ["common", "rare"], seed=0)


def test_luck_of_equal_heads_is_what_they_exceed_their_mean_by() -> None:
    generator = np.random.default_rng(0)
    excess, expected = [], []
    for _ in range(40):
        values = 0.8 + generator.normal(0, 0.03, (1, 5)) + generator.normal(0, 0.02, (64, 5))
        luck = luck_of(values)
        assert luck is not None
        excess.append(values.mean(1).max() - values.mean())
        expected.append(luck.expected)
    assert np.mean(expected) == pytest.approx(np.mean(excess), rel=0.25)
    assert expected_maximum(100) == pytest.approx(2.508, abs=0.01)
    assert luck_of(values[:1]) is None
    assert luck_of(np.array([[0.9] * 3, [0.8] * 3])).expected == 0  # type: ignore[union-attr]


def test_average_precision_has_a_perfect_and_a_worst_order() -> None:
    labels = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    scores = torch.tensor([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]])[:, :, None]
    assert mean_average_precision(scores, labels).tolist() == pytest.approx([1.0, (1 / 3 + 2 / 4) / 2])


def test_memory_of_a_block_is_bounded() -> None:
    plan = Plan(epochs=1, batch_size=32)
    trials = [(number, Trial(0, 0.01, 0.0, (64,) if number % 2 else ())) for number in range(40)]
    blocks = blocks_of(trials, 5, 1280, 10, plan, 64e6)
    assert sorted(member for block in blocks for member in block.members) == sorted(
        itertools.product(range(40), range(5))
    )
    for block in blocks:
        assert len(block.members) <= max(heads_per_block(1280, block.hidden, 10, 32, 64e6), 1)
    assert heads_per_block(1280, [64], 10, 32, 64e6) < heads_per_block(1280, [], 10, 32, 64e6)
