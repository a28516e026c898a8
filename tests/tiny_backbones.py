"""Architectures of strong backbones with few and narrow layers, registered with timm, and folders as on its Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model, save_for_hf
from timm.models.convnext import _create_convnext
from timm.models.eva import _create_eva
from timm.models.vision_transformer import _create_vision_transformer
from torch import nn

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
"""Those that :func:`hub_folder` writes."""
_SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def _config(size: int, **values: Any) -> dict[str, Any]:
    named = {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True, **values}
    return {"input_size": (3, size, size), "num_classes": 5, "interpolation": "bicubic", **named}


default_cfgs = generate_default_cfgs(
    {
        "tiny_dinov2.test": _config(56),
        "tiny_dinov3.test": _config(64),
        "tiny_siglip2.test": _config(64),
        "tiny_eva02.test": _config(56),
        "tiny_convnextv2.test": _config(64, first_conv="stem.0", classifier="head.fc", fixed_input_size=False),
    }
)
FAMILIES = {name.partition(".")[0]: int(configs.default.input_size[1]) for name, configs in default_cfgs.items()}
"""timm's names, and their own image size."""


@register_model
def tiny_dinov2(pretrained: bool = False, **options: Any) -> nn.Module:
    own: dict[str, Any] = {"img_size": 56, "patch_size": 14, "init_values": 1.0, "reg_tokens": 4, **_SMALL}
    own["no_embed_class"] = True
    return _create_vision_transformer("tiny_dinov2", pretrained=pretrained, **(own | options))


@register_model
def tiny_dinov3(pretrained: bool = False, **options: Any) -> nn.Module:
    own: dict[str, Any] = {"img_size": 64, "patch_size": 16, "init_values": 1.0, "num_reg_tokens": 4, **_SMALL}
    own |= {"dynamic_img_size": True, "qkv_bias": False, "use_rot_pos_emb": True, "use_abs_pos_emb": False}
    own |= {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "use_fc_norm": False}
    return _create_eva("tiny_dinov3", pretrained=pretrained, **(own | options))


@register_model
def tiny_siglip2(pretrained: bool = False, **options: Any) -> nn.Module:
    own: dict[str, Any] = {"img_size": 64, "patch_size": 16, "class_token": False, "global_pool": "map", **_SMALL}
    return _create_vision_transformer("tiny_siglip2", pretrained=pretrained, **(own | options))


@register_model
def tiny_eva02(pretrained: bool = False, **options: Any) -> nn.Module:
    own: dict[str, Any] = {"img_size": 56, "patch_size": 14, "swiglu_mlp": True, "mlp_ratio": 2, **_SMALL}
    own |= {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    return _create_eva("tiny_eva02", pretrained=pretrained, **(own | options))


@register_model
def tiny_convnextv2(pretrained: bool = False, **options: Any) -> nn.Module:
    own: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "use_grn": True, "ls_init_value": None}
    return _create_convnext("tiny_convnextv2", pretrained=pretrained, **(own | options))


def random_network(name: str) -> nn.Module:
    """The architecture with random weights, also where it starts with zeros, and a classification layer."""
    torch.manual_seed(3)
    network: nn.Module = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def hub_folder(name: str, folder: Path) -> nn.Module:
    """Write model.safetensors and config.json as timm uploads them; return the network."""
    network = random_network(name)
    network.pretrained_cfg |= {"mean": MEAN, "std": STD}
    save_for_hf(network, str(folder), safe_serialization=True)
    return network
