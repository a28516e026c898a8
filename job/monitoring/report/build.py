"""Makes the content of a report, from the state of a fit and from the checkpoints in the bucket."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import yaml

from job import checkpoint, storage, typed
from job.checkpoint import confusion
from job.checkpoint.confusion import Cells
from job.checkpoint.initial import InitialWeights
from job.checkpoint.manifest import Manifest
from job.errors import JobError
from job.monitoring.accounting import Attempt, totals
from job.monitoring.history import ValidationRecord
from job.monitoring.report.content import (
    MOST_ATTEMPTS,
    MOST_BAD_SAMPLES,
    AdviceEntry,
    AttemptSummary,
    CheckpointEntry,
    Checkpoints,
    ConfusionMatrix,
    DataSummary,
    End,
    EvaluationResult,
    Hardware,
    ReportContent,
    Status,
)
from job.monitoring.report.measures import most_confused, per_class
from job.redact import redact

log = logging.getLogger(__name__)

TEXT_CHARACTERS = 2000


@dataclass(frozen=True)
class RunFacts:
    """What does not change while an attempt lasts; fields as in :class:`ReportContent`."""

    run_dir: str
    classes: tuple[str, ...]
    images: dict[str, int]
    planned_epochs: int | None
    world_size: int
    accelerator: str
    precision: str
    parameters: int
    data: DataSummary
    configuration: dict[str, Any]
    versions: dict[str, str]
    hardware: Hardware
    initial_weights: InitialWeights | None


@dataclass(frozen=True)
class RunState:
    """What changes: the state of a fit at one moment.

    Attributes:
        status: of the run.
        failure: message of the error that ended it.
        attempts: all attempts, the current one last.
        records: validations so far.
        bad_samples: images that could not be read.
        skipped_steps: optimizer steps skipped.
        images_per_second: throughput of this attempt; None where it has completed no epoch.
        advice: warnings.
        results: validations by ``global_step``, for the entry of the best checkpoint.
    """

    status: Status
    failure: str | None
    attempts: tuple[Attempt, ...]
    records: tuple[ValidationRecord, ...]
    bad_samples: tuple[str, ...]
    skipped_steps: int
    images_per_second: float | None
    advice: tuple[AdviceEntry, ...] = ()
    results: Mapping[int, EvaluationResult] = field(default_factory=dict)


def build(facts: RunFacts, state: RunState, earlier: ReportContent | None) -> ReportContent:
    """The report of a run at one moment.

    Args:
        facts: what does not change.
        state: what does.
        earlier: report of an earlier attempt; gives how earlier attempts ended.

    Raises:
        JobError: the checkpoints in the bucket cannot be read.
    """
    committed = checkpoint.manifests(facts.run_dir)
    best, last = ((checkpoint.ranked(committed) or committed[-1:])[0], committed[-1]) if committed else (None, None)
    cells = _confusion_cells(facts.run_dir, best, len(facts.classes))
    attempts = summarise_attempts(state.attempts, earlier.attempts if earlier else (), state.status)
    return ReportContent(
        run_dir=facts.run_dir,
        status=state.status,
        failure=state.failure,
        started=iso(state.attempts[0].began),
        updated=iso(state.attempts[-1].ended),
        epochs=last.epoch if last else 0,
        planned_epochs=facts.planned_epochs,
        global_step=last.global_step if last else 0,
        world_size=facts.world_size,
        accelerator=facts.accelerator,
        precision=facts.precision,
        parameters=facts.parameters,
        classes=list(facts.classes),
        images=facts.images,
        bad_samples=[redact(line)[:TEXT_CHARACTERS] for line in sorted(state.bad_samples)[:MOST_BAD_SAMPLES]],
        skipped_steps=state.skipped_steps,
        train_images_per_second=state.images_per_second,
        metrics=finite(best.metrics) if best else {},
        checkpoints=Checkpoints(_entry(facts.run_dir, best), _entry(facts.run_dir, last)) if best and last else None,
        confusion_matrix=_confusion_matrix(facts.run_dir, best, cells),
        per_class=[] if cells is None else per_class(cells, facts.classes),
        most_confused=[] if cells is None else most_confused(cells, facts.classes),
        evaluation=state.results.get(best.global_step) if best else None,
        history=list(state.records),
        advice=list(state.advice),
        data=facts.data,
        attempt_count=len(state.attempts),
        attempts=attempts[-MOST_ATTEMPTS:],
        seconds=totals(list(state.attempts)),
        configuration=facts.configuration,
        versions=facts.versions,
        hardware=facts.hardware,
        initial_weights=facts.initial_weights,
    )


def summarise_attempts(
    attempts: Sequence[Attempt], earlier: Sequence[AttemptSummary], status: Status
) -> list[AttemptSummary]:
    """One entry per attempt.

    Args:
        attempts: accounting of all attempts, the current one last.
        earlier: entries in the report of an earlier attempt. One that was running then has been killed.
        status: of the run.
    """
    # Two attempts may begin in the same second, to which times are written.
    ends: dict[tuple[str, int], End] = {
        (each.began, each.first_step): "killed" if each.end == "running" else each.end for each in earlier
    }
    summaries = []
    for number, attempt in enumerate(attempts):
        following = attempts[number + 1] if number + 1 < len(attempts) else None
        began = iso(attempt.began)
        summaries.append(
            AttemptSummary(
                began=began,
                ended=iso(attempt.ended),
                world_size=attempt.world_size,
                first_step=attempt.first_step,
                last_step=attempt.last_step,
                recomputed_steps=max(attempt.last_step - following.first_step, 0) if following else 0,
                end=status if following is None else ends.get((began, attempt.first_step), "unknown"),
            )
        )
    return summaries


def message_of(error: BaseException) -> str:
    """What the report says of an error: without credentials, and not too long."""
    text = str(error).strip() or type(error).__name__
    name = "" if isinstance(error, JobError) else f"{type(error).__name__}: "
    return redact(f"{name}{text}")[:TEXT_CHARACTERS]


def parse_configuration(text: str) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    tree = yaml.safe_load(text)
    plain = typed.from_json(msgspec.json.encode(tree, enc_hook=str))
    return plain if isinstance(plain, dict) else {}


def iso(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 text."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics, None for a value that is not finite."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}


def _entry(run_dir: str, manifest: Manifest) -> CheckpointEntry:
    return CheckpointEntry(
        uri=storage.join(run_dir, checkpoint.FOLDER, manifest.file),
        epoch=manifest.epoch,
        global_step=manifest.global_step,
        metrics=finite(manifest.metrics),
        monitor=manifest.monitor,
        mode=manifest.mode,
        value=manifest.value,
        bytes=manifest.bytes,
        sha256=manifest.sha256,
    )


def _confusion_cells(run_dir: str, manifest: Manifest | None, classes: int) -> Cells | None:
    if manifest is None or manifest.confusion is None or manifest.confusion.classes != classes:
        return None
    try:
        return checkpoint.confusion_cells(run_dir, manifest)
    except JobError as error:
        log.warning("the report has no confusion matrix: %s", error)
        return None


def _confusion_matrix(run_dir: str, manifest: Manifest | None, cells: Cells | None) -> ConfusionMatrix | None:
    if manifest is None or cells is None or manifest.confusion is None:
        return None
    entry = confusion.as_json(cells, manifest.confusion.classes, checkpoint.confusion_uri(run_dir, manifest))
    return typed.from_builtins(entry, ConfusionMatrix)
