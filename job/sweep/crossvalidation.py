"""Cross-validation of all trials, in blocks of heads that ranks share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from job.cluster import ranks
from job.model.head import cpu_threads
from job.process.progress import Progress
from job.sweep.features import PartFeatures
from job.sweep.heads import Head, HeadBatch, Plan, heads_per_block, initial_head
from job.sweep.scores import FoldScore, score_heads
from job.sweep.trials import Trial

STEPS = 300
"""Steps of a head by default."""
LEAST_EPOCHS, MOST_EPOCHS = 5, 100
LEAST_BATCH, MOST_BATCH = 32, 1024
BATCHES_PER_EPOCH = 64
"""Steps per epoch from which on a larger batch is chosen."""
SMALL_STEP_FLOPS = 2e7
"""Steps with fewer are faster on one thread."""


def plan_of(
    images: int, epochs: int | None, batch_size: int | None, seed: int, run_length: int, *, decay_biases: bool
) -> Plan:
    """The length of the training: what the user chose, or about :data:`STEPS` steps.

    Args:
        images: number of training images.
        epochs: the user's choice.
        batch_size: the user's choice.
        seed: of order and dropout.
        run_length: neighbours that stay together in the order.
        decay_biases: apply weight decay to biases, too.
    """
    if batch_size is None:
        wanted = 2 ** round(math.log2(max(images / BATCHES_PER_EPOCH, 1)))
        batch_size = min(max(wanted, LEAST_BATCH), MOST_BATCH)
    if epochs is None:
        epochs = min(max(round(STEPS / math.ceil(images / batch_size)), LEAST_EPOCHS), MOST_EPOCHS)
    return Plan(epochs, batch_size, seed, max(min(run_length, batch_size // 8), 1), decay_biases)


@dataclass(frozen=True)
class Block:
    """Heads of one shape that train together.

    Attributes:
        hidden: widths of their hidden layers.
        dropout: of all of them.
        members: (number of the trial, fold) of each head; those of one fold are neighbours.
    """

    hidden: tuple[int, ...]
    dropout: float
    members: Sequence[tuple[int, int]]


def blocks_of(
    trials: Sequence[tuple[int, Trial]], folds: int, features: int, num_logits: int, plan: Plan, limit: float
) -> list[Block]:
    """Divide trials and folds into blocks that fit into memory, at least one per rank and shape.

    Args:
        trials: with their numbers.
        folds: number of folds.
        features: width of a feature vector.
        num_logits: width of a head's output.
        plan: length of the training.
        limit: bytes per block.
    """
    blocks = []
    shapes: dict[tuple[tuple[int, ...], float], list[int]] = {}
    for number, trial in trials:
        shapes.setdefault((trial.hidden, trial.dropout), []).append(number)
    for (hidden, dropout), numbers in shapes.items():
        members = [(number, fold) for fold, number in itertools.product(range(folds), numbers)]
        most = heads_per_block(features, hidden, num_logits, plan.batch_size, limit)
        count = max(math.ceil(len(members) / most), min(ranks.world_size(), len(members)))
        bounds = [len(members) * part // count for part in range(count + 1)]
        blocks += [Block(hidden, dropout, members[start:end]) for start, end in itertools.pairwise(bounds)]
    return blocks


def cross_validate(
    trials: Sequence[tuple[int, Trial]],
    part: PartFeatures,
    folds: npt.NDArray[np.int64],
    plan: Plan,
    block_bytes: float,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, int, FoldScore]]:
    """Train the trials of one backbone without each fold, and yield (trial, fold, score) of this rank's share.

    Args:
        trials: with their numbers.
        part: the training part.
        folds: fold of each sample.
        plan: length and order of the training.
        block_bytes: memory of a block of heads.
        device: that computes.
        tick: called after each step.
    """
    rows, targets = part.rows, part.targets
    count, width = int(folds.max()) + 1, rows.plain.shape[1]
    blocks = blocks_of(trials, count, width, targets.num_logits, plan, block_bytes)
    own = blocks[ranks.rank() :: ranks.world_size()]
    settings = dict(trials)
    steps = plan.epochs * math.ceil(len(rows) / plan.batch_size)
    fold_of = torch.from_numpy(folds).to(device)
    total = sum(len(block.members) for block in own) * steps
    with Progress("sweep", "steps of heads", total, is_shown=ranks.rank() == 0) as progress:
        for block in own:
            heads = [head_of(settings[number], fold) for number, fold in block.members]
            start = initial_head(width, block.hidden, targets.num_logits, plan.seed)
            batch = HeadBatch(heads, start, block.dropout, plan, device)
            with cpu_threads(threads_for(batch)):
                batch.train(rows, targets, fold_of, after_step=_counter(progress, len(heads), tick))
            scores = score_heads(batch, rows, targets, folds)
            for (number, fold), score in zip(block.members, scores, strict=True):
                yield number, fold, score


def head_of(trial: Trial, fold: int) -> Head:
    """The head of a trial that leaves out a fold."""
    return Head(trial.lr, trial.weight_decay, trial.label_smoothing, trial.class_weights == "balanced", fold)


def threads_for(batch: HeadBatch) -> int:
    """CPU threads of a step: one where waking another costs more than it saves."""
    flops = 6 * batch.plan.batch_size * sum(weight.numel() for weight in batch.weights)
    return 1 if flops < SMALL_STEP_FLOPS else torch.get_num_threads()


def gathered(scores: Iterable[tuple[int, int, FoldScore]]) -> dict[tuple[int, int], FoldScore]:
    """The scores of all ranks, by trial and fold; a collective operation."""
    return {(trial, fold): score for trial, fold, score in ranks.union(set(scores))}


def _counter(progress: Progress, heads: int, tick: Callable[[], None]) -> Callable[[], None]:
    def count() -> None:
        progress.advance(heads)
        tick()

    return count
