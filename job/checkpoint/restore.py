"""Restoring a checkpoint into a run: its entries are untrusted, and any error is one message."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from job.checkpoint.manifest import Manifest
from job.checkpoint.state import (
    CALLBACKS_KEY,
    COMPATIBILITY_KEY,
    LORA_KEY,
    MANIFEST_KEY,
    PRECISION_KEY,
    SKIPPED_STEPS_KEY,
    STOPPED_KEY,
    TRAINING_WEIGHTS_KEY,
    difference,
    is_plain,
    manifest_entry,
)
from job.errors import CheckpointError, first_line
from job.lightning_internals import RESTORE_STEPS, around_restore, loop_counters

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


def check_restored(trainer: pl.Trainer) -> None:
    """Check a checkpoint's untrusted entries, and translate the errors of restoring them.

    A fit checks all that it resumes from, before the first entry is restored.
    """

    @contextlib.contextmanager
    def checked(step: str, path: str, checkpoint: dict[str, Any]) -> Iterator[None]:
        resumes = trainer.state.fn == "fit" and bool(checkpoint)
        try:
            if step == RESTORE_STEPS[0] and resumes:
                require_resumable(path, checkpoint, trainer.fit_loop.state_dict())
            if step == "restore_training_state" and resumes:
                _require_same_structure(trainer, checkpoint)
            yield
            if step == "restore_training_state":
                _require_usable_optimizers(trainer)
        except torch.OutOfMemoryError:
            raise
        except (*_RESTORE_ERRORS, MisconfigurationException) as error:
            reason = first_line(error)
            raise CheckpointError(
                f"{path} cannot be restored into this run ({type(error).__name__}: {reason[:300]}). "
                "Use an older checkpoint, or the settings that it was written with."
            ) from error

    around_restore(trainer, checked)


def require_resumable(uri: str, checkpoint: dict[str, Any], expected_loops: dict[str, Any]) -> None:
    """Check all entries that a resume uses, before Lightning restores them.

    Args:
        uri: the checkpoint, for the message.
        checkpoint: its content.
        expected_loops: ``state_dict()`` of this trainer's fit loop, whose structure the saved one must have.

    Raises:
        CheckpointError: an entry is missing, of the wrong kind, out of its range, or contradicts another one.
    """
    problem = _problem(checkpoint, expected_loops)
    if problem:
        raise CheckpointError(f"{uri} is damaged, no run can resume from it: {problem}. Use an older checkpoint.")


def _problem(checkpoint: dict[str, Any], expected_loops: dict[str, Any]) -> str | None:
    kinds: dict[str, type] = {
        "loops": dict,
        "callbacks": dict,
        "optimizer_states": list,
        "lr_schedulers": list,
        PRECISION_KEY: str,
        "global_step": int,
        MANIFEST_KEY: dict,
        COMPATIBILITY_KEY: dict,
    }
    for key, kind in kinds.items():
        if not isinstance(checkpoint.get(key), kind):
            return f"its entry {key!r} is missing or no {kind.__name__}"
    optional: dict[str, type] = {STOPPED_KEY: bool, CALLBACKS_KEY: dict, TRAINING_WEIGHTS_KEY: dict, LORA_KEY: dict}
    for key, kind in optional.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            return f"its entry {key!r} is no {kind.__name__}"
    skipped = checkpoint.get(SKIPPED_STEPS_KEY, 0)
    if type(skipped) is not int or _out_of_range(skipped):
        return f"its entry {SKIPPED_STEPS_KEY!r} is no count"
    if not is_plain(checkpoint[COMPATIBILITY_KEY]) or not is_plain(checkpoint.get(CALLBACKS_KEY, {})):
        return f"{COMPATIBILITY_KEY!r} or {CALLBACKS_KEY!r} holds more than numbers and text"
    adapters = checkpoint.get(LORA_KEY, {})
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in adapters.items()):
        return f"its entry {LORA_KEY!r} is not tensors by name"
    for name, tensor in checkpoint.get(TRAINING_WEIGHTS_KEY, {}).items():
        averaged = adapters.get(name, checkpoint["state_dict"].get(f"net.{name}"))
        if not isinstance(tensor, Tensor) or averaged is None or tensor.shape != averaged.shape:
            return f"the training weights of {name!r:.100} do not fit their average"
    try:
        manifest = manifest_entry(checkpoint)
    except CheckpointError as error:
        return str(error)
    return _problem_of_loops(checkpoint, manifest, expected_loops) or _problem_of_optimizers(checkpoint)


def _problem_of_loops(checkpoint: dict[str, Any], manifest: Manifest, expected: dict[str, Any]) -> str | None:
    saved = checkpoint["loops"].get("fit_loop")
    if different := difference(expected, saved, ignored=frozenset({"combined_loader"})):
        return f"the progress of its loops: {different}"
    if problem := _out_of_range(saved):
        return f"the progress of its loops: {problem}"
    loaders = saved["state_dict"].get("combined_loader", [])
    if not isinstance(loaders, list) or len(loaders) > 1 or not is_plain(loaders):
        return "the state of its data loader is no list of one entry"
    epochs, batches, steps = loop_counters(saved)
    if (manifest.epoch, manifest.global_step, checkpoint["global_step"]) != (epochs, steps, steps):
        return (
            f"its manifest entry says epoch {manifest.epoch} and step {manifest.global_step}, its loops epoch {epochs} "
            f"and step {steps}"
        )
    if manifest.batch not in (0, batches):
        return f"its manifest entry says batch {manifest.batch}, its loops batch {batches}"
    for loader in loaders:
        if loader != {} and loader != {"batch": batches}:
            return f"the state of its data loader is {loader!r:.60}, its loops say batch {batches}"
    return None


def _out_of_range(tree: Any) -> str | None:
    """The first number of a tree of dictionaries that is negative or absurdly large."""
    if isinstance(tree, dict):
        return next((problem for value in tree.values() if (problem := _out_of_range(value))), None)
    if isinstance(tree, (int, float)) and not (isinstance(tree, int) and 0 <= tree < 2**48):
        return f"{tree} is no count"
    return None


def _problem_of_optimizers(checkpoint: dict[str, Any]) -> str | None:
    for state in checkpoint["optimizer_states"]:
        if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
            return "an optimizer's state is no dict"
        groups = state.get("param_groups")
        if not isinstance(groups, list) or not all(map(_is_group, groups)):
            return "an optimizer's parameter groups are no list of groups"
        if not all(isinstance(entry, dict) for entry in state["state"].values()):
            return "an optimizer's state of a parameter is no dict"
    if not all(isinstance(state, dict) for state in checkpoint["lr_schedulers"]):
        return "a learning rate scheduler's state is no dict"
    return None


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list)


def _require_same_structure(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Compare the structure of optimizer and scheduler states, which are restored whole, with this run's."""
    groups = [optimizer.state_dict()["param_groups"] for optimizer in trainer.optimizers]
    saved = [state["param_groups"] for state in checkpoint["optimizer_states"]]
    if different := difference(groups, saved):
        raise ValueError(f"the optimizer's parameter groups: {different}")
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    if different := difference(schedulers, checkpoint["lr_schedulers"]):
        raise ValueError(f"the learning rate scheduler's state: {different}")


def _require_usable_optimizers(trainer: pl.Trainer) -> None:
    for optimizer in trainer.optimizers:
        if problem := _problem_of_restored(optimizer):
            raise ValueError(problem)


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
