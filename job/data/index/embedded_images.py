"""Local copies of the images that a Parquet file holds, one after the other: each can be read by its range.

Pages of a Parquet file are compressed, so that an image has no range of its own there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from job.data.index.bounded import LARGEST_MEMBER, BoundedWriter
from job.data.index.magic import HEAD_BYTES, image_suffix
from job.errors import DataError, first_line

GROUP_BYTES = 1 << 30
"""Bytes of a row group, uncompressed."""
ROWS_AT_ONCE = 16
"""Images that are unpacked together, fewer where they may be large."""
_LARGEST_COPY_ROWS = 1 << 31


def open_parquet(file: object, dictionaries: Sequence[str] = ()) -> pyarrow.parquet.ParquetFile:
    """A Parquet file that is read in pieces.

    Args:
        file: its content.
        dictionaries: columns of texts that are read as dictionaries: a value that is repeated is held once.

    Raises:
        ValueError: it is malformed (a :class:`pyarrow.ArrowInvalid`, too), or its row groups are too large.
    """
    parquet = pyarrow.parquet.ParquetFile(
        pa.PythonFile(file, mode="r"), buffer_size=1 << 20, read_dictionary=list(dictionaries)
    )
    for group in range(parquet.metadata.num_row_groups):
        # Not by column: pyarrow ends the process when it looks at one whose statistics are damaged.
        size = parquet.metadata.row_group(group).total_byte_size
        if not 0 <= size <= GROUP_BYTES:
            raise ValueError(f"row group {group} says that it expands to {size:,} bytes; write smaller row groups")
    return parquet


def extract_images(uri: str, packed: Path, column: str, target: Path) -> None:
    """Write the images of a Parquet file in the order of its rows, then their sizes, then the number of rows.

    Args:
        uri: where the file came from, for messages.
        packed: the file.
        column: of the images: bytes, or a struct with ``bytes``.
        target: local file to write.

    Raises:
        DataError: it is malformed, or a decompression bomb.
        OSError: the disk is full, or would be.
    """
    sizes: list[np.ndarray] = []
    with target.open("wb") as file:
        writer = BoundedWriter(uri, file, target.parent, packed.stat().st_size)
        try:
            with packed.open("rb") as content:
                for images in _images(open_parquet(content), column):
                    sizes.append(np.array([len(image) for image in images], "<i8"))
                    for image in images:
                        writer.write(image)
        except (pa.ArrowException, ValueError, KeyError, IndexError, TypeError, MemoryError) as error:
            raise DataError(f"{uri} cannot be read: {first_line(error, 500)}") from error
        except OSError as error:
            if type(error) is not OSError or error.errno is not None:  # Arrow's own have no number
                raise
            raise DataError(f"{uri} cannot be read: {first_line(error, 500)}") from error
        rows = np.concatenate([np.empty(0, "<i8"), *sizes])
        file.write(rows.tobytes() + np.array([len(rows)], "<i8").tobytes())


class EmbeddedImages:
    """A copy that :func:`extract_images` wrote.

    Attributes:
        sizes: int64 [rows], bytes of the images.
        offsets: int64 [rows], their first bytes.
    """

    def __init__(self, path: str) -> None:
        with Path(path).open("rb") as file:
            end = file.seek(-8, os.SEEK_END)
            rows = int(np.frombuffer(file.read(8), "<i8")[0])
            if not 0 <= rows <= min(end // 8, _LARGEST_COPY_ROWS):
                raise DataError(f"{path} is damaged. Remove it.")
            file.seek(end - 8 * rows)
            self.sizes = np.frombuffer(file.read(8 * rows), "<i8").astype(np.int64)
        self.offsets = np.cumsum(self.sizes) - self.sizes
        self._file = np.memmap(path, np.uint8, "r")

    def key(self, row: int) -> str:
        """The name of an image: its row, and the suffix of its format."""
        start = int(self.offsets[row])
        head = self._file[start : start + min(int(self.sizes[row]), HEAD_BYTES)].tobytes()
        return f"{row:07d}.{image_suffix(head) or 'jpg'}"


def _images(parquet: pyarrow.parquet.ParquetFile, column: str) -> Iterator[list[bytes]]:
    is_struct = pa.types.is_struct(parquet.schema_arrow.field(column).type)
    groups = (parquet.metadata.row_group(group).total_byte_size for group in range(parquet.metadata.num_row_groups))
    # One value of a dictionary, as large as its row group, may be repeated in each row.
    rows = min(max(LARGEST_MEMBER // max([1, *groups]), 1), ROWS_AT_ONCE)
    for batch in parquet.iter_batches(rows, columns=[f"{column}.bytes" if is_struct else column]):
        batch.validate(full=True)
        values = batch.column(0)
        images = values.field("bytes") if is_struct else values
        yield [image or b"" for image in images.to_pylist()]
