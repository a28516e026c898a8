"""SyncBatchNorm for architectures whose batch normalisation layers include an activation.

``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, which Lightning applies for ``--trainer.sync_batchnorm``, replaces
every subclass of batch normalisation by a plain one. timm's BatchNormAct2d would lose its activation
(https://github.com/huggingface/pytorch-image-models/issues/1254).
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import batchnorm

from job.errors import ConfigError

NormClasses = dict[str, type[nn.Module]]


def special_norms(backbone: nn.Module) -> NormClasses:
    """Classes of batch normalisation layers that torch does not define, by path."""
    return {
        path: type(module)
        for path, module in backbone.named_modules()
        if isinstance(module, batchnorm._BatchNorm) and not type(module).__module__.startswith("torch.nn.")
    }


def restore_norms(backbone: nn.Module, classes: NormClasses) -> nn.Module:
    """Restore the activation of layers that torch has converted to SyncBatchNorm; others do not change.

    Args:
        backbone: changed in place.
        classes: :func:`special_norms` of the backbone before its conversion.

    Raises:
        ConfigError: there is no synchronised version of a converted layer.
    """
    for path, original in classes.items():
        layer = backbone.get_submodule(path)
        if isinstance(layer, original):
            continue
        if original.__name__ != "BatchNormAct2d":
            raise ConfigError(
                f"--trainer.sync_batchnorm does not work with this backbone: {path} is a {original.__name__}, which "
                "torch cannot synchronise. Leave the option out."
            )
        from timm.layers.norm_act import SyncBatchNormAct

        # Both classes add calls of the children act and drop to forward, and the conversion has copied the children.
        synchronised = isinstance(layer, nn.SyncBatchNorm)
        layer.__class__ = SyncBatchNormAct if synchronised else original
    return backbone


def require_synchronisable(device_type: str, world_size: int) -> None:
    """Check that torch has kernels for --trainer.sync_batchnorm.

    Raises:
        ConfigError: several processes on CPUs.
    """
    if device_type == "cpu" and world_size > 1:
        raise ConfigError(
            "torch synchronises batch normalisation between GPUs, not between processes on CPUs. Leave "
            "--trainer.sync_batchnorm out."
        )
