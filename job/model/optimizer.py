"""The optimizer: parameter groups with separate learning rates and weight decay, trial runs, fused updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, ReduceLROnPlateau

from job.errors import ConfigError, JobError
from job.model.classifier import Classifier
from job.model.config import ModelConfig
from job.model.freeze import split_layers
from job.model.lora import adapters
from job.model.scheduling import build_scheduler, require_length

BANDS = 8
"""Bands of backbone layers, from input to output, that differ in learning rate if first_lr_factor is not 1."""


class ParameterGroup(NamedTuple):
    """Parameters, their learning rate relative to the head's, and whether weight decay applies to them.

    Groups that only differ in weight decay have one name: "head", "backbone/last", "backbone/first" or, of
    :data:`BANDS` bands, "backbone/2" to "backbone/7" between these. Those of adapters (LoRA) are named "lora/last" etc.
    """

    parameters: list[nn.Parameter]
    lr_factor: float
    decays: bool
    name: str


def parameter_groups(net: Classifier, config: ModelConfig) -> list[ParameterGroup]:
    """Put each parameter into one group, the head's first, then the backbone's last layers; no group is empty.

    With LoRA the adapters are in groups, in place of the backbone's own parameters.

    With ``first_lr_factor`` the learning rate falls geometrically from the backbone's last layers to its first
    (discriminative fine-tuning, arXiv:1801.06146). Without ``decay_norm_and_bias`` vectors are in groups of their own,
    without weight decay.
    """
    lr_factor, first_lr_factor = config.backbone_lr_factor, config.first_lr_factor
    if first_lr_factor == 1:
        first_and_last = split_layers(net.backbone, config.unfreeze_last)
        bands = [(lr_factor, layers) for layers in first_and_last]
    else:
        layers, _ = split_layers(net.backbone, 0)
        count = min(BANDS, len(layers))
        bounds = [len(layers) * band // count for band in range(count + 1)]
        bands = [
            (lr_factor * first_lr_factor ** (1 - band / max(count - 1, 1)), layers[bounds[band] : bounds[band + 1]])
            for band in range(count)
        ]
    part = "lora" if adapters(net.backbone) else "backbone"
    groups = [ParameterGroup(list(net.head.parameters()), 1.0, True, "head")]
    for number, (factor, members) in reversed(list(enumerate(bands, start=1))):
        name = "last" if number == len(bands) else "first" if number == 1 else str(number)
        parameters = [p for layer in members for p in layer.parameters(recurse=False)]
        groups.append(ParameterGroup(parameters, factor, True, f"{part}/{name}"))
    if not config.decay_norm_and_bias:
        groups = [
            group._replace(parameters=[p for p in group.parameters if (p.ndim > 1) == decays], decays=decays)
            for decays in (True, False)
            for group in groups
        ]
    return [group for group in groups if group.parameters]


def make_optimizer(factory: OptimizerCallable, groups: list[ParameterGroup], lr: float | None = None) -> Optimizer:
    """Create an optimizer of all groups.

    Args:
        factory: takes the first group's parameters, as ``--model.optimizer`` does.
        groups: the head's first.
        lr: the head's learning rate; None: the optimizer's own.

    Raises:
        ConfigError: it does not take them.
    """
    with _optimizer_errors(factory):
        if lr is None:
            optimizer = factory(groups[0].parameters)
        else:
            optimizer = factory([{"params": groups[0].parameters, "lr": lr}])
            optimizer.defaults["lr"] = lr
        add_groups(optimizer, groups[1:])
    return optimizer


def stand_ins(groups: list[ParameterGroup], device: torch.device | str = "cpu") -> list[ParameterGroup]:
    """Groups of the same number, rates and dimensions, whose parameters have a few numbers each."""
    return [
        group._replace(
            parameters=[
                nn.Parameter(torch.full((2,) * dimensions, 0.5, device=device))
                for dimensions in sorted({parameter.ndim for parameter in group.parameters})
            ]
        )
        for group in groups
    ]


class OptimizerTrial:
    """An optimizer and scheduler of stand-ins, to check and describe those that will train.

    Args:
        config: chooses optimizer and scheduler.
        groups: parameter groups of the network.
        device: device of the stand-ins.
        length: intervals of the scheduler in the run; None: unlimited.

    Attributes:
        settings: optimizer and scheduler, as text by option; a run that resumes must have the same.

    Raises:
        ConfigError: optimizer or scheduler cannot be created, or the optimizer cannot step, as SparseAdam with dense
            gradients.
    """

    def __init__(
        self, config: ModelConfig, groups: list[ParameterGroup], device: torch.device, length: int | None
    ) -> None:
        on_xla = device.type == "xla"
        substitutes = stand_ins(groups, "cpu" if on_xla else device)
        self._optimizer = make_optimizer(config.optimizer, substitutes, config.lr)
        self.settings = {
            "model.optimizer": f"{type(self._optimizer).__name__} {_plain_settings(self._optimizer.defaults)}"
        }
        if not on_xla:
            for group in substitutes:
                for parameter in group.parameters:
                    parameter.grad = torch.full_like(parameter, 0.1)
            with _optimizer_errors(config.optimizer):
                self._optimizer.step(lambda: 1.0)
        self._scheduler = make_scheduler(config, self._optimizer, groups, length)
        self.settings["model.lr_scheduler"] = f"MultiStepLR, lr_gamma {config.lr_gamma}"
        if config.lr_scheduler is not None:
            self.settings["model.lr_scheduler"] = self._scheduler_settings()

    def _scheduler_settings(self) -> str:
        scheduler = self._scheduler
        rates: Any = [[group["max_lr"], group["min_lr"]] for group in self._optimizer.param_groups if "max_lr" in group]
        rates = rates or getattr(scheduler, "max_lrs", "")  # OneCycleLR, or CyclicLR
        return f"{type(scheduler).__name__} {_plain_settings(scheduler.state_dict())} {rates}".rstrip()

    def require_length(self, length: int | None, interval: str) -> None:
        """Check that the scheduler lasts for the whole run: see :func:`~job.model.scheduling.require_length`."""
        require_length(self._scheduler, length, interval)


def _plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings that are numbers, text or pairs of numbers, by name."""
    kinds = (bool, int, float, str, tuple)
    return {name: settings[name] for name in sorted(settings) if isinstance(settings[name], kinds)}


def make_scheduler(
    config: ModelConfig, optimizer: Optimizer, groups: list[ParameterGroup], length: int | None
) -> LRScheduler | ReduceLROnPlateau:
    """Create the scheduler of a run that steps it ``length`` times; None: unlimited.

    Raises:
        ConfigError: it cannot be created.
    """
    if config.lr_scheduler is not None:
        factors = [group.lr_factor for group in groups]
        return build_scheduler(config.lr_scheduler, optimizer, factors=factors, length=length)
    if config.lr_interval == "step" and config.milestones:
        raise ConfigError(
            f"--model.lr_interval=step, but the default scheduler's milestones {config.milestones} are epochs. "
            "Choose a --model.lr_scheduler, or --model.lr_interval=epoch."
        )
    return MultiStepLR(optimizer, config.milestones, config.lr_gamma)


@contextlib.contextmanager
def _optimizer_errors(factory: Any) -> Iterator[None]:
    """Translate an optimizer's errors about its parameters or settings into :class:`~job.errors.ConfigError`."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:  # ValueError, RuntimeError, TypeError, AssertionError: each optimizer its own
        kinds = (factory.func, *factory.args) if isinstance(factory, partial) else (factory,)
        name = next((kind.__name__ for kind in reversed(kinds) if isinstance(kind, type)), "the optimizer")
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--model.optimizer: {name} cannot train this network, whose layers have dense gradients, parameters of "
            f"any number of dimensions and groups with learning rates of their own. It reports: {cause} "
            "Use AdamW, Adam or SGD, or other settings."
        ) from error


def add_groups(optimizer: Optimizer, groups: list[ParameterGroup]) -> None:
    """Add parameter groups, with learning rates relative to the optimizer's."""
    for parameters, factor, decays, _ in groups:
        overrides = {} if decays else {"weight_decay": 0.0}
        optimizer.add_param_group({"params": parameters, "lr": optimizer.defaults["lr"] * factor, **overrides})


def fuse(optimizer: Optimizer, device: torch.device) -> None:
    """Use torch's fused update where it exists on this device, unless the user has chosen another.

    On a CPU it halves the time of a step of resnet50's Adam (``benchmarks/train.py``). A state of another device is
    loaded without its choice.
    """
    if device.type in ("cpu", "cuda"):
        for group in (optimizer.defaults, *optimizer.param_groups):
            if group.get("fused", False) is None and not group.get("foreach"):
                group["fused"] = True
        optimizer.register_load_state_dict_post_hook(_lay_out_as_parameters)
    optimizer.register_load_state_dict_pre_hook(_keep_fused)


def _keep_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state, with ``fused`` as this optimizer has it."""
    fused = optimizer.defaults.get("fused")
    groups = [{**group, "fused": fused} if "fused" in group else group for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _lay_out_as_parameters(optimizer: Optimizer) -> None:
    """Give loaded moments the memory layout of their parameters.

    A fused update walks both in memory order (torch 2.14), and moments in a checkpoint may have another layout: each
    weight would be updated by the moments of another one.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
