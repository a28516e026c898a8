"""Metrics of training steps, from the steps' own logits: no forward pass of their own, and exact over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from job.data.dataset import Batch

STEPS_AT_ONCE = 16
LOGITS_AT_ONCE = 1 << 20
"""Steps, and logits, that are added together: each addition takes 0.1 ms, a tenth of a step from cached features."""


class TrainingMetrics:
    """Mean loss over the steps of an epoch so far.

    Sums stay on the device of the logits, and are fetched when logs are due. Samples that cannot be read do not count,
    nor do those whose loss is not finite: their step is skipped, or ends the run. After a resume within an epoch the
    rest of it counts alone.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._logits = 0
        self._sums: Tensor | None = None
        self._epoch: list[float] = []

    def start_epoch(self) -> None:
        """Forget all samples."""
        self._pending, self._logits, self._sums, self._epoch = [], 0, None, []

    def add(self, losses: Tensor, logits: Tensor, batch: Batch) -> None:
        """Add a step: losses [B], logits [B, num_logits]."""
        self._pending.append((losses.detach(), logits.detach(), self._labels(batch), batch["mask"]))
        self._logits += logits.numel()
        # XLA would compile a program for each number of steps.
        most = 1 if logits.device.type == "xla" else STEPS_AT_ONCE
        if len(self._pending) >= most or self._logits >= LOGITS_AT_ONCE:
            self._process()

    def compute(self, add_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Metrics of the epoch so far, by name; a collective operation.

        Args:
            add_ranks: returns the sum of a tensor over all ranks.
        """
        self._process()
        if self._sums is not None:
            sums = add_ranks(self._sums).tolist()
            self._epoch = [one + other for one, other in zip(self._epoch or [0.0] * len(sums), sums, strict=True)]
            self._sums = None
        return self._values(self._epoch) if self._epoch else {}

    def _process(self) -> None:
        if not self._pending:
            return
        losses, logits, labels, mask = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._logits = [], 0
        mask = mask & losses.isfinite()
        sums = [torch.where(mask, losses, 0.0).sum(), mask.sum(), *self._counts(logits, labels, mask)]
        # Neither XLA on TPUs nor Apple's MPS has 64-bit floats.
        dtype = torch.float64 if logits.device.type in ("cpu", "cuda") else torch.float32
        if self._sums is None:
            # A copy and no constant, for which XLA would compile another program.
            self._sums = torch.zeros(len(sums), dtype=dtype).to(logits.device)
        self._sums = self._sums + torch.stack([each.to(dtype) for each in sums])

    def _values(self, sums: Sequence[float]) -> dict[str, float]:
        loss, samples, *counts = sums
        return {"loss": loss / samples, **self._ratios(samples, *counts)} if samples else {}

    def _labels(self, batch: Batch) -> Tensor:
        return batch["label"]

    def _counts(self, logits: Tensor, labels: Tensor, mask: Tensor) -> list[Tensor]:
        """What :meth:`_ratios` divides, from logits [N, num_logits], labels and mask [N]; each a scalar."""
        return []

    def _ratios(self, samples: float, *counts: float) -> dict[str, float]:
        """Metrics by name, from the sums over samples."""
        return {}


class TrainingAccuracy(TrainingMetrics):
    """Mean loss and accuracy."""

    def _counts(self, logits: Tensor, labels: Tensor, mask: Tensor) -> list[Tensor]:
        predicted = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)
        return [((predicted == labels) & mask).sum()]

    def _ratios(self, samples: float, *counts: float) -> dict[str, float]:
        return {"accuracy": counts[0] / samples}


class TrainingF1(TrainingMetrics):
    """Mean loss and micro F1, of several labels, where a class is predicted from a probability of 0.5.

    Args:
        num_classes: number of classes.
    """

    THRESHOLD: ClassVar[float] = 0.0  # in log-odds

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def _labels(self, batch: Batch) -> Tensor:
        return batch["labels"] if "labels" in batch else F.one_hot(batch["label"].clamp(min=0), self.num_classes)

    def _counts(self, logits: Tensor, labels: Tensor, mask: Tensor) -> list[Tensor]:
        predicted, true = logits >= self.THRESHOLD, labels > 0
        counted = mask[:, None]
        return [(predicted & true & counted).sum(), ((predicted != true) & counted).sum()]

    def _ratios(self, samples: float, *counts: float) -> dict[str, float]:
        hits, wrong = counts
        return {"micro_f1": 2 * hits / (2 * hits + wrong)} if hits + wrong else {}
