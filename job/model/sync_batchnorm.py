"""torch's SyncBatchNorm for architectures whose normalisation layers do more than normalise.

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
    """Classes of the batch normalisations that torch itself does not define, by path."""
    return {
        path: type(module)
        for path, module in backbone.named_modules()
        if isinstance(module, batchnorm._BatchNorm) and not type(module).__module__.startswith("torch.nn.")
    }


def restore_norms(backbone: nn.Module, classes: NormClasses) -> nn.Module:
    """Give converted layers back what the conversion took; a backbone that was not converted stays as it is.

    Args:
        backbone: changed in place.
        classes: :func:`special_norms` of the backbone before its conversion.

    Raises:
        ConfigError: a layer was converted whose behaviour torch's SyncBatchNorm does not have.
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

        # Both only add the call of the children act and drop, which the conversion has copied, to their base's forward.
        synchronised = isinstance(layer, nn.SyncBatchNorm)
        layer.__class__ = SyncBatchNormAct if synchronised else original
    return backbone


def require_synchronisable(device_type: str, world_size: int) -> None:
    """Refuse --trainer.sync_batchnorm where torch has no kernels for it.

    Raises:
        ConfigError: several processes on CPUs.
    """
    if device_type == "cpu" and world_size > 1:
        raise ConfigError(
            "torch synchronises batch normalisation between GPUs, not between processes on CPUs. Leave "
            "--trainer.sync_batchnorm out."
        )
