"""Options ``--monitoring.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from job.errors import ConfigError
from job.model.evaluation import MOST_IMAGES

MOST_PROJECTED = 5000


@dataclass(frozen=True)
class MonitoringSettings:
    """Chooses what TensorBoard and the report show besides scalars.

    Args:
        images: images of each kind in TensorBoard and in the report: an augmented training batch before MixUp and
            CutMix, validation samples with their predictions, and the worst errors. 0: none.
        projector: validation images in TensorBoard's projector, at most 5000, by their backbone features at the end
            of the run. 0: none.
        gradient_norm: log the norm of all gradients, or that of each parameter group as well.
    """

    images: int = 16
    projector: int = 0
    gradient_norm: Literal["total", "per_group"] = "total"

    def __post_init__(self) -> None:
        for name, value, most in (("images", self.images, MOST_IMAGES), ("projector", self.projector, MOST_PROJECTED)):
            if not 0 <= value <= most:
                raise ConfigError(f"--monitoring.{name} must be from 0 to {most}, not {value}.")
