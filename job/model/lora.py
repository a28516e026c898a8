"""Low-rank adaptation (LoRA, arXiv:2106.09685): fine-tuning of a backbone whose own weights stay as they are.

An adapted weight is ``W + lora_alpha / lora_rank * B @ A``, of which only A and B train; B starts at zero. It is one of
torch's parametrizations: layers read the sum as their weight, also where a network uses the weight without calling the
layer (``nn.MultiheadAttention``; Swin, BEiT, EVA and DINOv3 in timm and torchvision), which wrappers such as peft's do
not adapt. Checkpoints hold the sums under the layers' own names, so that whatever reads them needs no adapters, and
beside them what training continues with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from job.checkpoint.state import LORA_KEY
from job.errors import CheckpointError, ConfigError
from job.model.spec import PREFIX

if TYPE_CHECKING:
    from job.model.config import ModelConfig

ATTENTION = re.compile(r"attn|attention")
"""Part of the names of attention modules in torchvision and timm."""
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights of ``nn.MultiheadAttention`` that are not those of a layer within it."""
_TENSOR = re.compile(r"(?:(?P<module>.+)\.)?parametrizations\.(?P<weight>\w+)\.(?P<part>original|0\.lora_[AB])")
"""Names of an adapted weight's tensors in a state dict."""


class LowRankUpdate(nn.Module):
    """Adds ``alpha / rank * B @ A`` to a weight.

    Args:
        weight: float [outputs, inputs].
        rank: of the update.
        alpha: factor of the update, times ``rank``.
        dropout: probability that an input of the update is zeroed, in training; for all samples of a batch alike.
        generator: draws the initial values of A.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.alpha = alpha
        self.dropout = dropout
        initial = torch.empty(rank, inputs, dtype=weight.dtype, device=generator.device)
        nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(initial.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, float [outputs, inputs]."""
        down: Tensor = self.lora_A
        if self.training and self.dropout:
            down = down * F.dropout(torch.ones_like(down[:1]), self.dropout)
        # In mixed precision the sum has all bits, and layers round it as they round any weight.
        with torch.autocast(weight.device.type, enabled=False):
            return adapted(weight, down, self.lora_B, self.alpha)


def adapted(weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """``weight + alpha / rank * up @ down``; equal to ``weight``, bit for bit, if ``up`` is zero.

    Args:
        weight: float [outputs, inputs].
        down: A, float [rank, inputs].
        up: B, float [outputs, rank].
        alpha: factor of the update, times ``rank``.
    """
    return torch.addmm(weight, up, down, alpha=alpha / len(down))


def add_adapters(backbone: nn.Module, config: ModelConfig) -> int:
    """Adapt the weights that ``config`` names; returns their number.

    Raises:
        ConfigError: the backbone has none, as a convolutional network, or the rank is larger than theirs.
    """
    weights = adaptable_weights(backbone, config)
    generator = torch.Generator().manual_seed(config.seed)
    for module, name in weights:
        update = LowRankUpdate(
            getattr(module, name), config.lora_rank, config.lora_alpha, config.lora_dropout, generator
        )
        parametrize.register_parametrization(module, name, update)
    return len(weights)


def adaptable_weights(backbone: nn.Module, config: ModelConfig) -> list[tuple[nn.Module, str]]:
    """Modules of a backbone, and the names of their weights that ``config`` adapts.

    Raises:
        ConfigError: as :func:`add_adapters`.
    """
    every = [(path, module, name) for path, module in backbone.named_modules() for name in _matrices(module)]
    weights = [(module, name) for path, module, name in every if config.lora_targets == "all" or ATTENTION.search(path)]
    if not weights:
        layers = "linear layers" if config.lora_targets == "all" else "attention with linear layers"
        other = f"--model.lora_targets=all adapts its {len(every)} linear layers. Or use" if every else "Use"
        raise ConfigError(
            f"--model.lora_rank: {config.backbone} has no {layers} to adapt. {other} a vision transformer, as vit_b_16 "
            "or timm/vit_base_patch16_224, or leave the option out and unfreeze layers by --model.milestones."
        )
    most = max(min(getattr(module, name).shape) for module, name in weights)
    if config.lora_rank > most:
        raise ConfigError(
            f"--model.lora_rank {config.lora_rank} is higher than the rank of any adapted layer of {config.backbone}, "
            f"{most}. Use a lower one: 4 to 64 are usual."
        )
    return weights


def _matrices(module: nn.Module) -> Iterator[str]:
    """Names of a module's own weights that multiply its input."""
    if isinstance(module, nn.Linear):
        yield "weight"
    elif isinstance(module, nn.MultiheadAttention):
        yield from (name for name in PROJECTIONS if getattr(module, name) is not None)


def adapters(backbone: nn.Module) -> list[LowRankUpdate]:
    """The adapters of a backbone, in the order of its layers; none without LoRA."""
    return [module for module in backbone.modules() if isinstance(module, LowRankUpdate)]


def merge(state: Mapping[str, Any], alpha: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the state dict of a network with adapters.

    Args:
        state: tensors by name.
        alpha: of the adapters.

    Returns:
        The state dict of the same network without adapters, whose weights contain the updates, in its order of names;
        and the tensors of the adapted weights, by their names in ``state``.
    """
    parts = {name: match for name in state if (match := _TENSOR.fullmatch(name))}
    sums: dict[str, dict[str, Tensor]] = {}  # by module, since the weights of a module come before its biases
    for match in parts.values():
        if match["part"] == "original":
            original, down, up = (
                state[f"{match[0].removesuffix('original')}{part}"] for part in ("original", "0.lora_A", "0.lora_B")
            )
            name = f"{match['module']}.{match['weight']}" if match["module"] else match["weight"]
            with torch.no_grad():
                sums.setdefault(match["module"] or "", {})[name] = adapted(original, down, up, alpha)
    merged: dict[str, Any] = {}
    for name, value in state.items():
        module = parts[name]["module"] or "" if name in parts else name.rpartition(".")[0]
        merged |= sums.pop(module, {})
        if name not in parts:
            merged[name] = value
    return merged, {name: state[name] for name in parts}


def merged_state(backbone: nn.Module) -> dict[str, Any]:
    """State dict of a backbone without adapters; its weights contain the updates of those that it has."""
    updates, state = adapters(backbone), backbone.state_dict()
    return merge(state, updates[0].alpha)[0] if updates else state


def save(checkpoint: dict[str, Any], alpha: float) -> None:
    """Put the sums into the checkpoint's ``state_dict``, and the tensors of which they are made beside it."""
    checkpoint["state_dict"], parts = merge(checkpoint["state_dict"], alpha)
    checkpoint[LORA_KEY] = {name.removeprefix(PREFIX): value for name, value in parts.items()}


def require_none(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume without adapters a run that has them.

    Raises:
        CheckpointError: it has them.
    """
    if LORA_KEY in checkpoint:
        raise CheckpointError(
            "the checkpoint is of a run that trains adapters. Use its --model.lora_rank, or another --run_dir; "
            "--init_from starts that from its weights."
        )


def restore(checkpoint: dict[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Undo :func:`save`: the checkpoint's ``state_dict`` is that of the network with adapters afterwards.

    Args:
        checkpoint: untrusted.
        expected: state dict of the network with adapters, whose names and shapes the saved tensors must have.

    Raises:
        CheckpointError: the checkpoint is of a run without LoRA, or with other adapters.
    """
    saved = checkpoint.get(LORA_KEY)
    shapes = {name: value.shape for name, value in expected.items() if _TENSOR.fullmatch(name)}
    if not isinstance(saved, dict) or {n: getattr(v, "shape", None) for n, v in saved.items()} != shapes:
        raise CheckpointError(
            "the checkpoint does not hold the adapters of this run. Use the --model.lora_rank and --model.lora_targets "
            "it was trained with, or another --run_dir."
        )
    merged = {PREFIX + re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name) for name in shapes}
    plain = {name: value for name, value in checkpoint["state_dict"].items() if name not in merged}
    checkpoint["state_dict"] = plain | {PREFIX + name: value for name, value in saved.items()}
