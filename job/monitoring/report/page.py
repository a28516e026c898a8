"""``report.html``: one file that opens without a server, and holds no script and no external reference."""

from __future__ import annotations

import base64
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from job.monitoring.drawing.class_labels import shortened
from job.monitoring.drawing.html import html_environment
from job.monitoring.history import ValidationRecord
from job.monitoring.report import svg, text
from job.monitoring.report.content import ClassMetrics, PartSummary, ReportContent
from job.monitoring.report.svg import Series
from job.process.progress import duration
from job.storage.uris import basename

MOST_MATRIX_CLASSES = 50
"""Classes up to which the confusion matrix is drawn."""
MOST_ROWS = 200
"""Rows of a table of classes; of more classes those of the lowest F1 are shown."""
MOST_ATTEMPTS = 50
MOST_LINES = 50
MOST_CURVES = 10
CONFIGURATION_CHARACTERS = 60_000
MOST_LR_GROUPS = 8
WIDE = 20
"""Ratio of throughputs, as of epochs with and without cached features, from which on their axis is logarithmic."""

LABELS = {
    "f1": "F1",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "auroc": "AUROC",
    "ece": "ECE",
    "top5_accuracy": "top-5 accuracy",
}
CHARTS = (
    ("Loss", ("train/loss", "val/loss")),
    ("Accuracy", ("train/accuracy", "val/accuracy", "val/top5_accuracy")),
    ("F1, AUROC and mAP", ("val/f1", "val/auroc", "val/mAP", "val/micro_f1", "val/macro_f1")),
    ("Calibration error (ECE)", ("val/ece", "val/ece_calibrated")),
)
"""Titles of charts and the metrics in them."""
STATUS = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped; the same command continues it",
    "failed": "failed",
}


def render(report: ReportContent, thumbnails: Mapping[int, bytes | None]) -> str:
    """The page.

    Args:
        report: what to show.
        thumbnails: JPEG by sample id, for the worst errors.
    """
    page: str = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            name=shortened(basename(report.run_dir.rstrip("/")) or report.run_dir),
            status=STATUS[report.status],
            headlines=_headlines(report),
            curves=history_charts(report.history),
            matrix=_matrix(report),
            classes=_class_rows(report.per_class),
            reliability=_reliability(report),
            calibrated=_calibrated(report),
            class_curves=_class_curves(report),
            errors=_errors(report, thumbnails),
            part_rows=_part_rows(report),
            class_counts=_class_counts(report),
            accelerators=list(Counter(report.hardware.accelerators).items()),
            time_bar=_time_bar(report.seconds),
            attempts=report.attempts[-MOST_ATTEMPTS:],
            recomputed_steps=sum(each.recomputed_steps for each in report.attempts),
            ends=_ends(report),
            configuration=_configuration(report.configuration),
            most_lines=MOST_LINES,
        )
    )
    return page


def history_charts(history: Sequence[ValidationRecord]) -> list[Markup]:
    """Curves over epochs, or over steps where an epoch has several validations."""
    epochs = [record.epoch for record in history]
    by_epoch = len(set(epochs)) == len(epochs)
    x_label = "epoch" if by_epoch else "step"
    xs = [float(record.epoch if by_epoch else record.global_step) for record in history]

    def metric(name: str) -> Series:
        """A metric, by the mean of the epoch where each has one validation; that of single steps is noisy."""
        whole = [record.metrics.get(f"{name}_epoch") if by_epoch else None for record in history]
        values = [record.metrics.get(name) for record in history]
        return line(name, [value if mean is None else mean for mean, value in zip(whole, values, strict=True)])

    def line(name: str, values: Sequence[float | None]) -> Series:
        return Series(name, [(x, y) for x, y in zip(xs, values, strict=True) if y is not None])

    drawn = [
        svg.line_chart(
            title,
            [metric(name) for name in names],
            x_label=x_label,
        )
        for title, names in CHARTS
    ]
    groups = list(dict.fromkeys(name for record in history for name in record.lr))[:MOST_LR_GROUPS]
    rates = [line(name, [record.lr.get(name) for record in history]) for name in groups]
    drawn.append(svg.line_chart("Learning rate", rates, x_label=x_label, log=True))
    speed = line("images/s", [record.images_per_second for record in history])
    speeds = [y for _, y in speed.points if y > 0]
    is_wide = bool(speeds) and max(speeds) > WIDE * min(speeds)
    drawn.append(svg.line_chart("Throughput", [speed], x_label=x_label, unit="images/s", log=is_wide))
    waits = line("data wait", [record.data_wait for record in history])
    if any(y > 0.01 for _, y in waits.points):
        drawn.append(svg.line_chart("Waiting for data", [waits], x_label=x_label, unit="share of training time"))
    return [chart for chart in drawn if chart]


@functools.cache
def _environment() -> Environment:
    return html_environment(
        "job.monitoring.report",
        number=text.number,
        percent=text.percent,
        size=text.size,
        moment=_moment,
        bar=svg.inline_bar,
    )


def _moment(iso: str) -> str:
    """An ISO 8601 time for a person, in UTC; other text as it is."""
    try:
        return datetime.fromisoformat(iso).strftime("%-d %B %Y, %H:%M UTC")
    except ValueError:
        return shortened(iso)


def _headlines(report: ReportContent) -> list[tuple[str, str, str]]:
    """Tiles as (label, value, note); first the metric that ranks checkpoints."""
    tiles = []
    best = report.checkpoints.best if report.checkpoints else None
    ranking = best.monitor.removeprefix("val/") if best else ""
    for name in dict.fromkeys((ranking, *text.METRICS)):
        value = report.metrics.get(f"val/{name}", best.value if best and name == ranking else None)
        if value is not None:
            tiles.append(
                (
                    LABELS.get(name, name.replace("_", " ")),
                    text.number(value),
                    ", ".join(_notes(report, name, is_ranking=name == ranking)),
                )
            )
    tiles = tiles[:5]
    if report.train_images_per_second:
        processes = f"{report.world_size} process{'es' if report.world_size > 1 else ''}"
        tiles.append(("images/s", f"{report.train_images_per_second:,.0f}", f"training, {processes}"))
    if "goodput" in report.seconds:
        wall = duration(report.seconds.get("wall", 0.0))
        tiles.append(("goodput", text.percent(report.seconds["goodput"]), f"of {wall}"))
    return tiles


def _notes(report: ReportContent, metric: str, *, is_ranking: bool) -> Iterator[str]:
    """Notes on a metric: its role, and how far it may be from the exact value."""
    if is_ranking:
        yield "ranks checkpoints"
    error = report.evaluation.metric_errors.get(metric) if report.evaluation else None
    if error is not None:
        yield f"from histograms, exact to ±{error:.1g}"


def _matrix(report: ReportContent) -> Markup:
    matrix = report.confusion_matrix
    if matrix is None or not 2 <= len(report.classes) <= MOST_MATRIX_CLASSES or matrix.counts is None:
        return Markup("")
    count = len(report.classes)
    cells = [
        (label, guess, samples)
        for label, row in enumerate(matrix.counts[:count])
        for guess, samples in enumerate(row[:count])
        if samples
    ]
    return svg.confusion_matrix(cells, report.classes)


def _class_rows(classes: Sequence[ClassMetrics]) -> Sequence[ClassMetrics]:
    if len(classes) <= MOST_ROWS:
        return classes
    return sorted(classes, key=lambda each: 2.0 if each.f1 is None else each.f1)[:MOST_ROWS]


def _reliability(report: ReportContent) -> Markup:
    calibration = report.evaluation.calibration if report.evaluation else None
    return svg.reliability_diagram(calibration.bins) if calibration else Markup("")


def _calibrated(report: ReportContent) -> Markup:
    calibrator = report.evaluation.calibrator if report.evaluation else None
    return svg.reliability_diagram(calibrator.after.bins) if calibrator and calibrator.after else Markup("")


def _class_curves(report: ReportContent) -> list[Markup]:
    curves = report.evaluation.curves if report.evaluation else []
    if not 1 <= len(curves) <= MOST_CURVES:
        return []
    axis = svg.unit_axis()
    if len(report.classes) == 2:
        curves = curves[1:]  # those of the other class say the same
    pr = [
        Series(
            f"{each.name} · AP {text.number(each.average_precision, 3)}",
            list(zip(each.recall, each.precision, strict=False)),
        )
        for each in curves
    ]
    roc = [
        Series(
            f"{each.name} · AUROC {text.number(each.auroc, 3)}",
            list(zip(each.false_positive_rate, each.recall, strict=False)),
        )
        for each in curves
        if each.auroc is not None
    ]
    drawn = [
        svg.line_chart(
            "Precision and recall",
            pr,
            x_label="recall",
            unit="precision",
            x_axis=axis,
            y_axis=axis,
            curves=True,
        ),
        svg.line_chart(
            "ROC",
            roc,
            x_label="false positive rate",
            unit="true positive rate",
            x_axis=axis,
            y_axis=axis,
            diagonal=True,
            curves=True,
        ),
    ]
    return [chart for chart in drawn if chart]


def _errors(report: ReportContent, thumbnails: Mapping[int, bytes | None]) -> list[dict[str, Any]]:
    errors = report.evaluation.worst_errors if report.evaluation else []
    return [
        {
            "image": _data_uri(thumbnails.get(each.sample)),
            "labels": ", ".join(shortened(name, 40) for name in each.labels[:5]) or "none",
            "predicted": ", ".join(shortened(name, 40) for name in each.predicted[:5]) or "none",
            "confidence": each.confidence,
            "uri": each.uri,
            "file": shortened("/".join(each.uri.split("/")[-2:]), 40),
        }
        for each in errors
    ]


def _data_uri(jpeg: bytes | None) -> str | None:
    return None if jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _part_rows(report: ReportContent) -> list[tuple[str, PartSummary]]:
    return list(report.data.parts.items())


def _class_counts(report: ReportContent) -> list[tuple[str, list[int], float]]:
    """Rows of (class, images by part, share of the largest class); none for many classes, or of one size."""
    counts = [part.images_per_class for part in report.data.parts.values()]
    if len(report.classes) > MOST_ROWS or any(len(each) != len(report.classes) for each in counts) or not counts:
        return []
    most = max(counts[0], default=0) or 1
    by_class = zip(report.classes, zip(*counts, strict=True), strict=True)
    return [(name, list(row), row[0] / most) for name, row in by_class]


def _time_bar(seconds: Mapping[str, float]) -> Markup:
    return svg.share_bar([(label, max(seconds.get(name, 0.0), 0.0)) for name, label in text.TIMES.items()])


def _ends(report: ReportContent) -> str:
    """How earlier attempts ended, as a sentence's part: "2 killed, 1 stopped"."""
    ends = [each.end for each in report.attempts[:-1]]
    return ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends) if end != "unknown")


def _configuration(configuration: Mapping[str, Any]) -> str:
    """The configuration as YAML, without options that are not set."""
    return yaml.safe_dump(_set_only(configuration), sort_keys=False, allow_unicode=True)[:CONFIGURATION_CHARACTERS]


def _set_only(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _set_only(each) for name, each in value.items() if each is not None}
    return value
