"""Charts as inline SVG, coloured by the style sheet of the page; no scripts.

Every function returns safe markup: names are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from job.monitoring.drawing.class_labels import shortened
from job.monitoring.report.content import CalibrationBin
from job.process.progress import compact_number

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MOST_CELL_LABELS = 20
"""Classes up to which a confusion matrix shows its counts as text."""
MATRIX_PIXELS = 620
NAME_CHARACTERS = 18
MOST_DOTS = 25
"""Points of a line up to which each has a dot that says its value."""
COLOURS = 10
"""Colours of series in the style sheet."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: shown in the legend.
        points: (x, y), in the order of x; y that is not finite is left out.
    """

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """Range of an axis and its ticks.

    Attributes:
        low: value at its beginning.
        high: value at its end.
        ticks: values that are labelled.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Position of a value, from 0 to 1."""
        if self.log:
            value, low, high = math.log10(max(value, self.low)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    unit: str = "",
    log: bool = False,
    x_axis: Axis | None = None,
    y_axis: Axis | None = None,
    diagonal: bool = False,
    curves: bool = False,
) -> Markup:
    """A chart of lines with a legend; empty where no series has a point.

    Args:
        title: above the chart.
        series: the lines.
        x_label: below the x axis.
        unit: of y, after the title.
        log: logarithmic y axis, if all values are positive.
        x_axis: Default: from the points.
        y_axis: Default: from the points.
        diagonal: draw the line from the lower left to the upper right corner.
        curves: the lines are curves, not measurements: without dots, and with a legend even for a single one.
    """
    series = [
        Series(shortened(each.name, 40), [p for p in each.points if all(map(math.isfinite, p))]) for each in series
    ]
    series = [each for each in series if each.points]
    if not series:
        return Markup("")
    xs, ys = ([point[place] for each in series for point in each.points] for place in (0, 1))
    x_axis = x_axis or linear_axis(min(xs), max(xs), whole=all(x == int(x) for x in xs))
    y_axis = y_axis or (log_axis(ys) if log and min(ys) > 0 else linear_axis(min(ys), max(ys)))
    parts = [_axes(x_axis, y_axis, x_label)]
    if diagonal:
        (x1, y1), (x2, y2) = (_place(p, x_axis, y_axis) for p in ((x_axis.low, y_axis.low), (x_axis.high, y_axis.high)))
        parts.append(Markup('<line class="reference" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x1, y1, x2, y2))
    for number, each in enumerate(series):
        parts.append(_line(each, number, x_axis, y_axis, dots=not curves))
    names = [each.name for each in series] if len(series) > 1 or curves else []
    return _figure(title, unit, _svg(WIDTH, HEIGHT, title, parts), names)


def reliability_diagram(bins: Sequence[CalibrationBin]) -> Markup:
    """Accuracy by confidence, as bars, with the diagonal of perfect calibration; empty without predictions."""
    total = sum(each.count for each in bins)
    if not total:
        return Markup("")
    axis = unit_axis()
    parts = [_axes(axis, axis, "confidence")]
    for each in bins:
        if each.accuracy is None or each.confidence is None:
            continue
        x1, y = _place((each.lowest, each.accuracy), axis, axis)
        x2, bottom = _place((each.highest, 0.0), axis, axis)
        parts.append(
            Markup(
                '<rect class="bar" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"><title>{}</title></rect>'
            ).format(
                x1 + 1,
                y,
                max(round(x2 - x1 - 2, 1), 1),
                max(round(bottom - y, 1), 0.5),
                round(0.25 + 0.75 * math.sqrt(each.count / max(b.count for b in bins)), 2),
                f"confidence {each.confidence:.3f}, accuracy {each.accuracy:.3f}, {each.count:,} predictions",
            )
        )
    (x1, y1), (x2, y2) = _place((0, 0), axis, axis), _place((1, 1), axis, axis)
    parts.append(Markup('<line class="reference" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x1, y1, x2, y2))
    return _figure("Reliability", "accuracy by confidence", _svg(WIDTH, HEIGHT, "Reliability diagram", parts), [])


def confusion_matrix(cells: Iterable[tuple[int, int, int]], classes: Sequence[str]) -> Markup:
    """A heat map with a row per true class, shaded by the share of the row.

    Args:
        cells: (true class, predicted class, count) of cells that are not zero.
        classes: names.
    """
    cells, count = list(cells), len(classes)
    size = max(min(MATRIX_PIXELS // max(count, 1), 56), 11)
    has_text = count <= MOST_CELL_LABELS
    margin = 8 + 7 * min(max(map(len, classes), default=0), NAME_CHARACTERS)
    totals = [0] * count
    for label, _, samples in cells:
        totals[label] += samples
    parts: list[Markup] = []
    for label, guess, samples in cells:
        share = samples / totals[label]
        x, y = margin + guess * size, 20 + label * size
        tip = f"{samples:,} of {shortened(classes[label])} predicted as {shortened(classes[guess])} ({share:.1%})"
        parts.append(
            Markup(
                '<rect class="{}" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"><title>{}</title></rect>'
            ).format(
                "right" if label == guess else "wrong", x, y, size - 1, size - 1, round(0.08 + 0.92 * share, 2), tip
            )
        )
        if has_text:
            parts.append(
                Markup('<text class="{}" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    "cell strong" if share > 0.55 else "cell",
                    x + (size - 1) / 2,
                    y + size / 2 + 4,
                    compact_number(samples),
                )
            )
    edge = count * size
    parts.append(Markup('<rect class="frame" x="{}" y="20" width="{}" height="{}"/>').format(margin - 0.5, edge, edge))
    for number, name in enumerate(classes):
        middle = number * size + size / 2
        shown = shortened(name, NAME_CHARACTERS)
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
                margin - 6, 24 + middle, shown
            )
        )
        parts.append(
            Markup('<text class="tick" text-anchor="end" transform="translate({},{}) rotate(-45)">{}</text>').format(
                margin + middle + 4, edge + 32, shown
            )
        )
    parts.append(
        Markup('<text class="tick" x="{}" y="12" text-anchor="middle">predicted class →</text>').format(
            margin + edge / 2
        )
    )
    drop = round(margin * 0.75) + 16
    return _svg(margin + edge + 12, 20 + edge + drop, "Confusion matrix", parts)


def share_bar(parts: Sequence[tuple[str, float]]) -> Markup:
    """A bar divided by shares of a whole, with a legend."""
    total = sum(value for _, value in parts)
    shown = [(number, name, value) for number, (name, value) in enumerate(parts) if value > 0]
    if not total or not shown:
        return Markup("")
    x, pieces = 0.0, []
    for number, name, value in shown:
        width = 1000 * value / total
        pieces.append(
            Markup('<rect class="f{}" x="{}" y="0" width="{}" height="26"><title>{}</title></rect>').format(
                number % COLOURS, round(x, 1), round(max(width - 1.5, 0.5), 1), f"{name}: {value / total:.1%}"
            )
        )
        x += width
    bar = Markup(
        '<svg viewBox="0 0 1000 26" preserveAspectRatio="none" class="share" role="img" aria-label="Shares">{}</svg>'
    ).format(Markup("").join(pieces))
    legend = Markup("").join(
        Markup('<span class="key"><i class="k{}"></i>{} <b>{}</b></span>').format(
            number % COLOURS, name, f"{value / total:.1%}"
        )
        for number, name, value in shown
    )
    return Markup('{}<div class="legend">{}</div>').format(bar, legend)


def inline_bar(value: float | None) -> Markup:
    """A bar for a table cell, of a value from 0 to 1."""
    if value is None:
        return Markup("")
    return Markup(
        '<svg class="inline" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8"/><rect class="bar" width="{}" height="8"/></svg>'
    ).format(round(100 * min(max(value, 0.0), 1.0), 1))


def linear_axis(low: float, high: float, *, whole: bool = False) -> Axis:
    """An axis around a range, with about five ticks at round values."""
    if high <= low:
        spread = abs(low) * 0.1 or 0.5
        low, high = low - spread, high + spread
    step = _round_step((high - low) / 4)
    if whole:
        step = max(_round_step((high - low) / 7), 1.0)
        step = 5.0 * step / 2.5 if step == 2.5 else step
        ticks = [tick for tick in _multiples(step, low, high) if low <= tick <= high]
        return Axis(low, high, tuple(ticks))
    first, last = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(first, last, tuple(_multiples(step, first, last)))


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis over whole decades."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = high if high > low else low + 1
    step = max(math.ceil((high - low) / 5), 1)
    return Axis(10.0**low, 10.0**high, tuple(10.0**power for power in range(low, high + 1, step)), log=True)


def unit_axis() -> Axis:
    """An axis from 0 to 1."""
    return Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))


def _round_step(rough: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))


def _multiples(step: float, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _place(point: Point, x_axis: Axis, y_axis: Axis) -> Point:
    x = LEFT + x_axis.place(point[0]) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - y_axis.place(point[1]) * (HEIGHT - TOP - BOTTOM)
    return round(x, 1), round(y, 1)


def _line(series: Series, number: int, x_axis: Axis, y_axis: Axis, *, dots: bool) -> Markup:
    places = [_place(point, x_axis, y_axis) for point in series.points]
    path = " ".join(f"{x:g},{y:g}" for x, y in places)
    line = Markup('<polyline class="s{}" points="{}"/>').format(number % COLOURS, path)
    if len(places) > MOST_DOTS or not dots:
        return line
    marks = Markup("").join(
        Markup('<circle class="d{}" cx="{}" cy="{}" r="2.4"><title>{}</title></circle>').format(
            number % COLOURS, x, y, f"{series.name}: {_tick(value)} at {_tick(at)}"
        )
        for (x, y), (at, value) in zip(places, series.points, strict=True)
    )
    return line + marks


def _axes(x_axis: Axis, y_axis: Axis, x_label: str) -> Markup:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_axis.ticks:
        _, y = _place((x_axis.low, tick), x_axis, y_axis)
        parts.append(Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(LEFT, y, right, y))
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 6, y + 4, _tick(tick))
        )
    for tick in x_axis.ticks:
        x, _ = _place((tick, y_axis.low), x_axis, y_axis)
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                x, bottom + 15, _tick(tick)
            )
        )
    parts.append(Markup('<line class="axis" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(LEFT, bottom, right, bottom))
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + right) / 2, HEIGHT - 4, x_label
        )
    )
    return Markup("").join(parts)


def _svg(width: float, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>').format(
        width, height, width, height, label, Markup("").join(parts)
    )


def _figure(title: str, unit: str, svg: Markup, names: Sequence[str]) -> Markup:
    keys = Markup("").join(
        Markup('<span class="key"><i class="k{}"></i>{}</span>').format(number % COLOURS, name)
        for number, name in enumerate(names)
    )
    legend = Markup('<div class="legend">{}</div>').format(keys) if keys else Markup("")
    suffix = Markup(" <small>{}</small>").format(unit) if unit else Markup("")
    return Markup('<figure class="chart"><figcaption>{}{}</figcaption>{}{}</figure>').format(title, suffix, svg, legend)


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return compact_number(value)
    return f"{value:.2g}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.4g}"
