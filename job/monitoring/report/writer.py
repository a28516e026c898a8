"""Writes ``report.json`` and ``report.html`` while a fit lasts, and at its end."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import msgspec
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from job import storage, typed
from job.checkpoint.settings import CheckpointSettings
from job.cluster import ranks
from job.data.datamodule import ImageDataModule, image_data
from job.errors import JobError, LeaseError, Preempted, StorageError, StorageOutage
from job.model.module import TransferLearningModel
from job.monitoring import accounting
from job.monitoring.accounting import Accounting
from job.monitoring.advice import Advice
from job.monitoring.drawing.thumbnails import ValidationThumbnails
from job.monitoring.recorder import ValidationRecorder
from job.monitoring.report.build import RunFacts, RunState, build, message_of, parse_configuration
from job.monitoring.report.content import FILE, AdviceEntry, Report, ReportContent, Status
from job.monitoring.report.data_summary import summarise
from job.monitoring.report.files import PAGE, EarlierReport, free_number, numbered_name
from job.monitoring.report.machine import hardware, versions
from job.monitoring.report.measures import result_of
from job.monitoring.report.page import render
from job.monitoring.report.results import ValidationResults
from job.monitoring.settings import MonitoringSettings
from job.process.periodic import Periodic, call_within
from job.process.signals import Stopped
from job.train.errors import translated

log = logging.getLogger(__name__)

WRITE_SECONDS = 30.0
"""Seconds between two reports at least."""

BYTES_PER_SECOND = 1000.0
"""In a bucket a large report is written less often, so that one that keeps superseded versions keeps 86 MB a day."""

FINISHING_SECONDS = 60.0
"""How long the end of a complete fit waits for the thread."""

STOPPING_SECONDS = 5.0
"""How long the end of a stopped or failed run waits for the thread, and for its last report."""

POLL_SECONDS = 0.5


class _Closed(JobError):
    """The background thread is to write no more."""


def report_of(trainer: pl.Trainer) -> Report:
    """The report of a fit that has ended, on every rank; called by all ranks together."""
    (writer,) = (c for c in trainer.callbacks if isinstance(c, ReportWriter))  # type: ignore[attr-defined]
    encoded = ranks.from_rank_zero(lambda: msgspec.json.encode(writer.content))
    return Report.of(typed.from_json(encoded, ReportContent))


class ReportWriter(Callback):
    """Writes the report on rank 0: when training starts, after each validation, and at the end of the fit.

    A background thread writes while training goes on; it skips to the newest state, and waits
    :data:`WRITE_SECONDS` between two reports. A bucket that lets nothing be replaced keeps the first report, and gets
    the last one under a numbered_name name, such as ``report.2.html``. The last report of a fit also gets one where the
    thread hangs in a request, which might be completed later.

    Args:
        accounting: measures where the time goes.
        recorder: keeps the history of validations.
        earlier: report of earlier attempts.
        settings: says how many of the worst errors are shown.
        ranking: names the metric that ranks checkpoints.
        config: the resolved configuration, as YAML.
        thumbnails: of validation samples, shared with TensorBoard's pictures.
        advice: returns the current advice.
        before_write: called immediately before each write; raises if this job may not write to run_dir.

    Attributes:
        content: the latest report; None before the first.
    """

    def __init__(
        self,
        accounting: Accounting,
        recorder: ValidationRecorder,
        earlier: EarlierReport,
        *,
        settings: MonitoringSettings,
        ranking: CheckpointSettings,
        config: str,
        thumbnails: ValidationThumbnails,
        advice: Callable[[], Sequence[Advice]] = lambda: (),
        before_write: Callable[[], None] = storage.unconditionally,
    ) -> None:
        self.accounting = accounting
        self.recorder = recorder
        self.earlier = earlier
        self.settings = settings
        self.ranking = ranking
        self.config = config
        self.thumbnails = thumbnails
        self.advice = advice
        self.before_write = before_write
        self.content: ReportContent | None = None
        self._facts: RunFacts
        self._data: ImageDataModule
        self._has_started = False
        self._results: ValidationResults
        self._shown: dict[int, bytes | None] = {}
        self._lock = threading.Lock()
        """Of the state to be written, of :attr:`content` and of whether the thread may write; held for no request."""
        self._pending: RunState | None = None
        self._is_closed = False
        self._saved_step = 0
        self._written_at = -float("inf")
        self._interval = WRITE_SECONDS
        self._is_replaceable = True
        self._number = 1
        self._thread: Periodic | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a first report, and start the thread."""
        if not trainer.is_global_zero:
            return
        self._prepare(trainer, pl_module)
        self._has_started = True
        self._have_written(self._state(trainer, "running"))
        self._thread = Periodic("report-writer", POLL_SECONDS, self._write_when_due)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the validation reported."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and self._has_started:
            evaluation = cast("TransferLearningModel", pl_module).evaluation
            if evaluation is not None:
                uri_of, step = self._data.parts["val"].uri, trainer.global_step
                result = result_of(evaluation, step, self._facts.classes, uri_of, self.settings.images)
                self._results.add(result, float(trainer.callback_metrics.get(self.ranking.metric, math.nan)))
            self._have_written(self._state(trainer, "running"))

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: object) -> None:
        """Remember the step: once the checkpoint is committed, the report names it."""
        self._saved_step = trainer.global_step
        if self._has_started:
            self._results.keep_saved(trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last report. Its figures come from the bucket, so that a run found finished has one, too.

        Raises:
            StorageError: the bucket takes no report, and holds none.
        """
        if not trainer.is_global_zero:
            return
        if self._has_started:
            is_idle = self._stop_thread(FINISHING_SECONDS)
            self.content = self._build(self._state(trainer, "finished"))
            self._publish(self.content, fetch=is_idle, replace=is_idle)
            return
        self._prepare(trainer, pl_module)
        earlier = self.earlier.content
        current = self._build(self._state_found(trainer))
        if earlier is None:
            self.content = current
            self._publish(current)
            return
        # This attempt has computed nothing: only what the bucket says of the checkpoints may differ.
        names = ("run_dir", "epochs", "global_step", "metrics", "checkpoints", "confusion_matrix", "per_class")
        fresh = {name: getattr(current, name) for name in (*names, "most_confused", "evaluation", "skipped_steps")}
        self.content = msgspec.structs.replace(earlier, **fresh, status="finished", failure=None)
        if self.content != earlier:
            self._publish(self.content)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write why the run ended, unless the bucket is out of reach or belongs to another job."""
        if not trainer.is_global_zero or not self._has_started:
            return
        is_idle = self._stop_thread(STOPPING_SECONDS)
        if not is_idle or isinstance(exception, (StorageOutage, LeaseError)):
            return
        if isinstance(exception, (Preempted, Stopped, KeyboardInterrupt)):
            status: Status = "stopped"
            failure = None
        else:
            status = "failed"
            failure = message_of(translated(exception) if isinstance(exception, Exception) else exception)

        def write(state: RunState) -> None:
            self.content = self._build(state)
            self._publish(self.content, fetch=False)

        try:
            state = self._state(trainer, status, failure)
            call_within(STOPPING_SECONDS, lambda: write(state), "writing the report")
        except (JobError, TimeoutError) as error:
            log.warning("the report does not say how this attempt ended: %s", error)
        except Exception as error:  # the exception that ended the run is the one to be seen
            log.error("the report does not say how this attempt ended:", exc_info=error)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = self._data = image_data(trainer)
        epochs = trainer.max_epochs
        self._facts = RunFacts(
            run_dir=trainer.default_root_dir,
            classes=data.classes,
            images={part: len(index) for part, index in data.parts.items()},
            planned_epochs=None if epochs is None or epochs < 0 else epochs,
            world_size=trainer.world_size,
            accelerator=type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
            precision=str(trainer.precision),
            parameters=sum(parameter.numel() for parameter in pl_module.parameters()),
            data=summarise(data),
            configuration=parse_configuration(self.config),
            versions=versions(),
            hardware=hardware(),
            initial_weights=cast("TransferLearningModel", pl_module).initial_weights,
        )
        earlier = self.earlier.content
        self._is_replaceable = not self.earlier.is_newer
        self._number = self.earlier.number
        self._results = ValidationResults(self.ranking.ranking_mode, earlier.evaluation if earlier else None)

    def _state(self, trainer: pl.Trainer, status: Status, failure: str | None = None) -> RunState:
        """The state of this moment, on the main thread."""
        attempts = self.accounting.attempts
        now = msgspec.structs.replace(attempts[-1], ended=time.time())
        seconds, images = self.recorder.train_seconds, self.recorder.train_images
        earlier = self.earlier.content.train_images_per_second if self.earlier.content else None
        return RunState(
            status=status,
            failure=failure,
            attempts=(*attempts[:-1], now),
            records=tuple(self.recorder.records),
            bad_samples=tuple(self._data.bad_samples),
            skipped_steps=cast("TransferLearningModel", trainer.lightning_module).skipped_steps,
            images_per_second=images / seconds if seconds else earlier,
            advice=tuple(AdviceEntry(each.kind, each.message, each.suggestion) for each in self.advice()),
            results=self._results.by_step(),
        )

    def _state_found(self, trainer: pl.Trainer) -> RunState:
        """The state of a run that was complete before this attempt."""
        return RunState(
            status="finished",
            failure=None,
            attempts=tuple(accounting.read(self._facts.run_dir) or self.accounting.attempts),
            records=(),
            bad_samples=tuple(self._data.bad_samples),
            skipped_steps=cast("TransferLearningModel", trainer.lightning_module).skipped_steps,
            images_per_second=None,
            results=self._results.by_step(),
        )

    def _have_written(self, state: RunState) -> None:
        """Have the thread write a state, instead of an older one that still waits."""
        with self._lock:
            self._pending = state

    def _have_written_again(self, state: RunState) -> None:
        """Have the thread write a state that it took before, unless a newer one waits."""
        with self._lock:
            self._pending = self._pending or state

    def _write_when_due(self) -> None:
        if not self._is_replaceable or time.monotonic() - self._written_at < self._interval:
            return
        with self._lock:
            state, self._pending = self._pending, None
        if state is None:
            return
        self._written_at = time.monotonic()
        try:
            content = self._build(state)
            with self._lock:
                if self._is_closed:
                    return
                self.content = content
            self._write(content, self._number, before_write=self._require_open)
        except _Closed:
            return
        except (StorageOutage, LeaseError):
            self._have_written_again(state)
            return
        except StorageError as error:
            self._is_replaceable = False
            log.warning(
                "%s can no longer be updated; training continues, and the last report gets a name of its own: %s",
                storage.join(self._facts.run_dir, numbered_name(FILE, self._number)),
                error,
            )
            return
        except JobError as error:
            log.warning("the report is not updated: %s", error)
            return
        self._written_at = time.monotonic()
        if content.global_step < self._saved_step:
            self._have_written_again(state)  # until the checkpoint of this step is committed

    def _require_open(self) -> None:
        """Raise if the thread may not write: a request that it made late must not replace the last report.

        Raises:
            _Closed: the thread is to end.
            LeaseError: another job writes to the run_dir.
        """
        if self._is_closed:
            raise _Closed
        self.before_write()

    def _publish(self, content: ReportContent, *, fetch: bool = True, replace: bool = True) -> None:
        """Write the last report, under a name of its own where the first may not be replaced.

        Args:
            content: the report.
            fetch: whether thumbnails may be fetched.
            replace: whether the first may be replaced if the bucket lets it.

        Raises:
            StorageError: the bucket takes none.
            LeaseError: another job writes to the run_dir.
        """
        try:
            if self._is_replaceable and replace:
                self._write(content, self._number, fetch=fetch)
                return
        except (StorageOutage, LeaseError):
            raise
        except StorageError as error:
            name = numbered_name(FILE, self._number)
            log.warning("%s cannot be replaced: %s", storage.join(self._facts.run_dir, name), error)
        number = free_number(self._facts.run_dir)
        self._write(content, number, fetch=fetch)
        log.info("the report is %s", storage.join(self._facts.run_dir, numbered_name(PAGE, number)))

    def _write(
        self,
        content: ReportContent,
        number: int,
        *,
        fetch: bool = True,
        before_write: Callable[[], None] | None = None,
    ) -> None:
        """Write both files.

        Args:
            content: the report.
            number: of the files.
            fetch: whether thumbnails may be fetched.
            before_write: called immediately before each write. Default: that of the constructor.

        Raises:
            StorageError: the bucket does not take them.
            LeaseError: another job writes to the run_dir.
        """
        encoded, html = content.to_json(), self._rendered(content, fetch=fetch)
        run_dir = self._facts.run_dir
        if not storage.is_local(run_dir):
            self._interval = max(WRITE_SECONDS, (len(encoded) + len(html)) / BYTES_PER_SECOND)
        for name, data in ((FILE, encoded), (PAGE, html)):
            if data:
                uri = storage.join(run_dir, numbered_name(name, number))
                storage.write_bytes(uri, data, before_write or self.before_write)

    def _rendered(self, content: ReportContent, *, fetch: bool) -> bytes:
        """The page; empty if drawing it fails, which must not fail the run."""
        try:
            return render(content, self._thumbnails_of(content, fetch=fetch)).encode(errors="backslashreplace")
        except Exception as error:
            log.error("%s is not updated, because it cannot be drawn:", PAGE, exc_info=error)
            return b""

    def _build(self, state: RunState) -> ReportContent:
        return build(self._facts, state, self.earlier.content)

    def _thumbnails_of(self, content: ReportContent, *, fetch: bool) -> dict[int, bytes | None]:
        """JPEG of each worst error by sample id; those of earlier attempts only if the sample is still the same."""
        index = self._data.parts["val"]
        errors = content.evaluation.worst_errors if content.evaluation else []
        wanted = [each.sample for each in errors if each.sample < len(index) and index.uri(each.sample) == each.uri]
        if fetch and any(self._shown.get(sample) is None for sample in wanted):
            self._shown = self.thumbnails.jpegs(self._data, wanted)
        return {sample: self._shown.get(sample) for sample in wanted}

    def _stop_thread(self, timeout: float) -> bool:
        """Stop the thread, which begins no further write; returns False if it is busy after ``timeout`` seconds."""
        with self._lock:
            self._is_closed = True
        thread, self._thread = self._thread, None
        return thread is None or thread.stop(timeout)
