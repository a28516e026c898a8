"""Totals of a folder of predictions, from its parts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from job import storage
from job.data.bad_samples import BadSample
from job.predict.output import FileFormat, Row
from job.predict.work import Work
from job.storage.json_files import write_json

FILE = "summary.json"
COLUMNS = ["uri", "label", "labels", "error"]


@dataclass
class Totals:
    """Numbers of predictions.

    Attributes:
        images: images, unreadable ones included.
        labels: images by predicted class.
        unreadable: the images that cannot be read.
    """

    images: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    unreadable: list[BadSample] = field(default_factory=list)

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
        self.images += 1

    def write(self, folder: str, work: Work, model: str) -> None:
        """Write ``summary.json``: the folder is complete."""
        summary = {"images": self.images, "unreadable": len(self.unreadable), "labels": dict(self.labels)}
        write_json(storage.join(folder, FILE), {**summary, "parts": work.parts, "model": model})

    @classmethod
    def of_folder(cls, folder: str, work: Work, form: FileFormat) -> Totals:
        """Count the rows of all parts."""
        totals = cls()
        for part in range(work.parts):
            for entry in _entries(storage.read_bytes(storage.join(folder, work.name_of(part))), form):
                totals._count(entry["uri"], entry)
        return totals


def _entries(content: bytes, form: FileFormat) -> Iterator[dict[str, Any]]:
    if form == "jsonl":
        yield from map(json.loads, content.splitlines())
    else:
        yield from pq.read_table(pa.BufferReader(content), columns=COLUMNS).to_pylist()
