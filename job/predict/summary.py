"""Totals of a folder of predictions, from its parts."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from job import storage
from job.data.bad_samples import BadSample
from job.errors import DataError, first_line
from job.predict.output import FileFormat, Row
from job.predict.predictor import Predictor
from job.predict.work import Work
from job.storage.json_files import write_json

if TYPE_CHECKING:
    # It imports torchmetrics, which images without labels do without.
    from job.predict.evaluator import Evaluator

FILE = "summary.json"
ROWS_AT_ONCE = 1024
COLUMNS = ["uri", "label", "labels", "rejected", "error"]
PROBABILITIES = ["classes", "probabilities"]
"""Columns that only a comparison with true labels needs."""


@dataclass
class Totals:
    """Numbers of predictions.

    Attributes:
        images: images, unreadable ones included.
        labels: images by predicted class.
        unreadable: the images that cannot be read.
        rejected: predictions that are marked as rejected.
    """

    images: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    unreadable: list[BadSample] = field(default_factory=list)
    rejected: int = 0

    def add(self, rows: Iterable[Row]) -> None:
        """Count rows."""
        for row in rows:
            entry = {"error": row.error} if row.prediction is None else row.prediction.as_json()
            self._count(row.uri, entry)

    def _count(self, uri: str, entry: dict[str, Any]) -> None:
        if entry.get("error") is not None:
            self.unreadable.append(BadSample("all", self.images, f"{uri} {entry['error']}"))
        elif entry.get("labels") is not None:
            self.labels.update(entry["labels"])
        else:
            self.labels[entry["label"]] += 1
        self.rejected += entry.get("rejected") is True
        self.images += 1

    def write(self, folder: str, work: Work, predictor: Predictor, metrics: dict[str, float] | None) -> None:
        """Write ``summary.json``: the folder is complete.

        Args:
            folder: of the predictions.
            work: its parts.
            predictor: whose predictions they are.
            metrics: comparison with true labels; None without these.
        """
        summary = {"images": self.images, "unreadable": len(self.unreadable), "labels": dict(self.labels)}
        model: dict[str, Any] = {
            "model": predictor.fingerprint,
            "calibrated": predictor.calibrated,
            "precision": predictor.precision,
        }
        measured: dict[str, Any] = {} if metrics is None else {"metrics": metrics}
        if predictor.reject_below is not None:
            model |= {"reject_below": predictor.reject_below, "rejected": self.rejected}
        write_json(storage.join(folder, FILE), {**summary, "parts": work.parts, **model, **measured})

    @classmethod
    def of_folder(cls, folder: str, work: Work, form: FileFormat, evaluator: Evaluator | None = None) -> Totals:
        """Count the rows of all parts; one part is held in memory at a time.

        Args:
            folder: of the predictions.
            work: its parts.
            form: their format.
            evaluator: compares them with true labels.

        Raises:
            DataError: a part is damaged, or does not have one row per image, so that rows and labels would not belong
                together.
        """
        totals = cls()
        for part in range(work.parts):
            uri = storage.join(folder, work.name_of(part))
            content = storage.read_bytes(uri)
            samples = work.samples_of(part)
            try:
                totals._add_part(content, form, samples.stop, evaluator)
            except (ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
                raise DataError(
                    f"{uri} does not hold {len(samples):,} rows of predictions, one per image ({first_line(error)}). "
                    "Delete it, and run the same command again."
                ) from error
        return totals

    def _add_part(self, content: bytes, form: FileFormat, stop: int, evaluator: Evaluator | None) -> None:
        entries: list[dict[str, Any]] = []
        for entry in _entries(content, form, COLUMNS if evaluator is None else COLUMNS + PROBABILITIES):
            if self.images == stop:
                raise ValueError("it has more")
            self._count(entry["uri"], entry)
            entries.append(entry)
            if evaluator is not None and len(entries) == ROWS_AT_ONCE:
                evaluator.add(entries)
                entries.clear()
        if self.images != stop:
            raise ValueError("it has fewer")
        if evaluator is not None:
            evaluator.add(entries)


def _entries(content: bytes, form: FileFormat, columns: list[str]) -> Iterator[dict[str, Any]]:
    if form == "jsonl":
        yield from map(json.loads, io.BytesIO(content))
        return
    for batch in pq.ParquetFile(pa.BufferReader(content)).iter_batches(ROWS_AT_ONCE, columns=columns):
        for entry in batch.to_pylist():
            if entry.get("classes") is not None:
                entry["probabilities"] = dict(zip(entry["classes"], entry["probabilities"], strict=True))
            yield entry
