"""Networks on the meta device, to compare the names and shapes of tensors with a file's before memory is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


class WithoutMemory(TorchFunctionMode):
    """Context in which parameters are created on the meta device.

    Unlike ``torch.device("meta")``, ``torch.linspace`` and ``torch.arange`` compute values: builders derive widths and
    depths from them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Redirect the functions that allocate parameters."""
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
