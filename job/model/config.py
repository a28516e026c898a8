"""Hyperparameters of the model: the options ``--model.*``, and the arguments of TransferLearningModel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable

from job import redact
from job.errors import ConfigError
from job.model.freeze import Stage
from job.model.pooling import Pooling
from job.model.scheduling import AutoSchedule
from job.model.spec import TaskName

FIXED = {"fixed": True}
"""Metadata of a field that a run which resumes may not change; the checkpoint and the optimizer fix others."""
LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
"""Fields that have no effect if ``lora_rank`` is 0."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyperparameters of the network and of its training.

    Args:
        task: "classification" if each image has exactly one class, "multilabel" if any number of them.
        backbone: architecture: a name of torchvision.models (resnet50, vit_b_16, …), or timm/NAME.
        weights: pretrained weights: DEFAULT (the library's own), none (random), the URI of a state dict or checkpoint
            (.pth, .safetensors, .ckpt), or another run's run_dir (its best checkpoint).
        pooling: how a vision transformer of timm makes one feature vector of an image's tokens: "cls" (class token),
            "mean" (of the patch tokens), "cls+mean" (both, concatenated), or "auto" (the architecture's own).
        hidden: widths of the head's hidden layers.
        dropout: dropout of the inputs of each of the head's linear layers, from 0 to below 1.
        mean: per-channel mean of the pretraining images, in [0, 1]. Default: that of the pretrained weights.
        std: per-channel standard deviation of the pretraining images. Default: that of the pretrained weights.
        milestones: epochs at which the last layers, then all layers, are unfrozen.
        unfreeze_last: fraction of the backbone's layers that the first milestone unfreezes.
        train_bn: train batch normalisation layers in the frozen part of the backbone, too.
        backbone_lr_factor: learning rate of the backbone's last layers, relative to the head's.
        first_lr_factor: learning rate of the backbone's first layers, relative to its last layers'. In between it falls
            geometrically, in 8 steps.
        lora_rank: rank of LoRA adapters in the backbone, a vision transformer, which train in place of its weights; 0
            disables LoRA. Milestones then unfreeze adapters.
        lora_alpha: factor of the adapters, times their rank.
        lora_dropout: dropout of the adapters' inputs, from 0 to below 1; for all samples of a batch alike.
        lora_targets: adapt the linear layers of "attention", or "all" linear layers of the backbone.
        decay_norm_and_bias: apply weight decay to biases and normalisation layers, too.
        label_smoothing: label smoothing, from 0 to below 1.
        class_weights: "balanced" weights each class's training loss inversely to its frequency; with task=multilabel,
            its positive samples by the number of negative per positive ones, between 0.01 and 100.
        mixup: alpha of MixUp; 0 disables. Images are mixed within each rank's slice of the batch.
        cutmix: alpha of CutMix; 0 disables. With both, each batch uses one of them at random.
        ema: EMA decay; EMA weights are used for validation and inference; 0 disables.
        compile_backbone: compile the backbone by torch.compile, which needs a C++ compiler.
        lr: learning rate of the head; overrides the optimizer's.
        optimizer: any torch optimizer. Default: Adam.
        lr_scheduler: any torch scheduler. Default: MultiStepLR at milestones, with lr_gamma. Arguments that count
            intervals (total_steps, total_iters, T_max, …) may be "auto", the length of the run. max_lr of OneCycleLR is
            the head's learning rate, or a list with one per parameter group.
        lr_gamma: factor of the default scheduler.
        lr_interval: step the scheduler per "epoch" or per optimizer "step".
        nonfinite: at a loss or gradient that is not finite, "stop" ends the run and "skip" skips the optimizer step.
            "skip" synchronises with the GPU in each step.
        max_skipped_steps: consecutive steps that nonfinite="skip" may skip before the run ends.
        seed: seed of the head's initial weights; follows --seed_everything.

    Raises:
        ConfigError: a value is out of its range.
    """

    task: TaskName = "classification"
    backbone: str = "resnet50"
    weights: str = "DEFAULT"
    pooling: Pooling = "auto"
    hidden: list[int] = field(default_factory=lambda: [256, 32])
    dropout: float = field(default=0.0, metadata=FIXED)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    milestones: list[int] = field(default_factory=lambda: [5, 10], metadata=FIXED)
    unfreeze_last: float = field(default=0.5, metadata=FIXED)
    train_bn: bool = field(default=False, metadata=FIXED)
    backbone_lr_factor: float = field(default=0.1, metadata=FIXED)
    first_lr_factor: float = field(default=1.0, metadata=FIXED)
    lora_rank: int = field(default=0, metadata=FIXED)
    lora_alpha: float = field(default=16.0, metadata=FIXED)
    lora_dropout: float = field(default=0.0, metadata=FIXED)
    lora_targets: Literal["attention", "all"] = field(default="attention", metadata=FIXED)
    decay_norm_and_bias: bool = field(default=True, metadata=FIXED)
    label_smoothing: float = field(default=0.0, metadata=FIXED)
    class_weights: Literal["none", "balanced"] = field(default="none", metadata=FIXED)
    mixup: float = field(default=0.0, metadata=FIXED)
    cutmix: float = field(default=0.0, metadata=FIXED)
    ema: float = field(default=0.0, metadata=FIXED)
    compile_backbone: bool = False
    lr: float | None = None
    optimizer: OptimizerCallable = torch.optim.Adam
    lr_scheduler: AutoSchedule | LRSchedulerCallable | None = None
    lr_gamma: float = 0.3
    lr_interval: Literal["epoch", "step"] = field(default="epoch", metadata=FIXED)
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if sorted(self.milestones) != list(self.milestones) or len(self.milestones) > Stage.ALL:
            raise ConfigError(f"--model.milestones must be at most two epochs in rising order, not {self.milestones}.")
        if not 0 < self.unfreeze_last <= 1:
            raise ConfigError(f"--model.unfreeze_last must be above 0 and at most 1, not {self.unfreeze_last}.")
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"--model.hidden must be positive widths, not {self.hidden}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--model.dropout must be at least 0 and below 1, not {self.dropout}.")
        if self.lora_rank < 0:
            raise ConfigError(f"--model.lora_rank must be at least 0, not {self.lora_rank}.")
        if not 0 < self.lora_alpha < math.inf:
            raise ConfigError(f"--model.lora_alpha must be a positive number, not {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"--model.lora_dropout must be at least 0 and below 1, not {self.lora_dropout}.")
        if self.lora_rank and self.train_bn:
            raise ConfigError("--model.lora_rank keeps the backbone's own layers frozen. Use --model.train_bn=false.")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"--model.label_smoothing must be at least 0 and below 1, not {self.label_smoothing}.")
        if self.mixup < 0 or self.cutmix < 0:
            raise ConfigError(
                f"--model.mixup and --model.cutmix must be at least 0, not {self.mixup} and {self.cutmix}."
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"--model.ema must be at least 0 and below 1, not {self.ema}.")
        if not 0 < self.first_lr_factor <= 1:
            raise ConfigError(f"--model.first_lr_factor must be above 0 and at most 1, not {self.first_lr_factor}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"--model.lr must be a positive number, not {self.lr}.")
        if self.max_skipped_steps < 0:
            raise ConfigError(f"--model.max_skipped_steps must be at least 0, not {self.max_skipped_steps}.")

    def plain_values(self) -> dict[str, Any]:
        """The fields that are numbers, text or lists of them, by name; URIs without credentials."""
        values = {each.name: _as_list(getattr(self, each.name)) for each in fields(self)}
        kinds = (bool, int, float, str, list)
        plain = {name: value for name, value in values.items() if value is None or isinstance(value, kinds)}
        return {**plain, "weights": redact.identity(self.weights)}

    def fixed_values(self) -> dict[str, Any]:
        """The :data:`FIXED` fields, by name."""
        values = {each.name: _as_list(getattr(self, each.name)) for each in fields(self) if "fixed" in each.metadata}
        # None is what a checkpoint has that lacks the field, as those of earlier versions do.
        values |= {name: value if self.lora_rank else None for name, value in values.items() if name in LORA}
        return {**values, "dropout": self.dropout or None}


def _as_list(value: Any) -> Any:
    """A tuple as a list, which is what YAML has; other values as they are."""
    return list(value) if isinstance(value, tuple) else value
