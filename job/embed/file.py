"""Parquet files of embeddings: one row per image, vectors of one length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from job import storage, typed
from job.errors import DataError, first_line
from job.storage.format_version import MALFORMED

VectorType = Literal["float32", "float16"]
DTYPES: dict[str, tuple[pa.DataType, type[np.floating]]] = {
    "float32": (pa.float32(), np.float32),
    "float16": (pa.float16(), np.float16),
}
OPTIONAL_COLUMNS = {"label": pa.string(), "labels": pa.list_(pa.string()), "error": pa.string()}
"""Columns that a file of another program may lack."""
METADATA_KEY = b"job.embeddings"
LARGEST_WIDTH = 1 << 20
GROUP_BYTES = 16 << 20
"""Vectors that a file collects in memory before it writes them."""
ROWS_AT_ONCE = 4096
LONGEST_METADATA = 1 << 16


class FileInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the vectors of a file were computed by, in its metadata.

    Attributes:
        model: fingerprint of the backbone and the preprocessing.
        backbone: architecture.
        precision: bf16 or fp32.
    """

    model: str
    backbone: str
    precision: str


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of a file.

    Attributes:
        uris: of the images.
        vectors: float32 [N, F]; a row of zeros for an unreadable image.
        valid: bool [N]; False for an unreadable image.
        labels: class name of each image, or several; None where the data has none.
        errors: reason why an image is unreadable; None for the others.
    """

    uris: Sequence[str]
    vectors: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    labels: Sequence[str | list[str] | None]
    errors: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.uris)


def schema(width: int, vector_type: VectorType, info: FileInfo) -> pa.Schema:
    """The columns of a file, and what its vectors were computed by."""
    return pa.schema(
        [
            ("uri", pa.string()),
            ("vector", pa.list_(DTYPES[vector_type][0], width)),
            ("label", pa.string()),
            ("labels", pa.list_(pa.string())),
            ("error", pa.string()),
        ],
        metadata={METADATA_KEY: msgspec.json.encode(info)},
    )


class EmbeddingFile:
    """A local Parquet file that rows are added to; close it by leaving its context.

    Args:
        path: of the file, which is created.
        width: F, the number of features per image.
        vector_type: type of a feature.
        info: what the vectors are computed by.
    """

    def __init__(self, path: Path, width: int, vector_type: VectorType, info: FileInfo) -> None:
        self.path = path
        self._type = vector_type
        self._schema = schema(width, vector_type, info)
        # Neither dictionaries nor compression make random vectors smaller.
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression={"vector.list.element": "none", "uri": "zstd"},
            use_dictionary=["label", "labels.list.element"],
            write_statistics=["uri", "error"],
        )
        self._tables: list[pa.Table] = []
        self._bytes = 0

    def __enter__(self) -> EmbeddingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def add(self, rows: Block) -> None:
        """Append rows.

        Raises:
            DataError: a value is too large for float16.
        """
        arrow_type, dtype = DTYPES[self._type]
        with np.errstate(over="ignore"):
            values = rows.vectors.astype(dtype, copy=False)
        if not np.isfinite(values).all():
            raise DataError(f"a feature is too large for {self._type}: give --vector_type float32.")
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(values.reshape(-1), arrow_type), rows.vectors.shape[1], mask=pa.array(~rows.valid)
        )
        single = [label if isinstance(label, str) else None for label in rows.labels]
        several = [label if isinstance(label, list) else None for label in rows.labels]
        uris = [uri.encode(errors="backslashreplace").decode() for uri in rows.uris]
        columns = [uris, vectors, single, several, list(rows.errors)]
        self._tables.append(
            pa.table(
                [
                    column if isinstance(column, pa.Array) else pa.array(column, field.type)
                    for column, field in zip(columns, self._schema, strict=True)
                ],
                self._schema,
            )
        )
        self._bytes += values.nbytes
        if self._bytes >= GROUP_BYTES:
            self._write_group()

    def close(self) -> None:
        """Complete the file."""
        if self._tables:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        self._writer.write_table(pa.concat_tables(self._tables))
        self._tables, self._bytes = [], 0


class Embeddings:
    """A file of embeddings, or one part of a folder; others may have written it.

    Args:
        uri: of the Parquet file.

    Raises:
        DataError: it is no file of embeddings.
        StorageError: it cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with storage.open_for_reading(uri) as file, _translated(uri):
            parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"))
            columns = parquet.schema_arrow
            self.rows: int = parquet.metadata.num_rows
        with _translated(uri):
            vector = columns.field("vector").type
            if not pa.types.is_fixed_size_list(vector) or not 1 <= vector.list_size <= LARGEST_WIDTH:
                raise ValueError("the column vector holds no vectors of one length")
            if vector.value_type not in (pa.float32(), pa.float16()):
                raise ValueError(f"the column vector holds {vector.value_type}")
            present = {name: kind for name, kind in OPTIONAL_COLUMNS.items() if name in columns.names}
            for name, kind in {"uri": pa.string(), **present}.items():
                if (actual := columns.field(name).type) != kind:
                    raise ValueError(f"the column {name} holds {actual}, not {kind}")
            self.width: int = vector.list_size
            self._columns = ["uri", "vector", *present]
            self.info = _info((columns.metadata or {}).get(METADATA_KEY))

    def blocks(self, columns: Sequence[str] | None = None) -> Iterator[Block]:
        """The rows, some thousand at a time.

        Args:
            columns: to read; vectors are empty without "vector". Default: all.

        Raises:
            DataError: the file is damaged, or a vector is not finite.
        """
        wanted = [name for name in self._columns if columns is None or name in columns]
        with storage.open_for_reading(self.uri) as file, _translated(self.uri):
            parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"))
            for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=wanted):
                yield self._block(batch)

    def _block(self, batch: pa.RecordBatch) -> Block:
        count = len(batch)
        vectors, valid = np.zeros((count, 0), np.float32), np.ones(count, np.bool_)
        if "vector" in batch.schema.names:
            column = batch.column("vector")
            valid = column.is_valid().to_numpy(zero_copy_only=False)
            # flatten() leaves null rows out.
            vectors = np.zeros((count, self.width), np.float32)
            vectors[valid] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.width)
            if not np.isfinite(vectors).all():
                raise ValueError("a vector is not finite")
        none: list[None] = [None] * count

        def values(name: str) -> list[Any]:
            return batch.column(name).to_pylist() if name in batch.schema.names else list(none)

        uris, several = values("uri"), values("labels")
        if None in uris or any(names is not None and None in names for names in several):
            raise ValueError("a row lacks its URI or the name of a label")
        labels = [names if one is None else one for one, names in zip(values("label"), several, strict=True)]
        return Block(uris, vectors, valid, labels, values("error"))


@contextlib.contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Translate errors of a damaged file.

    Raises:
        DataError: in their place.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{uri} is no file of embeddings ({first_line(error)}). Give a folder or file that embed wrote."
        ) from error


def _info(content: bytes | None) -> FileInfo | None:
    """What the vectors were computed by; None where a file of another program does not say it."""
    if content is None:
        return None
    if len(content) > LONGEST_METADATA:
        raise ValueError("its metadata is too long")
    try:
        return typed.from_json(content, FileInfo)
    except MALFORMED as error:
        raise ValueError(f"its metadata is damaged: {error}") from error
