"""Tables that name samples: CSV, JSON lines or Parquet with the columns ``uri`` and ``label``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from job import storage
from job.errors import DataError

COLUMNS = ("uri", "label")
_PART_NAMES = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


def read_manifest(uri: str, *, labelled: bool = True) -> Iterator[pa.Table]:
    """Tables with the columns ``uri``, ``label`` and ``split`` (null where the manifest has none), all strings.

    Raises:
        DataError: it cannot be parsed, a column is missing, or a value is.
    """
    row = 0
    with storage.open_for_reading(uri) as file:
        try:
            for batch in _batches(uri, file):
                table = _checked(uri, pa.table(batch), row, labelled)
                row += len(table)
                yield table
        except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise DataError(f"{uri} cannot be read: {error}") from error


def _batches(uri: str, file: IO[bytes]) -> Iterator[pa.RecordBatch]:
    name = storage.basename(uri).lower()
    source = pa.PythonFile(file, mode="r")
    if name.endswith(".parquet"):
        yield from pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1 << 16)
    elif name.endswith(".csv"):
        # A label such as 007 must stay what it is.
        kept = pyarrow.csv.ConvertOptions(column_types={c: pa.string() for c in (*COLUMNS, "split")})
        yield from pyarrow.csv.open_csv(source, convert_options=kept)
    else:
        yield from pyarrow.json.open_json(source)


def _checked(uri: str, table: pa.Table, first_row: int, labelled: bool) -> pa.Table:
    needed = COLUMNS if labelled else COLUMNS[:1]
    if missing := [name for name in needed if name not in table.column_names]:
        raise DataError(
            f"{uri} has no column {' and no '.join(missing)}; it has {', '.join(table.column_names)}. "
            "Needed: uri (absolute, or relative to the manifest) and label; split (train, val, test) if you like."
        )
    columns = {name: _strings(table, name) for name in (*COLUMNS, "split")}
    for name in needed:
        if columns[name].null_count:
            row = first_row + pc.index(pc.is_null(columns[name]), True).as_py()
            raise DataError(f"{uri}: row {row} (from 0) has no {name}. Complete or remove it.")
    unknown = set(pc.unique(columns["split"]).to_pylist()) - {None, *_PART_NAMES}
    if unknown:
        raise DataError(f"{uri}: unknown split {sorted(unknown)[0]!r}; known are {', '.join(_PART_NAMES)}.")
    columns["split"] = pa.array([_PART_NAMES.get(name) for name in columns["split"].to_pylist()], pa.string())
    return pa.table(columns)


def _strings(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.string())])
    column = table[name].cast(pa.string())
    return pc.if_else(pc.equal(column, ""), None, column)


def split_uri(uri: str, base: str) -> tuple[str, str]:
    """(root, key) of a manifest's entry: the bucket, host or ``/`` for an absolute one, else ``base``."""
    found = re.match(r"(?:[a-z0-9+]+://[^/]*|)/", uri)
    if found is None:
        return base, uri.removeprefix("./")
    root = found[0].rstrip("/") if "://" in found[0] and not found[0].startswith("file:///") else found[0]
    return root, uri[found.end() :]
