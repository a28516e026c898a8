"""Settings of the user's callbacks, compared with those of earlier attempts and of a checkpoint."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EarlyStopping, GradientAccumulationScheduler

from job.checkpoint.state import is_plain

_OUTPUT_ONLY = frozenset({"verbose", "log_rank_zero_only", "refresh_rate", "logging_interval", "leave"})
"""Parameters that change what is printed, not what is trained."""


def settings(callback: Callback) -> dict[str, Any]:
    """The constructor's parameters that the callback keeps as plain values, by name."""
    values = {}
    for name in inspect.signature(type(callback).__init__).parameters:
        value = getattr(callback, name, getattr(callback, f"_{name}", inspect.Parameter.empty))
        value = value.value if isinstance(value, enum.Enum) else value
        if name not in _OUTPUT_ONLY and is_plain(value):
            values[name] = value
    return values


def settings_of_all(callbacks: Sequence[Callback]) -> dict[str, dict[str, Any]]:
    """:func:`settings` of every callback that the user has chosen, by class and, of several, number.

    These are all but this package's own, and EarlyStopping, of which --early_stopping is the short form.
    """
    by_callback: dict[str, dict[str, Any]] = {}
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) or not type(callback).__module__.startswith("job."):
            name = type(callback).__qualname__
            number = sum(known.split(" ")[0] == name for known in by_callback)
            by_callback[f"{name} {number + 1}" if number else name] = settings(callback)
    return by_callback


def changes(saved: dict[str, Any], current: dict[str, dict[str, Any]]) -> list[str]:
    """Differences between two results of :func:`settings_of_all`, for the log."""
    differences = [f"{name} was removed" for name in saved if name not in current]
    differences += [f"{name} was added" for name in current if name not in saved]
    for name in current.keys() & saved.keys():
        was, now = saved[name] if isinstance(saved[name], dict) else {}, current[name]
        differences += [f"{name}'s {key} was {was.get(key)}, is {now[key]}" for key in now if was.get(key) != now[key]]
    return sorted(differences)


def keep_configured(states: dict[Any, Any], callbacks: Sequence[Callback]) -> None:
    """Replace the settings among callbacks' saved states, which Lightning would restore, by the configured ones."""
    for callback in callbacks:
        state = states.get(callback.state_key)
        if isinstance(state, dict):
            state.update({name: value for name, value in settings(callback).items() if name in state})


def accumulation(trainer: pl.Trainer) -> int | dict[int, int]:
    """Batches per optimizer step: one number, or the numbers by their first epoch."""
    schedule = scheduler(trainer)
    if schedule is None:
        return trainer.accumulate_grad_batches
    factors = {int(epoch): int(factor) for epoch, factor in sorted(schedule.scheduling.items())}
    return factors if len(set(factors.values())) > 1 else next(iter(factors.values()))


def scheduler(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    """The run's GradientAccumulationScheduler, where it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)  # type: ignore[attr-defined]
