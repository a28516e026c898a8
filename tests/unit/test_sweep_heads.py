"""Heads that train together come out as heads that train alone, by torch's own optimizer and the task's own loss."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from job.data.sampler import ResumableBatchSampler
from job.model.config import ModelConfig
from job.model.head import build_head
from job.model.tasks import TASKS
from job.sweep.heads import ALL_SAMPLES, Head, HeadBatch, Plan, Targets, class_weights_of, initial_head

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


def alone(head: Head, start: torch.nn.Sequential, plan: Plan, matrix: Matrix, targets: Targets, folds: np.ndarray):
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
    index = SimpleNamespace(
        labels=labels,
        class_counts=lambda: labels.sum(0).astype(int),
        __len__=lambda: SAMPLES,
    )
    if targets.several_labels:
        index = type("Labels", (), {"class_counts": lambda _: labels.sum(0), "__len__": lambda _: SAMPLES})()
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
