"""Charts of an evaluation as images: confusion matrix, reliability diagram, ROC curves."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from job.model.class_counts import counts_of_cells
from job.model.evaluation import Calibration, Counts, Floats, ScoreHistograms
from job.monitoring.drawing.canvas import (
    BLACK,
    BLUE,
    GREY,
    LIGHT,
    RED,
    WHITE,
    Canvas,
    Colour,
    Figure,
    Point,
    cut_to_width,
    text_width,
)
from job.monitoring.drawing.curves import curves_of_classes
from job.process.progress import compact_number

MOST_BYTES = 128 << 10
"""Limit on the PNG of a chart."""
MOST_CLASSES = 50
"""Classes that a chart has room for."""
FEW_CLASSES = 6
"""Classes up to which cells are large."""
WRITTEN_CLASSES = 20
"""Classes up to which cells contain their counts."""
LABEL_WIDTH = 150
"""Widest label of a row or column, in pixels."""
TITLE_HEIGHT = 44
PLOT = 420
"""Height and width of a plot, in pixels."""
MARGIN = 56


def confusion_matrix(cells: Counts, labels: Sequence[str]) -> Figure:
    """Counts by true and predicted class, coloured by their share of the true class.

    Above :data:`MOST_CLASSES` classes those that are confused most often are shown.

    Args:
        cells: those that are not zero, int64 [N, 3]: rows of (true class, predicted class, count).
        labels: of the classes.
    """
    correct, support, predicted = counts_of_cells(cells, len(labels))
    shown, title = np.arange(len(labels)), f"Confusion matrix of {support.sum():,} samples"
    if len(labels) > MOST_CLASSES:
        errors = predicted + support - 2 * correct
        shown = np.sort(np.argsort(-errors, kind="stable")[:MOST_CLASSES])
        title = f"Confusion matrix: the {len(shown)} classes of {len(labels):,} that are confused most often"
    places = np.full(len(labels), -1)
    places[shown] = np.arange(len(shown))
    rows, columns = places[cells[:, 0]], places[cells[:, 1]]
    inside = (rows >= 0) & (columns >= 0)
    counts = np.zeros((len(shown), len(shown)), np.int64)
    counts[rows[inside], columns[inside]] = cells[inside, 2]
    shares = counts / np.maximum(support[shown, None], 1)
    names = [labels[number] for number in shown.tolist()]
    return _heat_map(title, "row: truth, column: prediction, colour: share of the row", counts, shares, names)


def decisions(cells: Counts, labels: Sequence[str]) -> Figure:
    """Decisions on each class of samples with several labels.

    Above :data:`MOST_CLASSES` classes those with the most wrong decisions are shown.

    Args:
        cells: int64 [C, 2, 2], [[true negatives, false positives], [false negatives, true positives]].
        labels: of the classes.
    """
    shown, title = np.arange(len(cells)), "Decisions per class"
    if len(cells) > MOST_CLASSES:
        shown = np.sort(np.argsort(-(cells[:, 0, 1] + cells[:, 1, 0]), kind="stable")[:MOST_CLASSES])
        title = f"Decisions on the {len(shown)} classes of {len(cells):,} with the most wrong ones"
    counts = cells[shown][:, [1, 1, 0, 0], [1, 0, 0, 1]]
    totals = cells[shown].sum(2)[:, [1, 1, 0, 0]]
    return _table(
        title,
        "colour: share of the samples that have the label, or lack it",
        ("has it: found", "has it: missed", "lacks it: rejected", "lacks it: predicted"),
        counts,
        counts / np.maximum(totals, 1),
        [labels[number] for number in shown.tolist()],
    )


def reliability_diagram(calibration: Calibration) -> Figure:
    """Accuracy against confidence, and how many predictions have which confidence."""
    title = f"Calibration: expected calibration error {calibration.error:.3f}"
    plot = _Plot(title, "bars: accuracy, line: confidence", "confidence", "accuracy", below=80)
    bins, total = len(calibration.counts), max(int(calibration.counts.max()), 1)
    for number, (count, confidence, correct) in enumerate(
        zip(calibration.counts, calibration.confidence, calibration.correct, strict=True)
    ):
        left, right = number / bins, (number + 1) / bins
        if count:
            plot.bar(left, right, correct / count, BLUE)
            mean = confidence / count
            plot.line([(left, mean), (right, mean)], RED, 2)
        plot.bar_below(left, right, count / total)
    plot.line([(0, 0), (1, 1)], GREY)
    plot.canvas.text((MARGIN, plot.bottom + 118), f"predictions per bin, at most {total:,}", 11, "lm", GREY)
    return plot.canvas.chart(MOST_BYTES)


def roc(scores: ScoreHistograms, labels: Sequence[str]) -> Figure | None:
    """ROC curves, with the area under each; None where no class has positive and negative samples.

    Args:
        scores: of at most :data:`MOST_CLASSES` classes.
        labels: of the classes.
    """
    curves = {number: curve for number, curve in curves_of_classes(scores).items() if curve.auroc is not None}
    if not curves:
        return None
    names = {number: f"{curve.auroc:.3f} {labels[number]}" for number, curve in curves.items()}
    in_column = 25
    columns = -(-len(curves) // in_column)
    plot = _Plot(
        "ROC curves, with the area under each",
        "",
        "false positive rate",
        "true positive rate",
        beside=16 + 200 * columns,
    )
    plot.line([(0, 0), (1, 1)], LIGHT)
    for place, (number, curve) in enumerate(curves.items()):
        colour = _hue(place, len(curves))
        plot.line(list(zip(curve.false_positive_rate, curve.recall, strict=True)), colour, 1.5)
        column, row = divmod(place, in_column)
        x, y = MARGIN + PLOT + 16 + 200 * column, TITLE_HEIGHT + 8 + row * 17
        plot.canvas.rectangle((x, y - 2, x + 12, y + 2), colour)
        plot.canvas.text((x + 18, y), cut_to_width(names[number], 175, 11), 11, "lm")
    return plot.canvas.chart(MOST_BYTES)


class _Plot:
    """A square plot of values from 0 to 1, with axes."""

    def __init__(self, title: str, note: str, x: str, y: str, *, beside: int = 16, below: int = 0) -> None:
        self.canvas = Canvas(MARGIN + PLOT + beside, TITLE_HEIGHT + PLOT + MARGIN + below)
        self.bottom = TITLE_HEIGHT + PLOT
        self.canvas.text((10, 8), title, 14)
        self.canvas.text((10, 26), note, 11, colour=GREY)
        for tick in np.linspace(0, 1, 6):
            self.line([(tick, 0), (tick, 1)], LIGHT, 0.5)
            self.line([(0, tick), (1, tick)], LIGHT, 0.5)
            left, top = self._place((tick, tick))
            self.canvas.text((left, self.bottom + 5), f"{tick:.1f}", 11, "ma")
            self.canvas.text((MARGIN - 5, top), f"{tick:.1f}", 11, "rm")
        self.line([(0, 1), (0, 0), (1, 0)])
        self.canvas.text((MARGIN + PLOT / 2, self.bottom + 21), x, 12, "ma")
        self.canvas.vertical_text((16, TITLE_HEIGHT + PLOT / 2 + text_width(y) / 2), y, 12)

    def line(self, points: Sequence[Point], colour: Colour = BLACK, width: float = 1.0) -> None:
        """Draw a line through points of the plot."""
        self.canvas.line([self._place(point) for point in points], colour, width)

    def bar(self, left: float, right: float, height: float, colour: Colour) -> None:
        """Draw a bar from 0 to ``height``."""
        (x, top), (end, _) = self._place((left, height)), self._place((right, 0))
        self.canvas.rectangle((x + 1, top, end - 1, self.bottom), tuple((value + 510) // 3 for value in colour), colour)  # type: ignore[arg-type]

    def bar_below(self, left: float, right: float, height: float) -> None:
        """Draw a bar of at most 60 pixels below the axis."""
        (x, _), (end, _) = self._place((left, 0)), self._place((right, 0))
        bottom = self.bottom + 108
        self.canvas.rectangle((x + 1, bottom - 60 * height, end - 1, bottom), GREY)
        self.canvas.line([(x, bottom), (end, bottom)], GREY, 0.5)

    def _place(self, point: Point) -> Point:
        return MARGIN + point[0] * PLOT, self.bottom - point[1] * PLOT


def _heat_map(title: str, note: str, counts: Counts, shares: Floats, names: Sequence[str]) -> Figure:
    side = 64 if len(names) <= FEW_CLASSES else 36 if len(names) <= WRITTEN_CLASSES else 15
    size = 14 if len(names) <= FEW_CLASSES else 11 if len(names) <= WRITTEN_CLASSES else 10
    label_width = min(int(max(text_width(name, size) for name in names)) + 6, LABEL_WIDTH)
    left, top = 10 + label_width, TITLE_HEIGHT + label_width
    canvas = Canvas(max(left + side * len(names) + 10, 460), top + side * len(names) + 10)
    canvas.text((10, 8), title, 14)
    canvas.text((10, 26), note, 11, colour=GREY)
    for place, name in enumerate(names):
        text, middle = cut_to_width(name, label_width - 4, size), side * place + side / 2
        canvas.text((left - 4, top + middle), text, size, "rm")
        canvas.vertical_text((left + middle, top - 4), text, size)
    for row in range(len(names)):
        for column in range(len(names)):
            box = (left + side * column, top + side * row, left + side * (column + 1), top + side * (row + 1))
            _cell(canvas, box, int(counts[row, column]), float(shares[row, column]), row == column)
    return canvas.chart(MOST_BYTES)


def _table(
    title: str,
    note: str,
    columns: Sequence[str],
    counts: Counts,
    shares: Floats,
    names: Sequence[str],
) -> Figure:
    width, height = 116, 20
    label_width = min(int(max(text_width(name, 11) for name in names)) + 6, LABEL_WIDTH)
    left, top = 10 + label_width, TITLE_HEIGHT + 22
    canvas = Canvas(left + width * len(columns) + 10, top + height * len(names) + 10)
    canvas.text((10, 8), title, 14)
    canvas.text((10, 26), note, 11, colour=GREY)
    for column, name in enumerate(columns):
        canvas.text((left + width * (column + 0.5), top - 8), name, 11, "mm")
    for row, name in enumerate(names):
        canvas.text((left - 4, top + height * (row + 0.5)), cut_to_width(name, label_width - 4, 11), 11, "rm")
        for column in range(len(columns)):
            x, y = left + width * column, top + height * row
            is_right = column % 2 == 0
            _cell(canvas, (x, y, x + width, y + height), int(counts[row, column]), float(shares[row, column]), is_right)
    return canvas.chart(MOST_BYTES)


def _cell(canvas: Canvas, box: tuple[float, float, float, float], count: int, share: float, is_right: bool) -> None:
    """A cell in blue where the prediction is right, in red where it is wrong."""
    full = BLUE if is_right else RED
    depth = share**0.6  # a few errors of many must be visible
    red, green, blue = (round(255 + (value - 255) * depth) for value in full)
    canvas.rectangle(box, (red, green, blue), LIGHT)
    if count and box[3] - box[1] >= 20:
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        canvas.text(middle, compact_number(count), 10, "mm", WHITE if depth > 0.6 else BLACK)


def _hue(number: int, total: int) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(number / total, 0.9, 0.75 if number % 2 else 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)
