"""Predictions on the terminal: the first ones, and totals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from job.cluster import ranks
from job.predict.output import Row
from job.predict.summary import Totals
from job.process.progress import Progress
from job.process.terminal import print_table, say

ROWS_SHOWN = 20
"""Predictions on the terminal; all of them go to --output."""


def show(batches: Iterator[list[Row]], images: int) -> Totals:
    """Count all rows, show the progress, and print the first rows on rank 0.

    Args:
        batches: rows of each batch.
        images: number of rows to expect.
    """
    totals = Totals()
    first: list[Row] = []
    with Progress("predict", "images", images, is_shown=ranks.rank() == 0) as progress:
        for rows in batches:
            totals.add(rows)
            progress.update(min(totals.images, images))
            first += rows[: ROWS_SHOWN - len(first)]
    if ranks.rank() == 0 and first:
        print_table(["image", "class", "probability"], [_cells(row) for row in first], right=["probability"])
    return totals


def print_totals(totals: Totals, classes: Sequence[str]) -> None:
    """Print the number of images, and of predictions by class, where the table does not show them all."""
    if totals.images > ROWS_SHOWN:
        counts = ", ".join(f"{name} {totals.labels[name]}" for name in classes)
        say(f"… and {totals.images - ROWS_SHOWN} more. In all: {counts}")


def print_rejected(totals: Totals, reject_below: float) -> None:
    """Print how many predictions are rejected."""
    predictions = totals.images - len(totals.unreadable)
    say(f"{totals.rejected:,} of {predictions:,} predictions are rejected: probability below {reject_below:.4g}.")


def _cells(row: Row) -> tuple[str, str, str]:
    if row.prediction is None:
        return row.uri, "unreadable", "-"
    entry = row.prediction.as_json()
    names = entry["labels"] if "labels" in entry else [entry["label"]]
    chances = ", ".join(f"{entry['probabilities'][name]:.4f}" for name in names)
    return row.uri, ", ".join(names) or "-", chances or "-"
