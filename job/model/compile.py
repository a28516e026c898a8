"""Optional torch.compile support."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from job.errors import ConfigError


def compile_module(module: nn.Module, device: torch.device, option: str = "--model.compile_backbone") -> None:
    """Compile ``module`` in place: at its first call, and again for each other input shape or freezing stage.

    Names in its state dict do not change.

    Args:
        module: the module.
        device: where it computes.
        option: name of the option, for messages.

    Raises:
        ConfigError: there is no C++ compiler, or the device is XLA.
    """
    if device.type == "xla":
        raise ConfigError(f"{option} is not supported on XLA, which compiles all steps.")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise ConfigError(
            f"{option} needs a C++ compiler, and there is no {' or '.join(compilers)} on this machine "
            "(nor in the job's images). Install one, or leave the option out."
        )
    module.compile(dynamic=False)
