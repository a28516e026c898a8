"""Confusion matrices: the sparse file beside a checkpoint, and the JSON of reports."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from job.checkpoint.manifest import ConfusionFile
from job.errors import CheckpointError
from job.storage.json_files import read_limited

SUFFIX = ".confusion.safetensors"
TENSOR = "true_predicted_count"
PER_CLASS_TENSOR = "per_class"
"""Instead of one matrix: that of each class against the rest, where an image may have several labels."""
DENSE_CLASSES = 100
"""Classes up to which a report holds the whole matrix."""
LISTED_CELLS = 10_000
"""Cells that are not zero, up to which a report lists them where there are more classes."""

MOST_SAMPLES = 2**53
"""Sum of all counts, up to which it is exact in JSON."""

Cells = npt.NDArray[np.int64]
"""Either the cells of one matrix that are not zero, int64 [N, 3]: rows of (true class, predicted class, count), sorted.
Or the matrix of each class, int64 [C, 2, 2]."""


class ConfusionMatrix(NamedTuple):
    """The confusion matrix of a validation, on its way to its file.

    Attributes:
        cells: that are not zero, or the matrix of each class.
        classes: number of classes.
    """

    cells: Cells
    classes: int


def encode(cells: Cells) -> bytes:
    """The file's content: one tensor in the safetensors format."""
    # safetensors writes memory as it lies.
    return safetensors.numpy.save({PER_CLASS_TENSOR if cells.ndim == 3 else TENSOR: np.ascontiguousarray(cells)})


def describe(content: bytes, classes: int) -> ConfusionFile:
    """The manifest's entry of a file with this content."""
    return ConfusionFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), classes=classes)


def read(uri: str, expected: ConfusionFile) -> Cells:
    """The cells in the file at ``uri``, verified against the manifest's entry.

    Raises:
        CheckpointError: it is damaged.
        StorageError: it cannot be read.
    """
    content = read_limited(uri, expected.bytes)
    if describe(content, expected.classes) != expected:
        raise CheckpointError(f"the confusion matrix {uri} is damaged: its size or SHA-256 is not the manifest's.")
    try:
        tensors = safetensors.numpy.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"the confusion matrix {uri} is damaged: {error}") from error
    per_class = tensors.get(PER_CLASS_TENSOR)
    if per_class is not None:
        if per_class.dtype != np.int64 or per_class.shape != (expected.classes, 2, 2) or not _are_counts(per_class):
            raise CheckpointError(
                f"the confusion matrix {uri} is damaged: it holds no int64 [{expected.classes}, 2, 2] of counts."
            )
        return per_class
    cells = tensors.get(TENSOR)
    if cells is None or cells.dtype != np.int64 or cells.ndim != 2 or cells.shape[1] != 3:
        raise CheckpointError(f"the confusion matrix {uri} is damaged: it holds no int64 [N, 3] {TENSOR!r}.")
    if cells.size and (cells.min() < 0 or cells[:, :2].max() >= expected.classes or not _are_counts(cells[:, 2])):
        raise CheckpointError(f"the confusion matrix {uri} is damaged: a class or a count is out of range.")
    return cells


def _are_counts(values: npt.NDArray[np.int64]) -> bool:
    """Whether none is negative, and their sum is exact in JSON."""
    return bool(values.min() >= 0 and values.sum(dtype=np.float64) <= MOST_SAMPLES)


def as_json(nonzero: Cells, classes: int, uri: str | None = None) -> dict[str, Any]:
    """The entry of a report: the whole matrix for few classes, else its cells that are not zero; or counts per class.

    Args:
        nonzero: rows of (true class, predicted class, count), or the matrix of each class.
        classes: number of classes.
        uri: file that holds the matrix.
    """
    if nonzero.ndim == 3:
        listed = {} if uri is None else {"file": uri}
        names = {
            "true_negatives": (0, 0),
            "false_positives": (0, 1),
            "false_negatives": (1, 0),
            "true_positives": (1, 1),
        }
        if classes > LISTED_CELLS:
            return {**listed, "classes": classes}
        return {**listed, **{name: nonzero[:, row, column].tolist() for name, (row, column) in names.items()}}
    entry: dict[str, Any] = {"rows": "true class", "columns": "predicted class"}
    if uri is not None:
        entry["file"] = uri
    if classes <= DENSE_CLASSES:
        matrix = np.zeros((classes, classes), np.int64)
        matrix[nonzero[:, 0], nonzero[:, 1]] = nonzero[:, 2]
        return {**entry, "counts": matrix.tolist()}
    entry |= {"classes": classes, "nonzero_cells": len(nonzero)}
    if len(nonzero) <= LISTED_CELLS:
        entry["true_predicted_count"] = nonzero.tolist()
    return entry
