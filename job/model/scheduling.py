"""Learning-rate schedulers of a run: length, parameter groups, monitored metrics."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch.optim.lr_scheduler as torch_schedulers
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import job.model.schedule as job_schedulers
from job.errors import ConfigError, JobError

AUTO = "auto"
LENGTHS = ("total_steps", "total_iters", "total", "T_max", "T_0")
"""Arguments that count a scheduler's intervals, and may be ``auto``: the length of the run."""
RATES = ("max_lr", "base_lr")
"""Arguments that replace the optimizer's learning rates by one for all groups."""
UNLIMITED = 10**9
"""Intervals that a scheduler must support in a run without --trainer.max_epochs."""


class AutoSchedule:
    """A scheduler with arguments of ``auto``, which stand for the length of the run.

    Args:
        class_path: a class of torch.optim.lr_scheduler or job.model.schedule, with or without its module.
        init_args: arguments of the class, without the optimizer.

    Raises:
        ValueError: there is no such scheduler, no argument is ``auto``, or one is that does not count intervals.
    """

    def __init__(self, class_path: str, init_args: dict[str, Any]) -> None:
        modules = {module.__name__: module for module in (torch_schedulers, job_schedulers)}
        path, _, name = class_path.rpartition(".")
        candidates = [modules[path]] if path in modules else [] if path else list(modules.values())
        kind = next((getattr(module, name) for module in candidates if hasattr(module, name)), None)
        if not (inspect.isclass(kind) and issubclass(kind, LRScheduler)):
            raise ValueError(f"{class_path} is no scheduler of {' or '.join(modules)}")
        wrong = [name for name, value in init_args.items() if value == AUTO and name not in LENGTHS]
        if AUTO not in init_args.values() or wrong:
            raise ValueError(f"auto is a value of {', '.join(LENGTHS)}{f', not of {wrong[0]}' if wrong else ''}")
        try:
            inspect.signature(kind).bind(None, **init_args)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error
        self.kind: type[LRScheduler] = kind
        self.init_args = dict(init_args)

    @classmethod
    def parse(cls, value: Any) -> AutoSchedule:
        """Parse a value of ``--model.lr_scheduler``."""
        if isinstance(value, Namespace):
            value = value.as_dict()
        if not isinstance(value, dict) or not {"class_path"} <= value.keys() <= {"class_path", "init_args"}:
            raise ValueError("a scheduler has a class_path and init_args")
        return cls(str(value["class_path"]), dict(value.get("init_args") or {}))

    def as_dict(self) -> dict[str, Any]:
        """The value for :meth:`parse`."""
        return {"class_path": f"{self.kind.__module__}.{self.kind.__qualname__}", "init_args": self.init_args}


register_type(AutoSchedule, AutoSchedule.as_dict, AutoSchedule.parse)


def build_scheduler(
    schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | AutoSchedule,
    optimizer: Optimizer,
    *,
    factors: Sequence[float],
    length: int | None,
) -> LRScheduler | ReduceLROnPlateau:
    """Create the scheduler of a run.

    A single ``max_lr`` (OneCycleLR) or ``base_lr`` (CyclicLR) is the head's; that of a group is its factor times the
    head's. A list has one value per group.

    Args:
        schedule: class and arguments, or a callable that takes the optimizer.
        optimizer: the optimizer.
        factors: learning rate per parameter group, relative to the head's.
        length: intervals of the run, which replace ``auto``; None: unlimited.

    Raises:
        ConfigError: the scheduler cannot be created.
    """
    make: Callable[..., LRScheduler | ReduceLROnPlateau]
    if isinstance(schedule, AutoSchedule):
        make, settings = schedule.kind, schedule.init_args
    elif isinstance(schedule, partial):  # jsonargparse's, or a user's own
        make, settings = partial(schedule.func, *schedule.args), schedule.keywords
    else:
        make, settings = schedule, {}
    if AUTO in settings.values() and length is None:
        raise ConfigError("--model.lr_scheduler: auto needs a --trainer.max_epochs.")
    settings = {name: length if value == AUTO else value for name, value in settings.items()}
    for name in RATES:
        if isinstance(settings.get(name), int | float):
            settings[name] = [settings[name] * factor for factor in factors]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(optimizer, **settings)
    except JobError:
        raise
    except Exception as error:  # constructors raise errors of any class
        rates = ", ".join(f"{factor:g}" for factor in factors)
        raise ConfigError(
            f"--model.lr_scheduler cannot be created: {error}. The optimizer has {len(factors)} parameter groups, with "
            f"learning rates of {rates} times the head's."
        ) from error


def require_length(scheduler: LRScheduler | ReduceLROnPlateau, length: int | None, interval: str) -> None:
    """Step ``scheduler`` to the end of the run; it is of no use afterwards.

    It is stepped once, from the last interval but one: a scheduler depends on the number of the step only.

    Args:
        scheduler: created for this check.
        length: how often the run steps it; None: unlimited.
        interval: "epoch" or "step", for the message.

    Raises:
        ConfigError: the scheduler is shorter than the run, or its last learning rate is not finite.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    name = type(scheduler).__name__
    scheduler.last_epoch = max((UNLIMITED if length is None else length) - 1, 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    except Exception as error:  # OneCycleLR: ValueError; a user's own: anything
        steps = f"{length} times (once per {interval})" if length is not None else "without end"
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--model.lr_scheduler {name} is shorter than the run, which steps it {steps}: {cause}. "
            "Use total_steps: auto, or a larger number."
        ) from error
    rates = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ConfigError(f"--model.lr_scheduler {name} ends at learning rates of {rates}.")


def plateau_settings(
    scheduler: ReduceLROnPlateau, trainer: pl.Trainer, interval: str, metrics: Sequence[str]
) -> dict[str, Any]:
    """Lightning's scheduler configuration for ReduceLROnPlateau, stepped after epochs that end with a validation.

    Raises:
        ConfigError: the monitored metric is not logged, or not measured at the end of an epoch.
    """
    name, monitor = "--model.lr_scheduler ReduceLROnPlateau", getattr(scheduler, "monitor", "val/loss")
    if interval == "step":
        raise ConfigError(f"{name} is stepped after a validation, not every step. Use --model.lr_interval=epoch.")
    names = ["train/loss", "train/loss_epoch", "data/bad_samples"]
    if trainer.limit_val_batches:
        names = [*(f"val/{metric}" for metric in metrics), *names]
    if monitor not in names:
        raise ConfigError(f"{name}: {monitor!r} is not logged. Metrics to monitor: {', '.join(names)}.")
    better = "min" if monitor.endswith(("/loss", "/loss_epoch", "/ece", "/bad_samples")) else "max"
    if scheduler.mode != better:
        raise ConfigError(
            f"{name}: {monitor} is better where it is {'lower' if better == 'min' else 'higher'}. Use mode: {better}."
        )
    frequency = 1
    if monitor.startswith("val/"):
        if trainer.check_val_every_n_epoch is None:
            raise ConfigError(
                f"{name} needs a validation at the end of epochs; --trainer.check_val_every_n_epoch=null has none. "
                "Use a number of epochs."
            )
        frequency = trainer.check_val_every_n_epoch
    # Not strict: a metric that is undefined in an epoch does not change the learning rate.
    return {"monitor": monitor, "frequency": frequency, "strict": False, "reduce_on_plateau": True}
