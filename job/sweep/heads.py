"""Training of many heads at once: one matrix product for all of them, AdamW with settings of their own.

Heads of one shape that train on the same samples in the same order share each batch. The first layers of K heads of
width H are one matrix [K * H, F], so that a step takes two large matrix products in place of 2 K small ones. A head
that leaves out a fold of a cross-validation has these samples masked out of its loss.

Losses are those of :mod:`job.model.task` and :mod:`job.model.multilabel`, and the update is that of
``torch.optim.AdamW``: a head comes out as if it were trained alone, up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from job.data.sampler import ResumableBatchSampler, sample_seed
from job.model.head import build_head
from job.model.multilabel import LARGEST_WEIGHT

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as torch has them by default."""
GROUP_BYTES = 12 << 20
"""Weights of the heads of which a CPU takes one step after the other: they and their gradients stay in its cache."""
UPDATE_ELEMENTS = 1 << 17
"""Parameters that a CPU updates at once: they and their moments stay in a core's cache."""
EVALUATION_ROWS = 4096
"""Samples of one matrix product of an evaluation."""
ALL_SAMPLES = -1
"""Fold of a head that leaves out none."""


class Rows(Protocol):
    """Features of the samples of one part."""

    def __len__(self) -> int:
        """Number of samples."""

    def rows(self, samples: npt.NDArray[np.int64], epoch: int | None) -> Tensor:
        """Features of some samples, float32 [len(samples), F].

        Args:
            samples: sample ids.
            epoch: takes the variant of this epoch; None: the image as it is.
        """


@dataclass(frozen=True)
class Targets:
    """Labels of a part's samples, and the class weights of the training part.

    Attributes:
        values: int64 [N], class numbers, or float [N, C], multi-hot, where an image has any number of classes.
        valid: bool [N]; False for an unreadable sample.
        num_classes: number of classes.
        class_weights: float [C]: of samples per class, or of positive samples with several labels.
    """

    values: Tensor
    valid: Tensor
    num_classes: int
    class_weights: Tensor

    @property
    def several_labels(self) -> bool:
        """Whether an image has any number of classes."""
        return self.values.ndim == 2

    @property
    def num_logits(self) -> int:
        """Width of a head's output."""
        return 1 if self.num_classes == 2 and not self.several_labels else self.num_classes

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        moved = (self.values.to(device), self.valid.to(device), self.num_classes, self.class_weights.to(device))
        return Targets(*moved)


def class_weights_of(values: Tensor, num_classes: int) -> Tensor:
    """Weights of balanced classes, float [C], as ``--model.class_weights balanced`` has them."""
    if values.ndim == 2:
        positives = values.sum(0)
        weights = (len(values) - positives) / positives.clamp(min=1)
        return weights.clamp(1 / LARGEST_WEIGHT, LARGEST_WEIGHT).float()
    counts = torch.bincount(values[values >= 0], minlength=num_classes)
    return (counts.sum() / (num_classes * counts.clamp(min=1))).float()


@dataclass(frozen=True)
class Head:
    """Settings of one head among those of its shape.

    Attributes:
        lr: initial learning rate.
        weight_decay: of AdamW.
        label_smoothing: from 0 to below 1.
        balanced: weights classes inversely to their frequency.
        fold: fold of samples that it does not train on; :data:`ALL_SAMPLES`: none.
    """

    lr: float
    weight_decay: float
    label_smoothing: float = 0.0
    balanced: bool = False
    fold: int = ALL_SAMPLES


@dataclass(frozen=True)
class Plan:
    """Length and order of the training, common to all heads.

    Attributes:
        epochs: number of epochs.
        batch_size: samples per step.
        seed: of order and dropout.
        run_length: neighbours that stay together, as in a fit.
        decay_biases: apply weight decay to biases, too.
    """

    epochs: int
    batch_size: int
    seed: int = 0
    run_length: int = 1
    decay_biases: bool = True

    def lr_factor(self, epoch: int) -> float:
        """Learning rate of an epoch relative to the first one's: CosineAnnealingLR to 0 after the last one."""
        return (1 + math.cos(math.pi * epoch / self.epochs)) / 2


class HeadBatch:
    """K heads of one shape.

    Args:
        heads: their settings.
        initial: a head as a fit builds it, whose weights all start with.
        dropout: of the inputs of each linear layer. Heads share the draws: none depends on its neighbours.
        plan: length and order of the training.
        device: that computes.
    """

    def __init__(
        self, heads: Sequence[Head], initial: nn.Sequential, dropout: float, plan: Plan, device: torch.device
    ) -> None:
        self.heads, self.dropout, self.plan, self.device = list(heads), dropout, plan, device
        count = len(heads)
        linear = [layer for layer in initial if isinstance(layer, nn.Linear)]
        self.weights = [layer.weight.detach().float().to(device).repeat(count, 1, 1) for layer in linear]
        self.biases = [layer.bias.detach().float().to(device).repeat(count, 1) for layer in linear]
        self._moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in self._parameters()]
        self._lr = torch.tensor([float(head.lr) for head in heads], device=device)
        self._weight_decay = torch.tensor([float(head.weight_decay) for head in heads], device=device)
        self._smoothing = torch.tensor([float(head.label_smoothing) for head in heads], device=device).view(1, count, 1)
        self._balanced = torch.tensor([head.balanced for head in heads], device=device).view(1, count, 1)
        self._folds = torch.tensor([head.fold for head in heads], device=device)
        bytes_each = 4 * sum(value[0].numel() for value in self._parameters())
        group = max(GROUP_BYTES // bytes_each, 1) if device.type == "cpu" else count
        self._groups = [slice(first, min(first + group, count)) for first in range(0, count, group)]
        self._steps = 0

    def _parameters(self, heads: slice = slice(None)) -> list[Tensor]:
        """Weights, then biases, of some heads; they share the memory of all."""
        return [value[heads] for value in (*self.weights, *self.biases)]

    def train(
        self,
        features: Rows,
        targets: Targets,
        folds: Tensor | None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train all heads on the samples that each does not leave out.

        Args:
            features: of the training part.
            targets: of the same samples, on this device.
            folds: int64 [N], the fold of each sample, on this device; None: no head leaves out any.
            after_step: called after each step.
        """
        plan = self.plan
        sampler = ResumableBatchSampler(
            len(features),
            plan.batch_size,
            rank=0,
            world_size=1,
            seed=plan.seed,
            shuffle=True,
            run_length=plan.run_length,
        )
        for epoch in range(plan.epochs):
            sampler.set_epoch(epoch)
            for indices in sampler:
                samples = indices.samples[indices.valid]
                rows = torch.from_numpy(samples).to(self.device)
                inputs = features.rows(samples, epoch).to(self.device)
                if self.dropout:
                    self._seed(sample_seed(plan.seed, epoch, indices.batch))
                mask = targets.valid[rows, None].expand(-1, len(self.heads))
                divisor: Tensor | float = float(len(samples))
                if folds is not None:
                    trains = folds[rows, None] != self._folds
                    mask = mask & trains
                    divisor = trains.sum(0).clamp(min=1)[None, :, None]
                self._step(inputs, targets, rows, mask[:, :, None] / divisor, plan.lr_factor(epoch))
                after_step()

    def _seed(self, seed: int) -> None:
        """Seed dropout by (seed, epoch, batch), as a fit does."""
        # torch.manual_seed would take 2 ms for absent accelerators.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _step(self, inputs: Tensor, targets: Targets, rows: Tensor, share: Tensor, lr_factor: float) -> None:
        self._steps += 1
        kept = self._dropout_factors(inputs)
        if kept:
            inputs = inputs * kept[0]
        for heads in self._groups:
            parameters = [value.detach().requires_grad_() for value in self._parameters(heads)]
            logits = _logits(parameters, inputs, kept[1:])
            with torch.no_grad():
                gradient = self._loss_gradient(logits, targets, rows, heads) * share[:, heads]
            self._update(heads, torch.autograd.grad(logits, parameters, gradient), lr_factor)

    def _dropout_factors(self, inputs: Tensor) -> list[Tensor]:
        """Factors of the inputs of each linear layer, float [B, width]; empty without dropout."""
        if not self.dropout:
            return []
        return [
            nn.functional.dropout(inputs.new_ones(len(inputs), weight.shape[2]), self.dropout)
            for weight in self.weights
        ]

    def _loss_gradient(self, logits: Tensor, targets: Targets, rows: Tensor, heads: slice) -> Tensor:
        """Gradient of each sample's loss by the logits of some heads, [B, K, num_logits]."""
        smoothing, balanced = self._smoothing[:, heads], self._balanced[:, heads]
        labels, weights = targets.values[rows], targets.class_weights
        if targets.several_labels:
            smoothed = labels[:, None] * (1 - smoothing) + smoothing / 2
            positive = torch.where(balanced, weights, 1.0)
            return (logits.sigmoid() * (1 + (positive - 1) * smoothed) - positive * smoothed) / targets.num_classes
        labels = labels.clamp(min=0)
        if targets.num_logits == 1:
            smoothed = labels[:, None, None] * (1 - smoothing) + smoothing / 2
            gradient = logits.sigmoid() - smoothed
            weight = (1 - smoothed) * weights[0] + smoothed * weights[1]
        else:
            gradient = logits.softmax(2) - smoothing / targets.num_classes
            rest = (smoothing - 1).expand(len(rows), -1, 1)
            gradient.scatter_add_(2, labels[:, None, None].expand(-1, logits.shape[1], 1), rest)
            weight = weights[labels][:, None, None] * (1 - smoothing) + smoothing * weights.mean()
        return gradient * torch.where(balanced, weight, 1.0)

    @torch.no_grad()
    def _update(self, heads: slice, gradients: Sequence[Tensor], lr_factor: float) -> None:
        """One step of AdamW of some heads, each with its own learning rate and weight decay."""
        (beta1, beta2), lr = BETAS, self._lr[heads] * lr_factor
        step_size = lr / (1 - beta1**self._steps)
        root = math.sqrt(1 - beta2**self._steps)
        for parameter, gradient, moments in zip(self._parameters(heads), gradients, self._moments, strict=True):
            mean, square = (moment[heads] for moment in moments)
            decays = parameter.ndim == 3 or self.plan.decay_biases
            keep = 1 - lr * self._weight_decay[heads] if decays else torch.ones_like(lr)
            shape = (len(lr), *(1,) * (parameter.ndim - 1))
            rows = max(UPDATE_ELEMENTS // parameter[0].numel(), 1) if parameter.is_cpu else len(parameter)
            parts = zip(
                *(
                    torch.split(value, rows)
                    for value in (parameter, gradient, mean, square, step_size.view(shape), keep.view(shape))
                ),
                strict=True,
            )
            for values, slope, first, second, size, kept in parts:
                first.lerp_(slope, 1 - beta1)
                second.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
                # mean / (sqrt(square) / root + epsilon), in fewer passes over memory
                scaled = second.sqrt().add_(EPSILON * root)
                values.mul_(kept).addcmul_(torch.div(first, scaled, out=scaled), size, value=-root)

    @torch.no_grad()
    def logits(self, features: Rows, samples: npt.NDArray[np.int64], heads: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [B, K, num_logits] of some samples by some heads, and the ids int64 [B], block by block."""
        for start in range(0, len(samples), EVALUATION_ROWS):
            block = samples[start : start + EVALUATION_ROWS]
            rows = torch.from_numpy(block).to(self.device)
            yield _logits(self._parameters(heads), features.rows(block, None).to(self.device)), rows

    def copy_to(self, head: nn.Sequential, number: int) -> None:
        """Set the weights of ``head`` to those of the head ``number``."""
        linear = [layer for layer in head if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer, weight, bias in zip(linear, self.weights, self.biases, strict=True):
                layer.weight.copy_(weight[number])
                layer.bias.copy_(bias[number])


def _logits(parameters: Sequence[Tensor], inputs: Tensor, factors: Sequence[Tensor] = ()) -> Tensor:
    """Logits [B, K, num_logits] of features [B, F].

    Args:
        parameters: weights [K, width, inputs] of each linear layer, then biases [K, width].
        inputs: features, float [B, F].
        factors: of the inputs of each layer behind the first one, float [B, width]; empty: none.
    """
    weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
    count, width = biases[0].shape
    first = torch.addmm(biases[0].reshape(-1), inputs, weights[0].reshape(count * width, -1).T)
    values = first.view(len(inputs), count, width)
    if len(weights) == 1:
        return values
    values = values.transpose(0, 1)
    for number, (weight, bias) in enumerate(zip(weights[1:], biases[1:], strict=True)):
        values = values.relu()
        if factors:
            values = values * factors[number]
        values = torch.baddbmm(bias[:, None], values, weight.transpose(1, 2))
    return values.transpose(0, 1)


def initial_head(features: int, hidden: Sequence[int], num_logits: int, seed: int) -> nn.Sequential:
    """A head with random weights, the same for the same seed."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_head(features, hidden, num_logits)


def heads_per_block(features: int, hidden: Sequence[int], num_logits: int, batch_size: int, limit: float) -> int:
    """How many heads of a shape train together in ``limit`` bytes: weights, gradients, moments and activations."""
    widths = [features, *hidden, num_logits]
    parameters = sum((width + 1) * following for width, following in itertools.pairwise(widths))
    activations = max(batch_size, EVALUATION_ROWS) * sum(widths[1:])
    return max(int(limit / (4 * (4 * parameters + 5 * activations))), 1)
