"""Pooling of a vision transformer's tokens to one feature vector per image."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from job.errors import ConfigError

Pooling = Literal["auto", "cls", "mean", "cls+mean"]
"""``auto``: the architecture's own; ``cls``: class token; ``mean``: mean of the patch tokens; ``cls+mean``: both,
concatenated, as in the linear evaluations of DINOv2 and DINOv3."""
TIMM_NAMES = {"cls": "token", "mean": "avg", "cls+mean": "avg"}


class ClassTokenAndMean(nn.Module):
    """Class token and mean of the patch tokens, for the attention pooling of timm's vision transformers.

    Args:
        prefix_tokens: number of class and register tokens, which precede the patch tokens.
    """

    def __init__(self, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """float [B, N, C] to float [B, 2, C]."""
        return torch.stack([tokens[:, 0], tokens[:, self.prefix_tokens :].mean(dim=1)], dim=1)


def set_pooling(backbone: nn.Module, pooling: Pooling, name: str) -> None:
    """Change the pooling of a backbone without its head; the names of its tensors stay.

    Layers that the new pooling does not use, as the attention pooling of SigLIP, are removed.

    Args:
        backbone: an architecture without its head.
        pooling: of the tokens.
        name: name of the architecture, for messages.

    Raises:
        ConfigError: the architecture does not have this pooling.
    """
    if pooling == "auto":
        return
    options = _options(backbone)
    if pooling not in options:
        reason = "a vision transformer without a class token" if "mean" in options else "no vision transformer of timm"
        raise ConfigError(
            f"--model.pooling={pooling} is not possible for {name}, {reason}. It has: {', '.join(options)}."
        )
    backbone.reset_classifier(0, TIMM_NAMES[pooling])  # type: ignore[operator]
    if pooling == "cls+mean":
        # timm applies, in this order: attention pooling, normalisation (of the last dimension), head.
        backbone.attn_pool = ClassTokenAndMean(int(backbone.num_prefix_tokens))  # type: ignore[arg-type]
        backbone.pool_include_prefix = True  # type: ignore[assignment]
        backbone.head = nn.Flatten()


def _options(backbone: nn.Module) -> tuple[Pooling, ...]:
    """The poolings that an architecture can have."""
    try:
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        return ("auto",)
    if type(backbone) not in (VisionTransformer, Eva):  # subclasses have heads of their own
        return ("auto",)
    if getattr(backbone, "cls_token", None) is None:
        return ("auto", "mean")
    names: tuple[Pooling, ...] = get_args(Pooling)
    return names
