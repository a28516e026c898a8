"""Networks without memory, whose names and shapes can be compared with a file's before a real one is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


class WithoutMemory(TorchFunctionMode):
    """Context in which parameters are made on the meta device.

    As ``torch.device("meta")``, but small computations stay real: builders compute widths and depths with
    ``torch.linspace`` and ``torch.arange``.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Redirect the functions that allocate parameters."""
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
