"""torch.compile, for those who have a compiler and the patience."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from job.errors import ConfigError


def compile_module(module: nn.Module, device: torch.device) -> None:
    """Let ``module`` compile itself when it is first called, and again for each other shape or stage of freezing.

    Names in its state dict stay the same.

    Raises:
        ConfigError: there is no C++ compiler, or XLA compiles already.
    """
    if device.type == "xla":
        raise ConfigError("--model.compile_backbone does not exist on XLA, which compiles all steps by itself.")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise ConfigError(
            f"--model.compile_backbone needs a C++ compiler, and there is no {' or '.join(compilers)} on this machine "
            "(nor in the job's images). Install one, or leave the option out."
        )
    module.compile(dynamic=False)
