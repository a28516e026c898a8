"""Which parameter is updated how: groups with learning rates and decay of their own, in one pass where torch can."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from job.errors import ConfigError, JobError
from job.model.classifier import Classifier
from job.model.freeze import split_layers

BANDS = 8
"""Parts of the backbone, from its input to its output, that differ in learning rate where layers do."""


class ParameterGroup(NamedTuple):
    """Parameters, their learning rate relative to the head's, and whether weight decay acts on them."""

    parameters: list[nn.Parameter]
    lr_factor: float
    decays: bool


def parameter_groups(
    net: Classifier, *, unfreeze_last: float, lr_factor: float, first_lr_factor: float, decay_norm_and_bias: bool
) -> list[ParameterGroup]:
    """All parameters, each in one group; none is empty, the head's is the first.

    Args:
        unfreeze_last: share of the backbone's layers that is a group of its own.
        lr_factor: learning rate of the backbone's last layers, relative to the head's.
        first_lr_factor: that of its first ones, relative to its last; in between it falls geometrically
            (discriminative fine-tuning, arXiv:1801.06146).
        decay_norm_and_bias: False: vectors are groups of their own, without decay.
    """
    if first_lr_factor == 1:
        factors_and_layers = [(lr_factor, layers) for layers in reversed(split_layers(net.backbone, unfreeze_last))]
    else:
        layers, _ = split_layers(net.backbone, 0)
        bands = min(BANDS, len(layers))
        bounds = [len(layers) * band // bands for band in range(bands + 1)]
        factors_and_layers = [
            (lr_factor * first_lr_factor ** (1 - band / max(bands - 1, 1)), layers[bounds[band] : bounds[band + 1]])
            for band in reversed(range(bands))
        ]
    groups = [ParameterGroup(list(net.head.parameters()), 1.0, True)]
    for factor, members in factors_and_layers:
        groups.append(ParameterGroup([p for layer in members for p in layer.parameters(recurse=False)], factor, True))
    if not decay_norm_and_bias:
        groups = [
            ParameterGroup([p for p in group.parameters if (p.ndim > 1) == decays], group.lr_factor, decays)
            for decays in (True, False)
            for group in groups
        ]
    return [group for group in groups if group.parameters]


def make_optimizer(factory: Callable[[Iterable[nn.Parameter]], Optimizer], groups: list[ParameterGroup]) -> Optimizer:
    """An optimizer of all groups.

    Raises:
        ConfigError: it does not take them.
    """
    with _optimizer_errors(factory):
        optimizer = factory(groups[0].parameters)
        add_groups(optimizer, groups[1:])
    return optimizer


def stand_ins(groups: list[ParameterGroup], device: torch.device | str = "cpu") -> list[ParameterGroup]:
    """Groups of the same number, rates and dimensions, with parameters of a few numbers."""
    return [
        group._replace(
            parameters=[
                nn.Parameter(torch.full((2,) * dimensions, 0.5, device=device))
                for dimensions in sorted({parameter.ndim for parameter in group.parameters})
            ]
        )
        for group in groups
    ]


def require_step(factory: Callable[[Iterable[nn.Parameter]], Optimizer], groups: list[ParameterGroup]) -> None:
    """Take a step on stand-ins of ``groups``.

    Raises:
        ConfigError: the optimizer cannot, as SparseAdam with dense gradients.
    """
    device = groups[0].parameters[0].device
    substitutes = stand_ins(groups, device)
    optimizer = make_optimizer(factory, substitutes)
    for group in substitutes:
        for parameter in group.parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
    with _optimizer_errors(factory):
        optimizer.step(lambda: 1.0)


@contextlib.contextmanager
def _optimizer_errors(factory: Any) -> Iterator[None]:
    """Turn what an optimizer raises about its parameters or settings into a :class:`~job.errors.ConfigError`."""
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
    """Let ``optimizer`` update these, too."""
    for parameters, factor, decays in groups:
        more = {} if decays else {"weight_decay": 0.0}
        optimizer.add_param_group({"params": parameters, "lr": optimizer.defaults["lr"] * factor, **more})


def fuse(optimizer: Optimizer, device: torch.device) -> None:
    """Update all parameters of a group in one pass, where torch can on this device and the user has not said how.

    On a CPU a step of resnet50's Adam takes half the time (``benchmarks/train.py``).
    """
    if device.type not in ("cpu", "cuda"):
        return
    for group in (optimizer.defaults, *optimizer.param_groups):
        if group.get("fused", False) is None and not group.get("foreach"):
            group["fused"] = True
    optimizer.register_load_state_dict_post_hook(_lay_out_as_parameters)


def _lay_out_as_parameters(optimizer: Optimizer) -> None:
    """Give loaded moments the memory layout of their parameters.

    A fused update takes both by their place in memory (torch 2.14), and a checkpoint's may lie in another order:
    each weight would be updated by the moments of another one.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def with_fusion_of(states: list[dict[str, Any]], optimizer: Optimizer) -> None:
    """Let saved optimizer states, maybe of another device, be updated as ``optimizer`` does."""
    for state in states:
        for group in state["param_groups"]:
            if "fused" in group:
                group["fused"] = optimizer.defaults.get("fused")
