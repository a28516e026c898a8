"""Learning-rate schedulers of a run: their length, their parameter groups, and what they monitor."""

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
from job.model.metrics import metric_names

AUTO = "auto"
LENGTHS = ("total_steps", "total_iters", "total", "T_max", "T_0")
"""Arguments that count a scheduler's intervals, and may be ``auto``: all of the run."""
RATES = ("max_lr", "base_lr")
"""Arguments that set a learning rate of their own, the same for every group, in place of the optimizer's."""
NO_END = 10**9
"""Intervals that a scheduler must last for in a run without --trainer.max_epochs."""


class AutoSchedule:
    """A scheduler that is as long as the run: some of its arguments are ``auto``.

    Args:
        class_path: a scheduler of torch.optim.lr_scheduler or job.model.schedule, with or without its module.
        init_args: its arguments, without the optimizer.

    Raises:
        ValueError: no such scheduler, no ``auto``, or an ``auto`` that does not count intervals.
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
        """Make one from what ``--model.lr_scheduler`` holds."""
        if isinstance(value, Namespace):
            value = value.as_dict()
        if not isinstance(value, dict) or not {"class_path"} <= value.keys() <= {"class_path", "init_args"}:
            raise ValueError("a scheduler has a class_path and init_args")
        return cls(str(value["class_path"]), dict(value.get("init_args") or {}))

    def as_dict(self) -> dict[str, Any]:
        """What :meth:`parse` takes."""
        return {"class_path": f"{self.kind.__module__}.{self.kind.__qualname__}", "init_args": self.init_args}


register_type(AutoSchedule, AutoSchedule.as_dict, AutoSchedule.parse)


def build_scheduler(
    schedule: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | AutoSchedule,
    optimizer: Optimizer,
    *,
    factors: Sequence[float],
    length: int | None,
) -> LRScheduler | ReduceLROnPlateau:
    """Make the scheduler of a run.

    A single ``max_lr`` (OneCycleLR) or ``base_lr`` (CyclicLR) is the head's, and each group's is its factor times
    that. A list has a value for each group.

    Args:
        factors: learning rate of each of the optimizer's groups, relative to the head's.
        length: intervals of the run, which ``auto`` stands for; None: without end.

    Raises:
        ConfigError: there can be no such scheduler.
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
    except Exception as error:  # whatever a scheduler's constructor raises
        rates = ", ".join(f"{factor:g}" for factor in factors)
        raise ConfigError(
            f"--model.lr_scheduler cannot be made: {error}. The optimizer has {len(factors)} parameter groups, with "
            f"learning rates of {rates} times the head's."
        ) from error


def require_length(scheduler: LRScheduler | ReduceLROnPlateau, length: int | None, interval: str) -> None:
    """Step ``scheduler``, which is not used afterwards, to the end of a run.

    It jumps there: a scheduler looks at the number of the step, not at the steps before.

    Args:
        length: steps that the run takes; None: without end.

    Raises:
        ConfigError: it does not last so long, or ends at a rate that is no finite number.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    name = type(scheduler).__name__
    scheduler.last_epoch = max((NO_END if length is None else length) - 1, 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    except Exception as error:  # OneCycleLR: ValueError; a user's own: anything
        steps = f"{length} times (once per {interval})" if length is not None else "without end"
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--model.lr_scheduler {name} does not last as long as the run, which steps it {steps}: {cause}. "
            "Use total_steps: auto, or a larger number."
        ) from error
    rates = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ConfigError(f"--model.lr_scheduler {name} ends at learning rates of {rates}.")


def plateau_settings(
    scheduler: ReduceLROnPlateau, trainer: pl.Trainer, interval: str, classes: Sequence[str]
) -> dict[str, Any]:
    """Lightning's configuration of a ReduceLROnPlateau: it is stepped in each epoch that ends with a validation.

    Raises:
        ConfigError: it monitors what is not logged, or not measured at the end of an epoch.
    """
    name, monitor = "--model.lr_scheduler ReduceLROnPlateau", getattr(scheduler, "monitor", "val/loss")
    if interval == "step":
        raise ConfigError(f"{name} is stepped after a validation, not every step. Use --model.lr_interval=epoch.")
    known = ["train/loss", "data/bad_samples"]
    if trainer.limit_val_batches:
        known = [*(f"val/{metric}" for metric in metric_names(classes)), *known]
    if monitor not in known:
        raise ConfigError(f"{name}: {monitor!r} is not logged. Metrics to monitor: {', '.join(known)}.")
    better = "min" if monitor.endswith(("/loss", "/bad_samples")) else "max"
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
    # Not strict: a metric that the samples of one epoch do not define leaves the rate as it is.
    return {"monitor": monitor, "frequency": frequency, "strict": False, "reduce_on_plateau": True}
