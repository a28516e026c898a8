"""The content of ``report.json``: its schema, and how it is read and written.

Sizes are bounded: see the constants. Numbers are finite or null.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from job import typed
from job.checkpoint.initial import InitialWeights
from job.errors import CheckpointError, NewerFormatError
from job.monitoring.history import Records
from job.storage.format_version import MALFORMED, Unversioned, format_version

FILE = "report.json"
FORMAT = 2
"""Version of the format; 1 had no ``format`` field."""
MOST_CLASSES = 1000
"""Classes up to which each one's metrics and numbers of images are listed."""
MOST_CURVES = 20
"""Classes up to which their PR and ROC curves are listed."""
MOST_PAIRS = 20
"""Pairs of confused classes that are listed, the most frequent first."""
MOST_BAD_SAMPLES = 1000
MOST_ATTEMPTS = 1000
INDENTED_BYTES = 100_000
"""Size up to which the file is indented for a reader."""

Count = Annotated[int, Meta(ge=0, lt=2**53)]
Share = Annotated[float, Meta(ge=0, le=1)]
Text = Annotated[str, Meta(max_length=65_536)]
Values = Annotated[dict[Text, float | None], Meta(max_length=10_000)]
Status = Literal["running", "finished", "stopped", "failed"]
End = Literal["running", "finished", "stopped", "failed", "killed", "unknown"]


class CheckpointEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint.

    Attributes:
        uri: its file.
        epoch: epochs completed.
        global_step: optimizer steps done.
        metrics: its validation metrics; None for a value that is not finite.
        monitor: metric that ranks checkpoints.
        mode: whether the higher or the lower value is better.
        value: that metric of this checkpoint; None where it was not measured.
        bytes: size.
        sha256: SHA-256, in hexadecimal.
    """

    uri: Text
    epoch: Count
    global_step: Count
    metrics: Values
    monitor: Text = ""
    mode: Literal["max", "min"] = "max"
    value: float | None = None
    bytes: Count = 0
    sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?$")] = ""


class Checkpoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The best and the last checkpoint.

    Attributes:
        best: the one that predicts.
        last: the newest.
    """

    best: CheckpointEntry
    last: CheckpointEntry


class ConfusionMatrix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Confusion matrix of the best checkpoint; only the fields that apply are present.

    Attributes:
        rows: what rows are.
        columns: what columns are.
        file: URI of the complete matrix.
        counts: the matrix [C, C], for few classes.
        classes: number of classes.
        nonzero_cells: number of cells that are not zero.
        true_predicted_count: those cells as (true class, predicted class, count), if they are not too many.
        true_negatives: per class, where samples have several labels.
        false_positives: per class, where samples have several labels.
        false_negatives: per class, where samples have several labels.
        true_positives: per class, where samples have several labels.
    """

    rows: Text | None = None
    columns: Text | None = None
    file: Text | None = None
    counts: list[list[Count]] | None = None
    classes: Count | None = None
    nonzero_cells: Count | None = None
    true_predicted_count: list[tuple[Count, Count, Count]] | None = None
    true_negatives: list[Count] | None = None
    false_positives: list[Count] | None = None
    false_negatives: list[Count] | None = None
    true_positives: list[Count] | None = None


class ClassMetrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Metrics of one class in the validation of the best checkpoint.

    Attributes:
        name: of the class.
        precision: share of the samples predicted as this class that are of it; None if none are predicted.
        recall: share of the samples of this class that are predicted as it; None if there are none.
        f1: harmonic mean of precision and recall; None for a class that neither occurs nor is predicted.
        support: samples of the class.
        predicted: samples predicted as the class.
    """

    name: Text
    precision: Share | None
    recall: Share | None
    f1: Share | None
    support: Count
    predicted: Count


class ConfusedPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two classes that the best checkpoint confuses.

    Attributes:
        label: true class.
        predicted: predicted class.
        count: samples.
        share: of the samples of the true class.
    """

    label: Text
    predicted: Text
    count: Count
    share: Share


class CalibrationBin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Predictions whose confidence is in one interval.

    Attributes:
        lowest: lower end of the interval.
        highest: upper end.
        count: predictions.
        confidence: their mean confidence; None without predictions.
        accuracy: share of them that are correct; None without predictions.
    """

    lowest: Share
    highest: Share
    count: Count
    confidence: float | None
    accuracy: Share | None


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Confidence against accuracy.

    Attributes:
        error: expected calibration error (ECE).
        bins: of equal width in confidence.
    """

    error: float | None
    bins: Annotated[list[CalibrationBin], Meta(max_length=1000)]


class OperatingPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Selective classification at one threshold of confidence, on the validation samples.

    Attributes:
        target_precision: share of the accepted predictions that is to be right.
        threshold: confidence from which predictions are accepted; None where no threshold reaches the precision.
        coverage: share of the predictions that are accepted; None where no threshold reaches the precision.
    """

    target_precision: Share
    threshold: Share | None
    coverage: Share | None


class CalibratorSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The calibration of a checkpoint's probabilities, or why it has none.

    Attributes:
        method: "temperature", or "platt" for several labels; None where there is none.
        reason: why there is none; empty where there is one.
        samples: validation samples that it was fitted to.
        temperature: by which logits are divided; None for several labels.
        classes: classes whose logits change, for several labels.
        error_before: expected calibration error (ECE) of these samples.
        after: confidence against accuracy with calibration, by five-fold cross-fitting.
        selective: coverage at some precisions, for one label per image.
    """

    method: Literal["temperature", "platt"] | None
    reason: Text = ""
    samples: Count = 0
    temperature: float | None = None
    classes: Count = 0
    error_before: float | None = None
    after: Calibration | None = None
    selective: Annotated[list[OperatingPoint], Meta(max_length=100)] = []


class Curves(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PR and ROC curves of a class against the rest, thinned.

    Attributes:
        name: of the class.
        recall: true positive rate, ascending; of both curves.
        precision: at each recall.
        false_positive_rate: at each recall.
        average_precision: area under the PR curve.
        auroc: area under the ROC curve; None if all samples, or none, are of the class.
    """

    name: Text
    recall: Annotated[list[Share], Meta(max_length=1000)]
    precision: Annotated[list[Share], Meta(max_length=1000)]
    false_positive_rate: Annotated[list[Share], Meta(max_length=1000)]
    average_precision: Share | None
    auroc: Share | None


class WorstError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A wrong prediction of a high loss.

    Attributes:
        sample: sample id in the validation part.
        uri: of the sample, without credentials.
        labels: true classes.
        predicted: predicted classes.
        confidence: of the prediction.
        loss: of the sample.
    """

    sample: Count
    uri: Text
    labels: list[Text]
    predicted: list[Text]
    confidence: float | None
    loss: float | None


class EvaluationResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The validation of one checkpoint, besides its metrics and its confusion matrix.

    Attributes:
        global_step: of the checkpoint.
        calibration: confidence against accuracy; None where it was not measured.
        curves: of each class, for few classes.
        worst_errors: wrong predictions of the highest loss, the worst first.
        metric_errors: largest possible difference from the exact value, by metric without ``val/``, of those that are
            computed from histograms of the scores, above 100 classes or 50,000 images; the others are exact.
        calibrator: calibration of the checkpoint's probabilities; None where none was fitted.
    """

    global_step: Count
    calibration: Calibration | None = None
    curves: Annotated[list[Curves], Meta(max_length=MOST_CURVES)] = []
    worst_errors: Annotated[list[WorstError], Meta(max_length=1000)] = []
    metric_errors: Annotated[dict[Text, float], Meta(max_length=100)] = {}
    calibrator: CalibratorSummary | None = None


class PartSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of the data.

    Attributes:
        images: number of images.
        root: URI, without credentials.
        mean_bytes: mean size of an image as it is stored; 0 where that is not known.
        images_per_class: in the order of classes; empty above :data:`MOST_CLASSES` classes.
        smallest_class: images of the class that has the fewest.
        largest_class: images of the class that has the most.
        fingerprint: hash of names and labels.
    """

    images: Count
    root: Text = ""
    mean_bytes: float = 0.0
    images_per_class: Annotated[list[Count], Meta(max_length=MOST_CLASSES)] = []
    smallest_class: Count = 0
    largest_class: Count = 0
    fingerprint: Text = ""


class LeftOutFiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files that are no samples.

    Attributes:
        reason: why they are left out, as a plural noun.
        count: how many.
        example: one of them.
    """

    reason: Text
    count: Count
    example: Text


class DataSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The images of the run.

    Attributes:
        parts: by name.
        left_out: files beside them that are no samples.
        absent: why a part that the data seems to have was not used, by part.
        image_size: height and width of the network's input, in pixels.
        resize: how images are brought to it.
    """

    parts: dict[Text, PartSummary] = {}
    left_out: Annotated[list[LeftOutFiles], Meta(max_length=1000)] = []
    absent: dict[Text, Text] = {}
    image_size: Count = 0
    resize: Text = ""


class AttemptSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One attempt: a fit from its start to its end, or to the death of its ranks.

    Attributes:
        began: ISO 8601 time.
        ended: ISO 8601 time of the last sign of life.
        world_size: number of processes.
        first_step: ``global_step`` that it continued from.
        last_step: ``global_step`` that it reached.
        recomputed_steps: steps of it that the next attempt had to repeat.
        end: how it ended.
    """

    began: Text
    ended: Text
    world_size: Count
    first_step: Count
    last_step: Count
    recomputed_steps: Count
    end: End


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The machine of rank 0.

    Attributes:
        platform: operating system and architecture.
        cpu: model.
        cpus: CPUs that the process may use.
        memory_bytes: of the machine; None where that is not known.
        accelerators: names of the accelerators of this machine.
    """

    platform: Text = ""
    cpu: Text = ""
    cpus: Count = 0
    memory_bytes: Count | None = None
    accelerators: Annotated[list[Text], Meta(max_length=1000)] = []


class AdviceEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A warning.

    Attributes:
        kind: of the warning.
        message: what was noticed.
        suggestion: what to change.
    """

    kind: Text
    message: Text
    suggestion: Text


class ReportContent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``report.json``.

    Attributes:
        run_dir: folder of the run.
        status: whether the run goes on, is complete, was stopped by a signal and can continue, or failed.
        failure: message of the error that ended a failed run.
        started: ISO 8601 time at which the first attempt began.
        updated: ISO 8601 time of this report.
        epochs: epochs completed at the last checkpoint.
        planned_epochs: epochs that the run is to have; None: no limit.
        global_step: optimizer steps at the last checkpoint.
        world_size: number of processes.
        accelerator: cpu, cuda, …
        precision: of the computation.
        parameters: number of parameters of the network.
        classes: class names, in the order of the network's outputs.
        images: number of images by part.
        bad_samples: images that could not be read, with the cause; at most 1,000.
        skipped_steps: optimizer steps skipped because gradients were not finite.
        train_images_per_second: throughput of training; None where no epoch was trained to its end.
        metrics: validation metrics of the best checkpoint; None for a value that is not finite.
        checkpoints: the best and the last; None where there is none.
        confusion_matrix: of the best checkpoint.
        per_class: metrics of each class for the best checkpoint; above 1,000 classes those of the lowest F1.
        most_confused: the pairs of classes that the best checkpoint confuses most.
        evaluation: more of the validation of the best checkpoint.
        history: validations of the run; above 1,000 validations every second one is dropped, repeatedly.
        advice: warnings.
        data: the images.
        attempt_count: number of attempts.
        attempts: the last 1,000 of them.
        seconds: where the time went, over all attempts; see :func:`job.monitoring.accounting.totals`.
        configuration: resolved configuration, by option.
        versions: versions of packages.
        hardware: of rank 0.
        initial_weights: checkpoint of another run that this run started from (--init_from); None: it started from
            pretrained or random weights.
        format: version of this format.
    """

    run_dir: Text
    started: Text
    epochs: Count
    global_step: Count
    world_size: Count
    accelerator: Text
    classes: Annotated[list[Text], Meta(max_length=1 << 20)]
    images: dict[Text, Count]
    bad_samples: list[Text]
    skipped_steps: Count
    train_images_per_second: float | None
    metrics: Values
    confusion_matrix: ConfusionMatrix | None
    checkpoints: Checkpoints | None
    attempt_count: Count
    seconds: dict[Text, float]
    versions: dict[Text, Text]
    status: Status = "finished"
    failure: Text | None = None
    updated: Text = ""
    planned_epochs: Count | None = None
    precision: Text = ""
    parameters: Count = 0
    per_class: Annotated[list[ClassMetrics], Meta(max_length=MOST_CLASSES)] = []
    most_confused: Annotated[list[ConfusedPair], Meta(max_length=MOST_PAIRS)] = []
    evaluation: EvaluationResult | None = None
    history: Records = []
    advice: Annotated[list[AdviceEntry], Meta(max_length=1000)] = []
    data: DataSummary = DataSummary()
    attempts: Annotated[list[AttemptSummary], Meta(max_length=MOST_ATTEMPTS)] = []
    configuration: dict[str, Any] = {}
    hardware: Hardware = Hardware()
    initial_weights: InitialWeights | None = None
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Strict JSON; NaN and infinity become null. A large report is not indented."""
        content = msgspec.json.encode(self)
        return msgspec.json.format(content, indent=2) if len(content) <= INDENTED_BYTES else content


@dataclass(frozen=True)
class Report:
    """Result of a fit.

    Attributes:
        run_dir: folder of the run.
        metrics: validation metrics of the best checkpoint, by name; None for a value that is not finite.
        best: URI of the best checkpoint; None where there is none.
        last: URI of the newest checkpoint.
        epochs: epochs completed.
        global_step: optimizer steps done.
        classes: class names, in the order of the network's outputs.
        images: number of images by part.
        bad_samples: images that could not be read.
        images_per_second: throughput of training; None where no attempt trained an epoch to its end.
        seconds: where the time went, over all attempts; see :func:`job.monitoring.accounting.totals`.
        content: all of ``report.json``, as plain JSON values.
        typed_content: the same as a struct.
    """

    run_dir: str
    metrics: dict[str, float | None]
    best: str | None
    last: str | None
    epochs: int
    global_step: int
    classes: tuple[str, ...]
    images: dict[str, int]
    bad_samples: tuple[str, ...]
    images_per_second: float | None
    seconds: dict[str, float]
    content: dict[str, Any] = field(repr=False)
    typed_content: ReportContent = field(repr=False)

    @classmethod
    def of(cls, content: ReportContent) -> Report:
        """The report with this content of ``report.json``."""
        checkpoints = content.checkpoints
        return cls(
            run_dir=content.run_dir,
            metrics=content.metrics,
            best=checkpoints.best.uri if checkpoints else None,
            last=checkpoints.last.uri if checkpoints else None,
            epochs=content.epochs,
            global_step=content.global_step,
            classes=tuple(content.classes),
            images=content.images,
            bad_samples=tuple(content.bad_samples),
            images_per_second=content.train_images_per_second,
            seconds=content.seconds,
            content=typed.from_json(msgspec.json.encode(content)),
            typed_content=content,
        )


def decode_report(uri: str, content: bytes) -> ReportContent:
    """The report in ``content``, which was read from ``uri``.

    Raises:
        CheckpointError: it is damaged.
        NewerFormatError: a newer version of job wrote it.
    """
    try:
        version = format_version(content, Unversioned)
        if version > FORMAT:
            raise NewerFormatError(
                f"{uri} was written by a newer version of job: it has format {version}, this version reads formats up "
                f"to {FORMAT}. Upgrade job."
            )
        if version == 1:
            return _from_format_1(content)
        return typed.from_json(content, ReportContent)
    except MALFORMED as error:
        raise CheckpointError(f"{uri} is damaged: {error}") from error


def _from_format_1(content: bytes) -> ReportContent:
    """The report of an earlier version.

    Its checkpoints had the ranking metric under its own name; ``updated``, ``attempt_count`` and ``seconds.recomputed``
    were ``finished``, ``starts`` and ``seconds.lost``.
    """
    fields = typed.from_json(content, dict[str, Any])
    fields["updated"] = fields.pop("finished", "")
    if "starts" in fields:
        fields["attempt_count"] = fields.pop("starts")
    seconds = fields.get("seconds")
    if isinstance(seconds, dict) and "lost" in seconds:
        fields["seconds"] = {"recomputed" if name == "lost" else name: value for name, value in seconds.items()}
    checkpoints = fields.get("checkpoints") or None
    if isinstance(checkpoints, dict):
        known = ("uri", "epoch", "global_step", "metrics")
        checkpoints = {
            which: {name: entry[name] for name in known if name in entry}
            for which, entry in checkpoints.items()
            if isinstance(entry, dict)
        }
    fields["checkpoints"] = checkpoints
    return typed.from_builtins(fields, ReportContent)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``report.json``, with the documentation of each field."""
    schema = msgspec.json.schema(ReportContent)
    for definition in schema["$defs"].values():
        summary, _, attributes = inspect.cleandoc(definition.get("description", "")).partition("\nAttributes:\n")
        definition["description"] = summary.strip()
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            definition["properties"][name]["description"] = " ".join(text.split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "report.json of job", **schema}
