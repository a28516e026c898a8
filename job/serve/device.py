"""The device of ``--device``."""

from __future__ import annotations

import torch

from job.errors import ConfigError


def require_device(name: str) -> None:
    """Check that this machine has a device.

    Args:
        name: as for ``torch.device``.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"--device {name} cannot be used: {reason}. Use cpu, or cuda:N of a GPU.") from error
