"""Benchmark of ``sweep``: many heads at once against heads one after another and scikit-learn, on the same features.

Run it as ``python benchmarks/features.py``. Features are random, of two classes that overlap. Each head is one setting
without one fold. The heads one after another are trained by ``torch.optim.AdamW`` and the loss of ``fit`` on batches in
memory, without a Trainer, which would take longer; their time is that of a few, multiplied. LogisticRegressionCV
fits as many settings and folds by L-BFGS until it converges: another optimizer, for the same purpose.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import sklearn
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor

from job.cli.versions import library_versions
from job.model.task import per_sample_loss
from job.process.cpus import available_cpus
from job.sweep.crossvalidation import plan_of
from job.sweep.heads import Head, HeadBatch, Plan, Targets, class_weights_of, heads_per_block, initial_head
from job.sweep.scores import score_heads

FOLDS = 5
BLOCK_BYTES = 512e6


class Rows:
    """Features in memory, one variant per sample."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, samples: np.ndarray, epoch: int | None) -> Tensor:
        """Features of some samples."""
        return self.values[torch.from_numpy(samples)]


def measured(action: Callable[[], float]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def sweep(rows: Rows, targets: Targets, folds: np.ndarray, rates: list[float], hidden: list[int], plan: Plan) -> float:
    """Best mean accuracy over the folds of heads that train together."""
    width = rows.values.shape[1]
    heads = [Head(rate, 0.01, fold=fold) for fold in range(FOLDS) for rate in rates]
    block = heads_per_block(width, hidden, 1, plan.batch_size, BLOCK_BYTES)
    values: list[float] = []
    for start in range(0, len(heads), block):
        batch = HeadBatch(
            heads[start : start + block], initial_head(width, hidden, 1, 0), 0.0, plan, torch.device("cpu")
        )
        batch.train(rows, targets, torch.from_numpy(folds))
        values += [score.value for score in score_heads(batch, rows, targets, folds)]
    return float(np.array(values).reshape(FOLDS, len(rates)).mean(0).max())


def one_by_one(
    rows: Rows, targets: Targets, folds: np.ndarray, rates: list[float], hidden: list[int], plan: Plan
) -> float:
    """Mean accuracy of heads that train one after another, without fold 0."""
    accuracies = []
    train, test = np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)
    for rate in rates:
        network = initial_head(rows.values.shape[1], hidden, 1, 0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01, fused=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.epochs)
        for epoch in range(plan.epochs):
            order = np.random.default_rng(epoch).permutation(train)
            for start in range(0, len(order), plan.batch_size):
                chosen = torch.from_numpy(order[start : start + plan.batch_size])
                loss = per_sample_loss(network(rows.values[chosen]), targets.values[chosen]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
        with torch.no_grad():
            predicted = network(rows.values[torch.from_numpy(test)])[:, 0] > 0
        accuracies.append(float((predicted == targets.values[torch.from_numpy(test)].bool()).float().mean()))
    return float(np.mean(accuracies))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--heads", type=int, default=200, help="settings times 5 folds")
    parser.add_argument("--hidden", type=int, nargs="*", default=[])
    parser.add_argument("--alone", type=int, default=2, help="heads that are trained one after another")
    parser.add_argument("--without-sklearn", action="store_true")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(options.images) % 2
    values = torch.randn(options.images, options.features, generator=generator)
    direction = torch.randn(options.features, generator=generator) / math.sqrt(options.features)
    values += torch.outer(labels * 2.0 - 1, direction)
    rows = Rows(values)
    targets = Targets(labels, torch.ones(len(labels), dtype=torch.bool), 2, class_weights_of(labels, 2))
    folds = np.random.default_rng(0).permutation(options.images) % FOLDS
    plan = plan_of(options.images, None, None, 0, 1, decay_biases=True)
    rates = np.geomspace(1e-4, 3e-2, options.heads // FOLDS).tolist()
    title = (
        f"{library_versions()}, scikit-learn {sklearn.__version__}, {available_cpus()} CPUs; {options.images:,} images "
        f"x {options.features:,} features, {options.heads} heads, hidden {options.hidden}, {plan.epochs} epochs in "
        f"batches of {plan.batch_size}"
    )
    table = Table(title=title)
    for column in ("", "wall s", "CPU s", "CPU s, ratio", "accuracy"):
        table.add_column(column, justify="right" if column else "left")
    together = measured(lambda: sweep(rows, targets, folds, rates, options.hidden, plan))
    results = {"sweep": together}
    if options.alone:
        few = rates[:: max(len(rates) // options.alone, 1)][: options.alone]
        wall, cpu, accuracy = measured(lambda: one_by_one(rows, targets, folds, few, options.hidden, plan))
        factor = options.heads / len(few)
        results[f"one after another ({len(few)} measured, their mean)"] = (wall * factor, cpu * factor, accuracy)
    if not options.without_sklearn and not options.hidden:
        model = LogisticRegressionCV(
            Cs=len(rates), cv=FOLDS, scoring="accuracy", max_iter=1000, use_legacy_attributes=True
        )
        fitted = measured(lambda: float(model.fit(values.numpy(), labels.numpy()).scores_[1].mean(0).max()))
        results["LogisticRegressionCV"] = fitted
    for name, (wall, cpu, accuracy) in results.items():
        table.add_row(name, f"{wall:.1f}", f"{cpu:.1f}", f"{cpu / together[1]:.1f}", f"{accuracy:.4f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
