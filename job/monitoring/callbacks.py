"""All callbacks that measure a fit and show it, in the order in which they run."""

from __future__ import annotations

from typing import NamedTuple

from pytorch_lightning.callbacks import Callback

from job.checkpoint.callback import Checkpointer
from job.checkpoint.settings import CheckpointSettings
from job.features.callback import FeatureCache
from job.lightning_internals import StepHook
from job.monitoring.accounting import Accounting
from job.monitoring.advice.callback import Advisor
from job.monitoring.drawing.thumbnails import ValidationThumbnails
from job.monitoring.gradient_norm import GradientNorm
from job.monitoring.learning_rates import LearningRates
from job.monitoring.recorder import ValidationRecorder
from job.monitoring.report.files import EarlierReport
from job.monitoring.report.writer import ReportWriter
from job.monitoring.settings import MonitoringSettings
from job.monitoring.system import SystemMonitor
from job.monitoring.tensorboard.hyperparameters import HyperparameterWriter
from job.monitoring.tensorboard.logger import BucketTensorBoardLogger
from job.monitoring.tensorboard.pictures import Pictures
from job.monitoring.tensorboard.projector import Projector
from job.monitoring.tensorboard.run_text import RunText
from job.monitoring.tensorboard.worst_classes import WorstClasses
from job.monitoring.vertex import VertexMetricReporter
from job.resilience.lease import Lease


class Monitoring(NamedTuple):
    """Callbacks of a fit, and the hook that they need after each step.

    Attributes:
        callbacks: in the order in which they run.
        between_steps: ends the measurement of a step.
    """

    callbacks: list[Callback]
    between_steps: StepHook


def monitoring_callbacks(
    settings: MonitoringSettings,
    run_dir: str,
    *,
    config: str,
    checkpoint: CheckpointSettings,
    checkpointer: Checkpointer,
    features: FeatureCache,
    lease: Lease,
    logger: BucketTensorBoardLogger,
) -> Monitoring:
    """The callbacks of a fit.

    Args:
        settings: what TensorBoard and the report show.
        run_dir: folder of the run.
        config: the resolved configuration, as YAML.
        checkpoint: names the metric that ranks checkpoints.
        checkpointer: measures how long training was blocked by checkpoints.
        features: measures how long the features took.
        lease: the right to write to run_dir.
        logger: of TensorBoard.
    """
    accounting = Accounting(checkpointer, features, lease.require_held)
    earlier = EarlierReport(run_dir)
    recorder = ValidationRecorder(accounting, earlier.history)
    advisor = Advisor(lambda: recorder.records)
    thumbnails = ValidationThumbnails()
    report = ReportWriter(
        accounting,
        recorder,
        earlier,
        settings=settings,
        ranking=checkpoint,
        config=config,
        thumbnails=thumbnails,
        advice=lambda: advisor.advice,
        before_write=lease.require_held,
    )
    callbacks: list[Callback] = [
        LearningRates(),
        GradientNorm(settings.gradient_norm),
        accounting,
        recorder,
        advisor,
        SystemMonitor(),
        HyperparameterWriter(config, checkpoint, logger),
        report,
        RunText(config, report, logger),
        WorstClasses(logger),
        Pictures(settings, logger, thumbnails),
        Projector(settings, logger),
        VertexMetricReporter(checkpoint.metric),
    ]
    return Monitoring(callbacks, accounting.between_steps)
