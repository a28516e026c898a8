"""Taking a checkpoint's entries over into a run: whatever they hold, an error is one message."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from job.checkpoint.state import difference
from job.errors import CheckpointError, first_line

_RESTORE_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
_PER_PARAMETER = frozenset(
    {
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "prev",
        "step_size",
        "sum",
    }
)
"""Entries of torch's optimizers that have the shape of their parameter."""


def explain_restore_errors(trainer: pl.Trainer) -> None:
    """Let what Lightning raises while it restores a checkpoint become messages: the entries may be anything."""
    connector = trainer._checkpoint_connector
    restore_training = connector.restore_training_state

    def restore_checked() -> None:
        if trainer.state.fn == "fit" and connector._loaded_checkpoint:
            _require_same_structure(trainer, connector._loaded_checkpoint)
        restore_training()
        for optimizer in trainer.optimizers:
            if problem := _problem_of_restored(optimizer):
                raise ValueError(problem)

    connector.restore_training_state = restore_checked  # type: ignore[method-assign]
    for name in ("restore_datamodule", "restore_model", "restore_callbacks", "restore_training_state"):
        setattr(connector, name, _explained(connector, getattr(connector, name)))


def _require_same_structure(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Hold the states of optimizers and schedulers, which are taken over whole, against those of this run."""
    groups = [optimizer.state_dict()["param_groups"] for optimizer in trainer.optimizers]
    saved = [state["param_groups"] for state in checkpoint["optimizer_states"]]
    if different := difference(groups, saved):
        raise ValueError(f"the optimizer's parameter groups: {different}")
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    if different := difference(schedulers, checkpoint["lr_schedulers"]):
        raise ValueError(f"the learning rate scheduler's state: {different}")


def _explained(connector: Any, restore: Callable[[], None]) -> Callable[[], None]:
    def wrapped() -> None:
        try:
            restore()
        except torch.OutOfMemoryError:
            raise
        except (*_RESTORE_ERRORS, MisconfigurationException) as error:
            reason = first_line(error)
            raise CheckpointError(
                f"{connector._ckpt_path} cannot be restored into this run ({type(error).__name__}: {reason[:300]}). "
                "Use an older checkpoint, or the settings that it was written with."
            ) from error

    return wrapped


def _problem_of_restored(optimizer: torch.optim.Optimizer) -> str | None:
    """An entry of a restored optimizer that its next step would fail on."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if name in _PER_PARAMETER and value is not None:
                if not isinstance(value, Tensor) or value.shape != parameter.shape:
                    return f"the optimizer's {name!r} does not have the shape {tuple(parameter.shape)} of its parameter"
            elif name == "step":
                steps = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
                if not isinstance(steps, (int, float)) or not math.isfinite(steps) or steps < 0:
                    return "the optimizer's 'step' is no count"
    for group in optimizer.param_groups:
        rate = group.get("lr")
        rate = rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate
        if not isinstance(rate, (int, float)) or not math.isfinite(rate):
            return f"the optimizer's learning rate is {rate!r:.50}"
    return None
