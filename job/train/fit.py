"""A fit from beginning to end: lease, resume point, trainer, report."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from job import checkpoint, storage
from job.checkpoint.initial import initial_checkpoint, require_other_run
from job.checkpoint.io import BackgroundCheckpointIO
from job.checkpoint.resume import Resume, require_epochs_left, resume_point
from job.checkpoint.retention import Retention
from job.checkpoint.settings import CheckpointSettings
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.features.callback import FeatureSettings
from job.model.config import ModelConfig
from job.model.module import TransferLearningModel
from job.model.tasks import TASKS
from job.monitoring.report.content import Report
from job.monitoring.report.writer import report_of
from job.monitoring.settings import MonitoringSettings
from job.monitoring.tensorboard.event_folders import events_uri
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.process import temporary
from job.resilience import attempts
from job.resilience.divergence import last_checkpoint_named
from job.resilience.lease import Lease
from job.resilience.preemption import Preemption
from job.resilience.watchdog import Watchdog, WatchdogSettings
from job.train.early_stopping import require_possible
from job.train.errors import translate_errors
from job.train.trainer import training_trainer

log = logging.getLogger("job")


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit, beside those of the model and the data.

    Attributes:
        run_dir: folder of all results.
        trainer: the user's arguments of Trainer.
        config: the resolved configuration, as YAML, which is saved in run_dir.
        resume: continue from the newest checkpoint in run_dir: if there is one (auto), else fail (must), or refuse a
            run_dir that has one (never). Go back to the best one (best), once.
        grace: seconds from a signal to stop to the end of the process; None: no limit.
        profile: record a few steps by torch's profiler.
        checkpoint: when checkpoints are taken.
        features: whether the features of a frozen backbone are cached.
        watchdog: limits of a step.
        monitoring: what TensorBoard and the report show.
        early_stopping: validations in a row without a better checkpoint after which training ends; 0 disables.
        init_from: run_dir, or checkpoint, of another run whose weights a new run starts with.
        ends_hanging_process: let the watchdog end this process, not only print its stacks.
        ends_at_second_interrupt: end this process at a second Ctrl-C, instead of raising Stopped.
    """

    run_dir: str
    trainer: dict[str, Any]
    config: str
    resume: Resume = "auto"
    grace: float | None = 25.0
    profile: bool = False
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)
    monitoring: MonitoringSettings = field(default_factory=MonitoringSettings)
    early_stopping: int = 0
    init_from: str | None = None
    ends_hanging_process: bool = True
    ends_at_second_interrupt: bool = True

    def __post_init__(self) -> None:
        require_possible(self.early_stopping, self.trainer)


def fit(config: ModelConfig, data: ImageDataModule, settings: FitSettings) -> Report:
    """Train a model, from the newest checkpoint in run_dir on; called on all ranks, and returns the report on each.

    Args:
        config: hyperparameters of the model.
        data: the images.
        settings: everything else.

    Raises:
        JobError: a subclass says what is wrong.
        Stopped: a signal came outside of training.
    """
    run_dir, lease = settings.run_dir, Lease(settings.run_dir)
    ranking = settings.checkpoint.with_default_metric(TASKS[config.task].monitor)
    watchdog = Watchdog(settings.watchdog, ends_process=settings.ends_hanging_process)
    with (
        watchdog.stopped_at_end(),
        Preemption(settings.grace, owns_process=settings.ends_at_second_interrupt) as preemption,
        ranks.process_group(settings.watchdog.startup_seconds),
        lease.released_at_end(),
    ):
        ranks.from_rank_zero(lease.acquire)
        if ranks.local_rank() == 0:
            temporary.delete_stale()
        point = ranks.from_rank_zero(lambda: resume_point(run_dir, settings.resume, settings.config))
        resumed = point.manifest if point else None
        if resumed:
            require_epochs_left(run_dir, resumed, settings.trainer.get("max_epochs"))
        init_from = ranks.from_rank_zero(lambda: _init_from(settings, resumed))
        step = resumed.global_step if resumed else -1
        before = ranks.from_rank_zero(lambda: attempts.begin(run_dir, step, settings.config, lease.require_held))
        logger = BucketTensorBoardLogger(events_uri(run_dir), purge_step=max(step, 0), before_write=lease.require_held)
        retention = Retention(ranking, run_dir, lease.require_held)
        io = BackgroundCheckpointIO(
            settings.checkpoint.upload_seconds,
            before_commit=logger.publish,
            after_commit=retention.remove_superseded,
            before_write=lease.require_held,
        )
        with (
            attempts.counted(run_dir, before if ranks.rank() == 0 else None, lease.require_held),
            translate_errors(data.global_batch_size),
            last_checkpoint_named(run_dir, io),
        ):
            trainer = training_trainer(
                settings.trainer,
                run_dir,
                config=settings.config,
                checkpoint=ranking,
                features=settings.features,
                monitoring=settings.monitoring,
                early_stopping=settings.early_stopping,
                profile=settings.profile,
                step_back=point.step_back if point else None,
                io=io,
                watchdog=watchdog,
                preemption=preemption,
                lease=lease,
                logger=logger,
            )
            if resumed:
                log.info("resuming after step %d, epoch %d", resumed.global_step, resumed.epoch)
            uri = storage.join(run_dir, checkpoint.FOLDER, resumed.file) if resumed else None
            model = TransferLearningModel(pretrained=resumed is None, init_from=init_from, **vars(config))
            with preemption.deferred():
                trainer.fit(model, datamodule=data, ckpt_path=uri)
            report = report_of(trainer)
            _log_calibration(report)
            return report


def _log_calibration(report: Report) -> None:
    """Log how the best checkpoint's probabilities are calibrated, or why they are not."""
    evaluation = report.typed_content.evaluation
    fit = evaluation.calibrator if evaluation is not None else None
    if fit is None:
        return
    if fit.after is None:
        log.info("the best checkpoint's probabilities are not calibrated: %s", fit.reason)
        return
    log.info(
        "the best checkpoint's probabilities are calibrated by %s: ECE %.4f before, %.4f after (cross-fitted)",
        f"the temperature {fit.temperature:.3f}" if fit.temperature else f"Platt scaling of {fit.classes} classes",
        fit.error_before or 0.0,
        fit.after.error or 0.0,
    )


def _init_from(settings: FitSettings, resumed: checkpoint.Manifest | None) -> str | None:
    """The checkpoint file to start from; of a run that resumes, what the user gave, which need not exist any more."""
    if settings.init_from is None or resumed is not None:
        return settings.init_from
    require_other_run(settings.init_from, settings.run_dir)
    return initial_checkpoint(settings.init_from)
