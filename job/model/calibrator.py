"""Calibration of a trained network's probabilities: temperature scaling or Platt scaling, as a checkpoint holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from job import typed
from job.checkpoint.state import CALIBRATOR_KEY
from job.errors import CheckpointError
from job.model.selective import RiskCoverage
from job.model.spec import MAX_CLASSES, TaskName
from job.storage.tensor_file import printable

FORMAT = 1
LOWEST_SCALE, HIGHEST_SCALE = 0.05, 20.0
"""Bounds of a temperature, and of the factor of a class's logits."""
MOST_OFFSET = 20.0
LARGEST_LOGIT = 24 * math.log(2)
"""Beyond it the sigmoid of a logit is 1 in float32, where 1 + exp(-logit) rounds to 1."""

Scale = Annotated[float, Meta(ge=LOWEST_SCALE, le=HIGHEST_SCALE)]
Offset = Annotated[float, Meta(ge=-MOST_OFFSET, le=MOST_OFFSET)]
Method = Literal["temperature", "platt"]


class Calibrator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A monotonic transform of a network's logits, after which probabilities are frequencies.

    One label per image: all logits are divided by a temperature (Guo et al., arXiv:1706.04599), which changes no
    prediction. It is 1 where no temperature helps, so that ``risk_coverage`` alone counts. Several labels: each class's
    logit becomes ``scale * logit + offset`` (Platt, 1999).

    Attributes:
        method: which of the two.
        temperature: above 1 for a network that is too confident.
        scale: per class, for several labels.
        offset: per class, for several labels.
        samples: validation samples that it was fitted to.
        risk_coverage: precision of the most confident predictions; None for several labels.
        format: version of this description.
    """

    method: Method
    samples: Annotated[int, Meta(ge=1, lt=2**53)]
    temperature: Scale = 1.0
    scale: Annotated[list[Scale], Meta(max_length=MAX_CLASSES)] = []
    offset: Annotated[list[Offset], Meta(max_length=MAX_CLASSES)] = []
    risk_coverage: RiskCoverage | None = None
    format: Annotated[int, Meta(ge=1)] = FORMAT

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.temperature, *self.scale, *self.offset))):
            raise ValueError("a temperature, scale or offset is not a finite number")
        if len(self.scale) != len(self.offset) or bool(self.scale) != (self.method == "platt"):
            raise ValueError("scale and offset are not one per class of Platt scaling")

    def apply(self, logits: Tensor) -> Tensor:
        """Calibrated logits, float32 [B, num_logits], from those of the network."""
        scale, offset = self.factors(logits.device)
        return logits.float() * scale + offset

    def factors(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Factors and offsets of the logits, float32 [1], or [C] for several labels."""
        values = ([1 / self.temperature], [0.0]) if self.method == "temperature" else (self.scale, self.offset)
        scale, offset = (torch.tensor(each, dtype=torch.float32, device=device) for each in values)
        return scale, offset

    def calibrated_thresholds(self, thresholds: Sequence[float]) -> list[float]:
        """Thresholds of calibrated probabilities at which the decisions are those at ``thresholds`` before.

        Args:
            thresholds: probability of each class, of several labels, from which it is predicted.
        """
        before = torch.logit(torch.tensor(list(thresholds), dtype=torch.float64)).clamp(max=LARGEST_LOGIT)
        scale, offset = (torch.tensor(each, dtype=torch.float64) for each in (self.scale, self.offset))
        converted: list[float] = torch.sigmoid(scale * before + offset).tolist()
        return converted

    @property
    def is_identity(self) -> bool:
        """Whether it leaves all logits as they are."""
        return self.method == "temperature" and self.temperature == 1

    @property
    def calibrated_classes(self) -> int:
        """Number of classes whose logits change, of several labels."""
        return sum(pair != (1.0, 0.0) for pair in zip(self.scale, self.offset, strict=True))


def read_calibrator(saved: Mapping[str, Any], source: str, classes: int, task: TaskName) -> Calibrator | None:
    """The calibrator by which the checkpoint ``source`` changes probabilities; None where it has none.

    Arguments and errors are those of :func:`read_fitted`.
    """
    fitted = read_fitted(saved, source, classes, task)
    return None if fitted is None or fitted.is_identity else fitted


def read_fitted(saved: Mapping[str, Any], source: str, classes: int, task: TaskName) -> Calibrator | None:
    """The calibrator that validation fitted, which may leave probabilities as they are; None where it fitted none.

    Args:
        saved: the checkpoint, untrusted.
        source: its URI, for messages.
        classes: number of the network's classes.
        task: of the network.

    Raises:
        CheckpointError: it is damaged, belongs to another network, or is of a newer version.
    """
    entry = saved.get(CALIBRATOR_KEY)
    if entry is None:
        return None
    version = entry.get("format", 1) if isinstance(entry, Mapping) else 1
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{source} has a calibration of format {version}, and this version of job reads formats up to {FORMAT}. "
            "Install the version that wrote it, or predict with --calibrated=false."
        )
    try:
        calibrator = typed.from_builtins(entry, Calibrator)
        if (calibrator.method == "platt") != (task == "multilabel"):
            raise ValueError(f"its method {calibrator.method} is not that of a {task} network")
        if calibrator.scale and len(calibrator.scale) != classes:
            raise ValueError(f"it has {len(calibrator.scale)} classes, and the network {classes}")
    except (ValueError, RecursionError) as error:  # msgspec's are of this class
        raise CheckpointError(
            f"the calibration in {source} is damaged: {printable(str(error))}. Use another checkpoint, or predict with "
            "--calibrated=false."
        ) from error
    return calibrator
