"""Files of predictions: JSON lines or Parquet, written row by row."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from job.data.dataset import Preprocessing
from job.predict.predictor import Predictor

FileFormat = Literal["jsonl", "parquet"]
FORMATS: tuple[FileFormat, ...] = ("jsonl", "parquet")

ROWS_PER_GROUP = 4096
"""Rows that a Parquet file collects in memory before it writes them."""

SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("label", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("probability", pa.float32()),
        ("classes", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
        ("model", pa.string()),
        ("calibrated", pa.bool_()),
        ("rejected", pa.bool_()),
        ("true_label", pa.string()),
        ("true_labels", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


class Result(Protocol):
    """What is computed of an image: a prediction or an embedding."""

    def as_json(self) -> dict[str, Any]:
        """The entries of a JSON line."""


class ImageModel(Protocol):
    """A network that computes a :class:`Result` per image."""

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of images."""

    @property
    def row_fields(self) -> dict[str, Any]:
        """Entries that all rows with a result have."""

    def predict_batch(self, images: Tensor) -> Sequence[Result]:
        """The results of prepared images, uint8 [B, 3, S, S]."""


@dataclass(frozen=True)
class Row:
    """One image: its prediction, or the reason why there is none.

    Attributes:
        uri: of the image.
        prediction: or another result; None for an unreadable image.
        error: why it cannot be read.
        true_labels: its label in the data, or several; None: the data has none for it.
    """

    uri: str
    prediction: Result | None = None
    error: str | None = None
    true_labels: str | list[str] | None = None

    def as_json(self, predictor: ImageModel, top_k: int | None = None) -> dict[str, Any]:
        """The entries of a JSON line.

        Args:
            predictor: whose prediction it is.
            top_k: number of most probable classes, in falling order; None: all, in the order of classes.
        """
        entry: dict[str, Any] = {"uri": self.uri}
        if self.prediction is not None:
            entry |= {**self.prediction.as_json(), **predictor.row_fields}
            if top_k is not None:
                entry["probabilities"] = dict(nlargest(top_k, entry["probabilities"].items(), key=itemgetter(1)))
        if self.true_labels is not None:
            entry["true_label" if isinstance(self.true_labels, str) else "true_labels"] = self.true_labels
        return entry if self.error is None else {**entry, "error": self.error}


def json_line(entry: dict[str, Any], *, ascii: bool = False) -> str:
    """One line of strict JSON.

    Args:
        entry: the object.
        ascii: escape all other characters, for any terminal and encoding.
    """
    return json.dumps(entry, ensure_ascii=ascii, allow_nan=False) + "\n"


class PredictionFile(ABC):
    """A local file that rows are added to; close it by leaving its context.

    Args:
        path: of the file, which is created.
        predictor: whose predictions these are.
        top_k: number of most probable classes whose probabilities are written, in falling order; None: all, in the
            order of classes.
    """

    def __init__(self, path: Path, predictor: Predictor, top_k: int | None) -> None:
        self.path = path
        self.predictor = predictor
        self.top_k = top_k

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def add(self, rows: Sequence[Row]) -> None:
        """Append rows."""

    @abstractmethod
    def close(self) -> None:
        """Complete the file."""


class JsonLines(PredictionFile):
    """One JSON object per line."""

    def __init__(self, path: Path, predictor: Predictor, top_k: int | None) -> None:
        super().__init__(path, predictor, top_k)
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace")

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows."""
        self._file.writelines(json_line(row.as_json(self.predictor, self.top_k)) for row in rows)

    def close(self) -> None:
        """Complete the file."""
        self._file.close()


class Parquet(PredictionFile):
    """Columns of :data:`SCHEMA`; ``label`` is null and ``labels`` is not where images may have several labels."""

    def __init__(self, path: Path, predictor: Predictor, top_k: int | None) -> None:
        super().__init__(path, predictor, top_k)
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows."""
        for row in rows:
            entry = row.as_json(self.predictor, self.top_k)
            entry["uri"] = row.uri.encode(errors="backslashreplace").decode()
            if row.prediction is not None:
                entry["classes"] = list(entry["probabilities"])
                entry["probabilities"] = list(entry["probabilities"].values())
            for name, column in self._columns.items():
                column.append(entry.get(name))
        if len(self._columns["uri"]) >= ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        self._writer.write_table(pa.table(self._columns, SCHEMA))
        for column in self._columns.values():
            column.clear()

    def close(self) -> None:
        """Complete the file."""
        if self._columns["uri"]:
            self._write_group()
        self._writer.close()


def prediction_file(form: FileFormat, path: Path, predictor: Predictor, top_k: int | None) -> PredictionFile:
    """A new file in a format."""
    return {"jsonl": JsonLines, "parquet": Parquet}[form](path, predictor, top_k)
