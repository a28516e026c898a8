"""Comparison of several runs by their reports."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from job import storage
from job.errors import CheckpointError, StorageError
from job.monitoring.drawing.class_labels import shortened
from job.monitoring.report import text
from job.monitoring.report.content import FILE, ReportContent
from job.monitoring.report.files import newest_uri, read_report
from job.process.progress import duration
from job.process.terminal import print_table, say

log = logging.getLogger(__name__)

MOST_RUNS = 1000
READS_IN_FLIGHT = 16


class ComparedRun(msgspec.Struct, frozen=True):
    """One row of a comparison.

    Attributes:
        run_dir: folder of the run.
        status: of the run.
        metric: that ranks its checkpoints.
        mode: whether the higher or the lower value is better.
        value: that metric of its best checkpoint; None where it was not measured.
        backbone: of the network.
        lr: learning rate of the head; None where the optimizer's own was used.
        epochs: epochs completed.
        images_per_second: throughput of training.
        goodput: share of time in productive steps.
        seconds: wall time.
        metrics: validation metrics of its best checkpoint.
    """

    run_dir: str
    status: str
    metric: str
    mode: str
    value: float | None
    backbone: str | None
    lr: float | None
    epochs: int
    images_per_second: float | None
    goodput: float | None
    seconds: float | None
    metrics: dict[str, float | None]


def runs_in(uris: Sequence[str]) -> list[str]:
    """The run_dirs meant by some URIs: each one itself, or the folders in it that hold a report.

    Raises:
        CheckpointError: there is no report in a URI, nor in the folders in it.
        StorageError: it cannot be listed.
    """
    run_dirs: dict[str, None] = {}
    for uri in uris:
        if newest_uri(uri) is not None:
            run_dirs[uri] = None
            continue
        below = _folders_with_report(uri)
        if not below:
            raise CheckpointError(
                f"there is no {storage.join(uri, FILE)}, nor a report in a folder of {uri}. Give run_dirs of fits, or "
                "a folder of them."
            )
        run_dirs |= dict.fromkeys(below)
    return list(run_dirs)


def compare(run_dirs: Iterable[str]) -> list[ComparedRun]:
    """One row per run, the best first; a report that cannot be read is warned of and left out.

    Runs are ranked by the metric that most of them use. Those with another one, or without a value, come last.
    """
    with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
        rows = [row for row in pool.map(_row, run_dirs) if row is not None]
    counts = Counter((row.metric, row.mode) for row in rows if row.value is not None)
    if not counts:
        return rows
    (metric, mode), _ = counts.most_common(1)[0]
    sign = -1 if mode == "max" else 1

    def rank(row: ComparedRun) -> tuple[int, float]:
        ranked = row.value is not None and (row.metric, row.mode) == (metric, mode)
        return (0, sign * row.value) if ranked and row.value is not None else (1, 0.0)

    return sorted(rows, key=rank)


def print_comparison(rows: Sequence[ComparedRun]) -> None:
    """Print a table of runs; URIs are not cut."""
    metrics = {row.metric for row in rows if row.metric}
    metric = metrics.pop().removeprefix("val/") if len(metrics) == 1 else "metric"
    right = (metric, "lr", "epochs", "images/s", "goodput", "time")
    columns = [metric, "backbone", "lr", "epochs", "images/s", "goodput", "time", "status", "run_dir"]
    print_table(columns, [_cells(row, with_name=metric == "metric") for row in rows], right=right)
    say(f"{len(rows)} run(s), the best first. The report of a run: python -m job report RUN_DIR")


def _cells(row: ComparedRun, *, with_name: bool) -> list[str]:
    value = text.number(row.value)
    return [
        f"{row.metric.removeprefix('val/')} {value}" if with_name else value,
        row.backbone or "–",
        "–" if row.lr is None else f"{row.lr:g}",
        str(row.epochs),
        "–" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
        "–" if row.goodput is None else f"{row.goodput:.0%}",
        "–" if row.seconds is None else duration(row.seconds),
        row.status,
        row.run_dir,
    ]


def _folders_with_report(uri: str) -> list[str]:
    pattern = storage.join(uri, "*", FILE)
    run_dirs = [storage.split(name)[0] for name in storage.glob(pattern)]
    if len(run_dirs) > MOST_RUNS:
        log.warning("%s holds %d runs; the first %d are compared", uri, len(run_dirs), MOST_RUNS)
    return run_dirs[:MOST_RUNS]


def _row(run_dir: str) -> ComparedRun | None:
    try:
        return _compared(run_dir, read_report(run_dir))
    except (CheckpointError, StorageError) as error:
        log.warning("a run is left out: %s", error)
        return None


def _compared(run_dir: str, report: ReportContent) -> ComparedRun:
    best = report.checkpoints.best if report.checkpoints else None
    lr = _option(report.configuration, "model", "lr")
    backbone = _option(report.configuration, "model", "backbone")
    return ComparedRun(
        run_dir=run_dir,
        status=report.status,
        metric=best.monitor if best else "",
        mode=best.mode if best else "max",
        value=best.value if best else None,
        backbone=shortened(backbone, 40) if isinstance(backbone, str) else None,
        lr=float(lr) if isinstance(lr, int | float) and not isinstance(lr, bool) else _first_lr(report),
        epochs=report.epochs,
        images_per_second=report.train_images_per_second,
        goodput=report.seconds.get("goodput"),
        seconds=report.seconds.get("wall"),
        metrics=report.metrics,
    )


def _option(configuration: Mapping[str, Any], section: str, name: str) -> Any:
    options = configuration.get(section)
    return options.get(name) if isinstance(options, dict) else None


def _first_lr(report: ReportContent) -> float | None:
    """The learning rate of the head in the first validation, where the option was left to the optimizer."""
    rates = report.history[0].lr if report.history else {}
    return next(iter(rates.values()), None)
