"""Freezing of the backbone: a pure function of the epoch.

Lightning's BaseFinetuning keeps this in callback state, and freezes again on resume
(https://github.com/Lightning-AI/pytorch-lightning/issues/21901). Here :func:`apply_stage` sets all of it, at each epoch
and each start.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from job.model.lora import adapters


class Stage(IntEnum):
    """How much of the backbone trains."""

    HEAD = 0
    LAST_LAYERS = 1
    ALL = 2


def stage_at(epoch: int, milestones: Sequence[int]) -> Stage:
    """Stage of ``epoch`` (from 0): one further at each milestone; without milestones all layers train."""
    if not milestones:
        return Stage.ALL
    return Stage(min(sum(epoch >= milestone for milestone in milestones), Stage.ALL))


def split_layers(backbone: nn.Module, last_share: float) -> tuple[list[nn.Module], list[nn.Module]]:
    """(first, last) layers of the backbone.

    A layer is a module that owns parameters or buffers, in the order of registration, which is that of
    the forward pass in torchvision and timm; with LoRA the adapters count alone. ``last`` is the share ``last_share``
    of them, rounded up.
    """
    layers: list[nn.Module] = [*adapters(backbone)]
    layers = layers or [m for m in backbone.modules() if [*m.parameters(recurse=False), *m.buffers(recurse=False)]]
    count = min(-int(-len(layers) * last_share // 1), len(layers))
    return layers[: len(layers) - count], layers[len(layers) - count :]


def apply_stage(backbone: nn.Module, stage: Stage, *, last_share: float, train_bn: bool) -> None:
    """Set ``requires_grad`` and train/eval mode of every layer of the backbone for ``stage``.

    A frozen layer is in eval mode and keeps its running statistics: batch normalisation neither uses nor updates those
    of the batch. (Lightning sets ``track_running_stats=False``, with which it uses them;
    https://github.com/Lightning-AI/pytorch-lightning/pull/15063). With ``train_bn`` batch normalisation layers also
    train in the frozen part. With LoRA the stage is that of the adapters, and all other layers stay frozen.
    """
    has_adapters = bool(adapters(backbone))
    first, last = split_layers(backbone, last_share)
    backbone.train(stage == Stage.ALL and not has_adapters)
    if has_adapters:
        backbone.requires_grad_(False)
    for layers, trains in ((first, stage >= Stage.ALL), (last, stage >= Stage.LAST_LAYERS)):
        for layer in layers:
            active = trains or (train_bn and isinstance(layer, _BatchNorm))
            layer.training = active
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad = active
