"""The Lightning Trainer for this machine: processes, progress, checkpoints through the bucket."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy

from job.checkpoint.abandoned import StepBack
from job.checkpoint.callback import Checkpointer
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.restore import check_restored
from job.checkpoint.resume import StepBackWriter
from job.checkpoint.settings import CheckpointSettings
from job.cluster import ranks, xla
from job.cluster.xla_records import CompilationCache, Counts, Trace
from job.config.run_config import SavedConfig
from job.config.trainer_options import cluster_environment, listed
from job.errors import ConfigError
from job.features.callback import FeatureCache, FeatureSettings
from job.lightning_internals import StepHook, add_step_hooks, disable_signal_handlers, log_last_steps, skip_empty_hooks
from job.model.sync_batchnorm import require_synchronisable
from job.monitoring.callbacks import monitoring_callbacks
from job.monitoring.profile import Profile
from job.monitoring.progress import LogPosition, TrainerProgress, TuningProgress
from job.monitoring.settings import MonitoringSettings
from job.monitoring.tensorboard.event_folders import events_uri
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.resilience.lease import Lease
from job.resilience.lease_check import LeaseCheck
from job.resilience.preemption import Preemption
from job.resilience.watchdog import Watchdog
from job.torch_internals import without_buffer_broadcasts
from job.train.batch_size_finder import BatchSizeFinder
from job.train.early_stopping import make_early_stopping
from job.train.loggers import additional_loggers
from job.train.lr_finder import LRFinder
from job.train.precision import announce, automatic_precision, uses_cuda

log = logging.getLogger(__name__)


def training_trainer(
    settings: dict[str, Any],
    run_dir: str,
    *,
    config: str,
    checkpoint: CheckpointSettings,
    features: FeatureSettings,
    monitoring: MonitoringSettings,
    early_stopping: int,
    profile: bool,
    step_back: StepBack | None,
    io: BackgroundCheckpointIO,
    watchdog: Watchdog,
    preemption: Preemption,
    lease: Lease,
    logger: BucketTensorBoardLogger,
) -> pl.Trainer:
    """A Trainer that fits.

    Args:
        settings: the user's arguments of Trainer.
        run_dir: folder of the run.
        config: the resolved configuration, as YAML.
        checkpoint: when checkpoints are taken.
        features: whether the features of a frozen backbone are cached.
        monitoring: what TensorBoard and the report show.
        early_stopping: validations without a better checkpoint after which training ends; 0 disables.
        profile: record a few steps by torch's profiler.
        step_back: checkpoints that the run abandons when training starts.
        io: writes checkpoints.
        watchdog: ends this process if it hangs.
        preemption: says whether this process is to stop.
        lease: the right to write to run_dir.
        logger: of TensorBoard, the first of the loggers.
    """
    checkpointer = Checkpointer(checkpoint, run_dir, io, preemption)
    cache = FeatureCache(features, preemption, watchdog, lease)
    measured = monitoring_callbacks(
        monitoring,
        run_dir,
        config=config,
        checkpoint=checkpoint,
        checkpointer=checkpointer,
        features=cache,
        lease=lease,
        logger=logger,
    )
    callbacks: list[Callback] = [
        StepBackWriter(step_back, lease.require_held),
        SavedConfig(config, lease.require_held),
        *measured.callbacks,
        watchdog,
        LeaseCheck(lease),
        checkpointer,
    ]
    if early_stopping:
        callbacks.append(make_early_stopping(early_stopping, checkpoint))
    callbacks.append(cache)
    step_hooks: list[StepHook] = [measured.between_steps, lambda _: lease.raise_if_lost(), checkpointer.between_steps]
    if profile:
        profiler = Profile(checkpointer, lease.require_held)
        callbacks.append(profiler)
        step_hooks.insert(0, profiler.between_steps)
    loggers = [logger, *additional_loggers(settings.get("logger"), run_dir)]
    trainer = _trainer(settings, callbacks, [io], loggers, run_dir)
    disable_signal_handlers(trainer)
    add_step_hooks(trainer, step_hooks)
    log_last_steps(trainer)
    skip_empty_hooks(trainer)
    check_restored(trainer)
    return trainer


def evaluating_trainer(settings: dict[str, Any], run_dir: str) -> pl.Trainer:
    """A Trainer that validates or tests a checkpoint, and writes nothing."""
    trainer = _trainer(settings, [], [BackgroundCheckpointIO()], [], run_dir)
    check_restored(trainer)
    return trainer


def tuning_trainer(settings: dict[str, Any], run_dir: str, rates: LRFinder, batches: BatchSizeFinder) -> pl.Trainer:
    """A Trainer whose steps are thrown away.

    Raises:
        ConfigError: XLA would compute, which compiles each of them anew.
    """
    if xla.is_wanted(str(settings.get("accelerator"))):
        raise ConfigError("tune does not work on XLA, which would compile every step: use a CPU or a GPU.")
    fixed = {"max_epochs": -1, "max_steps": rates.steps, "limit_val_batches": 0, "enable_checkpointing": False}
    return _trainer({**settings, **fixed}, [batches, rates], [], [], run_dir, TuningProgress())


def measuring_trainer(settings: dict[str, Any], folder: str, measurement: Callback) -> pl.Trainer:
    """A Trainer for a callback that measures at the start of training and then stops it; writes below ``folder`` only.

    The user's own callbacks and loggers take no part: they might write elsewhere.
    """
    fixed = {"limit_val_batches": 0, "enable_checkpointing": False, "enable_progress_bar": False, "profiler": None}
    fixed |= {"min_epochs": None, "min_steps": None, "max_time": None, "callbacks": None}
    return _trainer({**settings, **fixed}, [measurement], [], [], folder)


def _trainer(
    settings: dict[str, Any],
    callbacks: list[Callback],
    plugins: list[Any],
    loggers: list[Logger],
    run_dir: str,
    progress: TrainerProgress | None = None,
) -> pl.Trainer:
    on_xla = xla.is_wanted(str(settings.get("accelerator")))
    settings = {**settings, "callbacks": [*listed(settings.get("callbacks")), *callbacks]}
    if on_xla:
        settings.update(_on_xla(settings, run_dir))
    else:
        settings.update(_processes(settings), precision=_precision(settings))
        plugins = [*plugins, cluster_environment()]
    has_progress_bar = any(isinstance(callback, ProgressBar) for callback in settings["callbacks"])
    if settings.pop("enable_progress_bar", None) is not False and not has_progress_bar:
        settings["callbacks"].append(progress or TrainerProgress())
    settings["callbacks"].append(LogPosition())
    trainer = pl.Trainer(
        **{
            **settings,
            "logger": loggers,
            "default_root_dir": run_dir,
            "plugins": plugins,
            # The data module itself gives each rank its share of every global batch.
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        }
    )
    if settings.get("sync_batchnorm") and not on_xla:
        require_synchronisable(trainer.strategy.root_device.type, ranks.world_size())
    return trainer


def _on_xla(settings: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """Trainer arguments on XLA."""
    cache = CompilationCache(run_dir)  # filled before the strategy opens it
    records: list[Callback] = [cache, Counts()]
    if settings.get("profiler") == "xla":
        records.append(Trace(events_uri(run_dir)))
    return {
        "strategy": xla.SPMDStrategy(settings.get("precision"), cache.folder),
        "accelerator": "auto",
        "precision": None,
        "profiler": None if settings.get("profiler") == "xla" else settings.get("profiler"),
        "devices": 1,
        "inference_mode": False,  # torch-xla 2.9: "Cannot set version_counter for inference tensor"
        "callbacks": [*settings["callbacks"], *records],
    }


def _processes(settings: dict[str, Any]) -> dict[str, Any]:
    """As many as the launcher started, and one without it."""
    world_size, local_world_size = ranks.world_size(), ranks.local_world_size()
    if uses_cuda(str(settings.get("accelerator"))) and torch.cuda.device_count() > local_world_size:
        log.warning(
            "this machine has %d GPUs, of which %d are used. Use all of them by python -m job launch fit …",
            torch.cuda.device_count(),
            local_world_size,
        )
    if uses_cuda(str(settings.get("accelerator"))) and torch.cuda.device_count() < local_world_size:
        raise ConfigError(
            f"{local_world_size} processes on this machine share {torch.cuda.device_count()} GPU(s), and each needs "
            "one of its own. Start fewer by LAUNCH_PROCESSES or torchrun --nproc-per-node=gpu, or take "
            "--trainer.accelerator=cpu."
        )
    if world_size % local_world_size:
        raise ConfigError(f"WORLD_SIZE={world_size} is not a multiple of LOCAL_WORLD_SIZE={local_world_size}.")
    strategy = settings.get("strategy") or "auto"
    if strategy in ("auto", "ddp") and world_size > 1:
        # Each parameter's gradient lies in the bucket that is sent: no copy there and back. No step waits for a
        # broadcast of running statistics: those of rank 0, which are saved, replace the others' before a validation.
        strategy = DDPStrategy(gradient_as_bucket_view=True, **without_buffer_broadcasts())
    return {"devices": local_world_size, "num_nodes": world_size // local_world_size, "strategy": strategy}


def _precision(settings: dict[str, Any]) -> Any:
    """The user's choice, or what this hardware is fastest in."""
    accelerator, chosen = str(settings.get("accelerator")), settings.get("precision")
    precision = chosen or automatic_precision(accelerator)
    announce(accelerator, str(precision), automatic=chosen is None)
    return precision
