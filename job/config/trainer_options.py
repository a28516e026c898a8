"""Options of the Trainer: the supported ones, and reasons for rejecting others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning import callbacks as library
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback
from pytorch_lightning.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy

from job.argparse_internals import actions
from job.cluster import ranks, xla
from job.config.reserved import RESERVED
from job.errors import ConfigError
from job.lightning_internals import starts_processes

Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true", "32", "bf16", "16", "64", 32, 16, 64]

LoggerName = Literal["csv", "wandb", "mlflow"]
"""Short names of loggers, with settings of their own."""

_DDP = ("ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
_SUPPORTED_CALLBACKS = (
    library.EarlyStopping,
    library.GradientAccumulationScheduler,
    library.LearningRateMonitor,
    library.DeviceStatsMonitor,
    library.ThroughputMonitor,
    library.LambdaCallback,
    library.ModelSummary,
    library.RichModelSummary,
    library.TQDMProgressBar,
    library.RichProgressBar,
)
_SUPPORTED_LOGGERS = (CSVLogger, WandbLogger, MLFlowLogger, CometLogger)
_REFUSED_CALLBACKS: dict[type, str] = {
    library.BatchSizeFinder: "python -m job tune measures the largest batch",
    library.LearningRateFinder: "python -m job tune finds a learning rate",
    library.BaseFinetuning: "layers are unfrozen at --model.milestones",
    library.Checkpoint: "checkpoints are taken as --checkpoint.every_n_steps, .every_minutes and .every_n_epochs say",
    library.ModelPruning: "it renames the network's parameters, which a checkpoint must hold by name",
    library.StochasticWeightAveraging: "weights are averaged by --model.ema",
    library.WeightAveraging: "weights are averaged by --model.ema",
    library.SpikeDetection: "it cannot load its own state when a run resumes",
    library.Timer: "training time is limited by --trainer.max_time",
    library.BasePredictionWriter: "predictions are written by python -m job predict",
    SaveConfigCallback: "the configuration is always saved, as run_dir/config.yaml",
}
_UNSUPPORTED = {"Optimizer", "LBFGS", "Muon", "SparseAdam", "LRScheduler", "SequentialLR", "ChainedScheduler"}
"""Optimizers that cannot train these networks, schedulers composed of others, and base classes."""
_LEAST: dict[str, tuple[float, str]] = {
    "min_epochs": (0, ""),
    "check_val_every_n_epoch": (1, ""),
    "accumulate_grad_batches": (1, ""),
    "log_every_n_steps": (0, ", which logs nothing within an epoch"),
    "gradient_clip_val": (0, ", which does not clip"),
}


def add_trainer_arguments(parser: LightningArgumentParser) -> None:
    """Add the Trainer's arguments except reserved ones, restricted to supported values."""
    restricted: dict[str, Any] = {
        "accelerator": (
            Accelerator,
            "auto",
            'Accelerator. "auto" is a TPU if torch-xla is installed, else CUDA, else the CPU.',
        ),
        "strategy": (
            DDPStrategy | str,
            "auto",
            'Distributed strategy: "auto" or "ddp" (DistributedDataParallel), or a DDPStrategy with arguments. '
            "Strategies that shard the network are not supported.",
        ),
        "precision": (
            Precision | None,
            None,
            "Floating-point precision. Default: bf16-mixed if the hardware supports bf16 natively, else 32-true.",
        ),
        # typing caches Union[float, int] and Union[int, float] as one object, so the order in Lightning's signature,
        # by which "1" is one batch and not the whole epoch, depends on earlier imports. "int | float" is not cached.
        "val_check_interval": (
            int | float | str | dict[str, int] | None,
            None,
            "Validate after this many batches, this fraction of an epoch, or a time as DD:HH:MM:SS. Default: 1.0.",
        ),
    }
    restricted["logger"] = (
        LoggerName | Logger | list[LoggerName | Logger] | None,
        None,
        "Loggers beside that of TensorBoard: csv, wandb (offline), mlflow, a class of pytorch_lightning.loggers with "
        "arguments, or a list of them. Only fit uses them. Default: none.",
    )
    restricted["gradient_clip_val"] = (int | float | None, None, "Clip gradients to this norm or value. Default: none.")
    for part in ("train", "val", "test"):
        restricted[f"limit_{part}_batches"] = (
            int | float | None,
            None,
            f"Use this many batches ({part}) per epoch, or this fraction of them. Default: 1.0.",
        )
    parser.add_class_arguments(
        pl.Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip={*RESERVED, *restricted}
    )
    group = (parser.groups or {})["trainer"]
    for name, (kind, default, description) in restricted.items():
        group.add_argument(f"--trainer.{name}", type=kind, default=default, help=description)


def list_supported_classes(parser: LightningArgumentParser) -> None:
    """Restrict the classes that --help-all lists to supported ones."""
    callbacks = [f"pytorch_lightning.callbacks.{kind.__name__}" for kind in _SUPPORTED_CALLBACKS]
    for action in actions(parser):
        if action.dest == "trainer.callbacks":
            names = [*callbacks, "your own"]
        elif action.dest == "trainer.logger":
            names = [*(f"pytorch_lightning.loggers.{kind.__name__}" for kind in _SUPPORTED_LOGGERS), "your own"]
        elif action.dest == "trainer.strategy":
            names = ["pytorch_lightning.strategies.DDPStrategy"]
        elif action.dest in ("model.optimizer", "model.lr_scheduler"):
            known = action.extra_help().removeprefix(", known subclasses: ").split(", ")  # type: ignore[attr-defined]
            names = [name for name in known if name.rpartition(".")[2] not in _UNSUPPORTED]
        else:
            continue
        text = f", supported classes: {', '.join(names)}"
        action.extra_help = lambda text=text: text  # type: ignore[attr-defined]


def require_supported(settings: Mapping[str, Any]) -> None:
    """Check the Trainer's arguments for values that Lightning accepts but this package does not support.

    Raises:
        ConfigError: the message names the option.
    """
    for name, (least, meaning) in _LEAST.items():
        value = settings.get(name)
        if value is not None and value < least:
            zero = f" ({least}{meaning})" if meaning else ""
            raise ConfigError(f"--trainer.{name} must be at least {least}{zero}, not {value}.")
    epochs, least_epochs = settings.get("max_epochs"), settings.get("min_epochs")
    if epochs is None or (epochs < 1 and epochs != -1):
        raise ConfigError(f"--trainer.max_epochs must be at least 1, or -1 for no limit, not {epochs}.")
    if least_epochs is not None and -1 != epochs < least_epochs:
        raise ConfigError(f"--trainer.min_epochs {least_epochs} is above --trainer.max_epochs {epochs}.")
    if settings.get("limit_train_batches") in (0, 0.0):
        raise ConfigError("--trainer.limit_train_batches is 0, which trains nothing; 1.0 takes all batches.")
    if settings.get("val_check_interval") in (0, 0.0):
        raise ConfigError("--trainer.val_check_interval must be above 0; 1.0 validates at the end of each epoch.")
    if settings.get("max_time") is not None and (library.Timer(settings["max_time"]).time_remaining() or 0) <= 0:
        raise ConfigError(f"--trainer.max_time {settings['max_time']} leaves no time to train.")
    _require_strategy(settings.get("strategy") or "auto", on_xla=xla.is_wanted(str(settings.get("accelerator"))))
    for callback in listed(settings.get("callbacks")):
        _require_callback(callback)


def _require_strategy(strategy: Any, *, on_xla: bool) -> None:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if on_xla and name != "auto":
        raise ConfigError(f"--trainer.strategy {name} does not exist on XLA, where SPMD shares the work. Leave it out.")
    if isinstance(strategy, str):
        supported = strategy == "auto" or strategy in _DDP
    else:
        supported = not isinstance(strategy, DeepSpeedStrategy) and not starts_processes(strategy)
    if not supported:
        raise ConfigError(
            f"--trainer.strategy {name} is not supported: checkpoints, resuming and unfreezing work with "
            f"DistributedDataParallel alone. Use auto, {', '.join(_DDP)} or pytorch_lightning.strategies.DDPStrategy."
        )


def _require_callback(callback: Any) -> None:
    kind = type(callback)
    if kind.__module__.startswith("job."):
        raise ConfigError(f"--trainer.callbacks: {kind.__name__} is reserved: job itself adds this callback.")
    for refused, reason in _REFUSED_CALLBACKS.items():
        if isinstance(callback, refused):
            raise ConfigError(f"--trainer.callbacks: {kind.__name__} is not supported: {reason}.")


def cluster_environment() -> ClusterEnvironment:
    """The environment of torch elastic's ranks or of one process, ignoring variables of other launchers."""
    elastic = ranks.world_size() > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    return TorchElasticEnvironment() if elastic else LightningEnvironment()


def require_seed(seed: Any) -> None:
    """Check --seed_everything.

    Raises:
        ConfigError: NumPy does not accept it as a seed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"--seed_everything must be a whole number from 0 to {2**32 - 1}, not {seed}.")


def listed(value: Any) -> list[Any]:
    """``value`` as a list: empty for None, of one element for anything but a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
