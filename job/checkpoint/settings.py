"""Options of the group ``--checkpoint``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from job.checkpoint.manifest import Mode
from job.checkpoint.ranking import mode_of
from job.errors import ConfigError


@dataclass(frozen=True)
class CheckpointSettings:
    """Saves checkpoints at the end of epochs and, optionally, within epochs.

    Args:
        every_n_epochs: epochs between two checkpoints; the last epoch always has one. In an epoch that has one, every
            validation (--trainer.val_check_interval) has one, too.
        every_n_steps: optimizer steps between two checkpoints within an epoch; default: none.
        every_minutes: minutes between two checkpoints within an epoch; default: none.
        monitor: validation metric that ranks checkpoints. Default: val/accuracy, or val/mAP with
            --model.task=multilabel.
        mode: "max" or "min": whether a higher or a lower value is better. Default: by the metric's name, "min" for a
            loss or an error, "max" for accuracy, F1 and the like.
        keep_last: number of newest checkpoints to keep, at least 1.
        keep_best: number of best checkpoints to keep in addition.
        keep_every_n_epochs: never delete the checkpoint of every n-th epoch. Default: none.
        upload_seconds: seconds to retry an upload to an unreachable bucket before the run ends.
    """

    every_n_epochs: int = 1
    every_n_steps: int | None = None
    every_minutes: float | None = None
    monitor: str | None = None
    mode: Literal["max", "min"] | None = None
    keep_last: int = 2
    keep_best: int = 1
    keep_every_n_epochs: int | None = None
    upload_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, least in (
            ("every_n_epochs", 1),
            ("every_n_steps", 1),
            ("keep_last", 1),
            ("keep_best", 0),
            ("keep_every_n_epochs", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--checkpoint.{name} must be at least {least}, not {value}.")
        mode_of(self.metric, self.mode)

    @property
    def metric(self) -> str:
        """The metric that ranks checkpoints."""
        return self.monitor or "val/accuracy"

    def with_default_metric(self, metric: str) -> CheckpointSettings:
        """These settings, with ``metric`` in place of a ``monitor`` that is not given."""
        return replace(self, monitor=self.monitor or metric)

    @property
    def ranking_mode(self) -> Mode:
        """The direction in which the metric is better."""
        return mode_of(self.metric, self.mode)
