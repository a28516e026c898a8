"""The format of ``index.json``, and the check of the Arrow files beside it."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from job import storage, typed
from job.data.index.access import OBJECT_STORES, leaves_folder, split_scheme
from job.data.index.arrow_file import require_uncompressed
from job.data.index.folder_state import FolderState
from job.data.index.left_out import LeftOutKind
from job.data.index.sources import INDEX_FILE, Source, format_of
from job.data.index.sources.base import LONGEST_CLASS, LONGEST_KEY
from job.errors import DataError, StorageError, first_line
from job.storage.format_version import MALFORMED, format_version

FORMAT = 3
"""Version of the format; 2 added the SHA-256 and size of each part, 3 what was left out and what folders held."""
ROWS_PER_BATCH = 1 << 16
"""Rows per record batch, except the last: so a sample's place follows from its id."""
MOST_BYTES = 128 << 20
"""Size of an index.json that is still read."""
MOST_CLASSES = 1 << 20
UNLABELLED_PART = "all"
"""Name of the only part of images to predict, which need no labels."""
LARGEST = 1 << 42
"""Bytes of a sample, of an archive, and of a part."""
SCHEMA = pa.schema(
    {
        "key": pa.string(),  # path below its source
        "source": pa.int32(),  # number of its source
        "offset": pa.int64(),  # first byte in the source; -1: key is an object of its own
        "size": pa.int64(),  # bytes to read; -1: not known
        "version": pa.uint64(),  # changes with the content; 0: not known
        "label": pa.int32(),  # class number; -1: none
    }
)
SEVERAL_LABELS_SCHEMA = SCHEMA.append(pa.field("labels", pa.list_(pa.int32())))
"""Columns where samples have any number of labels: class numbers in rising order. The label is -1."""
ClassName = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_CLASS)]
PartName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9_]{0,31}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_LITERAL = OBJECT_STORES | {"memory"}
"""Stores in which ``..`` has no special meaning."""


class PartInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part's entry in index.json.

    Attributes:
        root: URI to name in messages.
        rows: samples.
        fingerprint: hash of keys and labels.
        run_length: neighbours in a tar shard that are trained on together, since one read fetches them.
        mean_bytes: mean size of a sample.
        bytes: size of PART.arrow.
        sha256: hash of PART.arrow.
    """

    root: Annotated[str, msgspec.Meta(max_length=1 << 20)]
    rows: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
    fingerprint: Sha256
    run_length: Annotated[int, msgspec.Meta(ge=1, le=256)]
    mean_bytes: Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]
    bytes: Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
    sha256: Sha256


class IndexInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``index.json``.

    Attributes:
        classes: class names; a label is a place in this list.
        sources: archives and folders that samples are read from.
        parts: by name (train, val, test; all).
        created: ISO time.
        request: options of the run that made the index; any JSON.
        folders: what the folders among the sources held.
        left_out: files of the listing that are no samples.
        absent: why a part that the data seems to have is not in the index, by part.
        format: version of this format.
        several_labels: samples have any number of labels; left out where each has one.
    """

    classes: Annotated[list[ClassName], msgspec.Meta(max_length=MOST_CLASSES)]
    sources: Annotated[list[Source], msgspec.Meta(max_length=1 << 24)]
    parts: Annotated[dict[PartName, PartInfo], msgspec.Meta(min_length=1)]
    created: Annotated[str, msgspec.Meta(max_length=64)]
    request: dict[str, Any] = {}
    folders: Annotated[list[FolderState], msgspec.Meta(max_length=1 << 24)] = []
    left_out: Annotated[list[LeftOutKind], msgspec.Meta(max_length=1 << 16)] = []
    absent: dict[PartName, Annotated[str, msgspec.Meta(max_length=65_536)]] = {}
    format: int = FORMAT
    several_labels: Literal[True] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is named twice")
        for source in self.sources:
            format_of(source)
        if any(folder.source >= len(self.sources) for folder in self.folders):
            raise ValueError("the state of a folder that is no source")
        if len({folder.source for folder in self.folders}) < len(self.folders):
            raise ValueError("a folder has two states")

    @property
    def schema(self) -> pa.Schema:
        """Columns of the Arrow files."""
        return SEVERAL_LABELS_SCHEMA if self.several_labels else SCHEMA

    def to_json(self) -> bytes:
        """The content of index.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @classmethod
    def from_json(cls, uri: str, text: bytes) -> IndexInfo:
        """Parse an index.json.

        Raises:
            DataError: it is damaged, or of another version of the format.
        """
        try:
            version = format_version(text)
            if version > FORMAT:
                raise DataError(
                    f"{uri} has format {version}: a newer release of this package wrote it, this one reads format "
                    f"{FORMAT}. Use that release, or another --run_dir or --output."
                )
            if version < FORMAT:
                raise OldFormat(
                    f"{uri} has format {version}, written by an older release, this one reads format {FORMAT}. Make "
                    "it again by python -m job index."
                )
            return typed.from_json(text, cls)
        except MALFORMED as error:
            raise DamagedIndex(f"{uri} is no index: {error}. Make it again by python -m job index.") from error


class DamagedIndex(DataError):
    """An index that was damaged since it was written."""


class OldFormat(DamagedIndex):
    """An index that an older release wrote."""


def read_index_file(uri: str) -> bytes:
    """The content of index.json in the folder ``uri``.

    Raises:
        DataError: it is too large to be one.
        StorageError: it cannot be read.
    """
    return storage.read_bounded(storage.join(uri, INDEX_FILE), MOST_BYTES)


def load_index_info(folder: str | Path) -> IndexInfo:
    """index.json of a local folder."""
    return IndexInfo.from_json(storage.join(str(folder), INDEX_FILE), read_index_file(str(folder)))


def hash_file(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_parts(folder: Path, info: IndexInfo, uri: str) -> None:
    """Check all of an index's Arrow files: hashes, columns, and the ranges of all values.

    Args:
        folder: where the files lie.
        uri: where they come from, for messages.

    Raises:
        DataError: one of them is damaged, or holds values that lead elsewhere.
    """
    for name, part in info.parts.items():
        path, where = folder / f"{name}.arrow", storage.join(uri, f"{name}.arrow")
        try:
            size = path.stat().st_size
            if size != part.bytes:
                raise ValueError(f"{size:,} bytes, {part.bytes:,} in {INDEX_FILE}")
            if hash_file(path) != part.sha256:
                raise ValueError(f"its SHA-256 differs from the one in {INDEX_FILE}")
            for batch in open_part(path, part.rows, info.schema):
                _verify_rows(batch, info, needs_labels=name != UNLABELLED_PART)
        except (pa.ArrowException, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise StorageError(f"cannot read {path}: {error.strerror}.") from error
            raise DamagedIndex(
                f"{where} is damaged: {first_line(error)}. Make it again by python -m job index."
            ) from error


def open_part(
    path: Path, rows: int, schema: pa.Schema = SCHEMA, rows_per_batch: int = ROWS_PER_BATCH
) -> list[pa.RecordBatch]:
    """Map an Arrow file into memory.

    Args:
        rows: all of its rows.
        schema: its columns.
        rows_per_batch: rows of each record batch but the last.

    Raises:
        ValueError: it is no such file (a :class:`pyarrow.ArrowInvalid`, too), or has another number of rows.
    """
    require_uncompressed(path)
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if not reader.schema.equals(schema):
        raise ValueError(f"its columns are {', '.join(f'{field.name} {field.type}' for field in reader.schema)}"[:500])
    batches, count = [], 0
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        batches.append(batch)
        count += len(batch)
        if len(batch) != min(rows_per_batch, rows - count + len(batch)):
            raise ValueError(f"record batch {number} has {len(batch):,} rows, not {rows_per_batch:,}")
    if count != rows:
        raise ValueError(f"{count:,} rows, {rows:,} in {INDEX_FILE}")
    return batches


def _verify_rows(batch: pa.RecordBatch, info: IndexInfo, *, needs_labels: bool) -> None:
    """Check the values of some rows, column by column."""
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise ValueError("a value is missing")
    if not len(batch):
        return
    key, source, offset, size = (batch.column(name) for name in ("key", "source", "offset", "size"))
    _require_range("source", source, 0, len(info.sources) - 1)
    most = len(info.classes) - 1
    has_one_label = info.classes and not info.several_labels
    least = 0 if has_one_label and needs_labels else -1
    _require_range("label", batch.column("label"), least, most if has_one_label else -1)
    if info.several_labels:
        _verify_labels(batch.column("labels"), most)
    _require_range("offset", offset, -1, LARGEST)
    _require_range("size", size, -1, LARGEST)
    _require_range("length of a key", pc.binary_length(key), 1, LONGEST_KEY)
    if pc.any(pc.match_substring(key, "\0")).as_py():
        raise ValueError("a key holds a zero byte")
    is_object = pc.less(offset, 0)
    samples = pc.take(pa.array([format_of(each).samples for each in info.sources], pa.string()), source)
    if not pc.all(pc.equal(pc.equal(samples, "objects"), is_object)).as_py():
        raise ValueError("an archive's member has no offset, or an object of its own has one")
    if pc.any(pc.and_(pc.invert(is_object), pc.less(size, 0))).as_py():
        raise ValueError("an archive's member has no size")
    if pc.any(pc.equal(samples, "elsewhere")).as_py():
        raise ValueError("a sample lies in a table")
    suspicious = pc.or_(pc.starts_with(key, "/"), pc.match_substring(key, ".."))
    suspicious = pc.or_(suspicious, pc.match_substring_regex(key, r"(?i)%2e"))
    if pc.any(pc.and_(is_object, suspicious)).as_py():
        _require_below(batch.filter(pc.and_(is_object, suspicious)), info)


def _verify_labels(column: pa.ListArray, most: int) -> None:
    """Check that the labels of each sample are class numbers in rising order."""
    labels = column.flatten()
    if labels.null_count:
        raise ValueError("a value is missing")
    if not len(labels):
        return
    _require_range("labels", labels, 0, most)
    numbers, samples = labels.to_numpy(), column.value_parent_indices().to_numpy()
    if ((np.diff(numbers) <= 0) & (np.diff(samples) == 0)).any():
        raise ValueError("the labels of a sample are not in rising order")


def _require_range(name: str, column: pa.Array, least: int, most: int) -> None:
    bounds = pc.min_max(column)
    if bounds["min"].as_py() < least or bounds["max"].as_py() > most:
        raise ValueError(f"{name}: {bounds['min']} to {bounds['max']}, where {least} to {most} is possible")


def _require_below(batch: pa.RecordBatch, info: IndexInfo) -> None:
    for key, number in zip(batch.column("key").to_pylist(), batch.column("source").to_pylist(), strict=True):
        scheme = split_scheme(info.sources[number].uri)[0]
        if scheme not in _LITERAL and leaves_folder(key, scheme):
            raise ValueError(f"key {key[:200]!r} leads out of its source")
