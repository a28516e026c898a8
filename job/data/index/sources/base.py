"""The interface of source formats, and the rows that they list."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pyarrow as pa

from job import storage
from job.cluster.shared_work import Helpers
from job.data.index.access import Access
from job.data.index.bounded import compression_of
from job.data.index.folder_state import FolderState
from job.data.index.left_out import LeftOut
from job.data.index.sources.columns import Columns
from job.errors import DataError
from job.process.progress import Progress
from job.process.terminal import escape

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".avif", ".jp2", ".heic", ".heif"),
)
IMAGE_PATTERN = rf"(?i)(^|/)[^/.][^/]*({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$"
"""Keys of images; hidden files (``._cat.jpg``) are none."""
LONGEST_CLASS = 1024
LONGEST_KEY = 8192
"""Characters of a class name, and bytes of a key: buckets allow 1,024, disks 4,096, and signed URLs are longer."""
MOST_LABELS = 4096
"""Labels of one sample."""
ROWS = 1 << 16
"""Rows that are listed together."""
LISTING = pa.schema(
    {
        "key": pa.string(),  # ends with a slash for a folder
        "source": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "version": pa.uint64(),
        "class": pa.string(),  # null: the folder decides, or ``classes``
        "classes": pa.list_(pa.string()),  # several labels of one sample; null: ``class`` alone
        "part": pa.string(),  # null: the folder decides
    }
)
"""Columns of a listing: one row per file; see :data:`job.data.index.file.SCHEMA`."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A folder, prefix or archive that samples are read from, or a table that names them.

    Attributes:
        uri: a folder or prefix, an archive, or a table.
        kind: name of its :class:`SourceFormat`.
        version: 64 bits that change with the content of an archive or table; 0 for a folder.
        whole: it cannot be read in parts (a compressed tar, a server without ranges): it is copied once per node.
        column: of a Parquet file, that holds the images.
    """

    uri: Annotated[str, msgspec.Meta(min_length=1, max_length=65_536)]
    kind: str
    version: Annotated[int, msgspec.Meta(ge=0)] = 0
    whole: bool = False
    column: Annotated[str, msgspec.Meta(max_length=LONGEST_KEY)] = ""

    def __post_init__(self) -> None:
        if self.version >= 1 << 64:
            raise ValueError("version has more than 64 bits")
        if "\0" in self.uri:
            raise ValueError("uri holds a zero byte")


@dataclass
class TimeLimit:
    """A time after which a listing ends, with what it has found by then.

    Attributes:
        until: by :func:`time.monotonic`.
        passed: a listing has ended for it.
    """

    until: float = float("inf")
    passed: bool = False

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return self.until < float("inf")

    def is_over(self) -> bool:
        """Whether the listing must end, which :attr:`passed` then says."""
        self.passed = self.passed or time.monotonic() > self.until
        return self.passed


@dataclass(frozen=True)
class ListingContext:
    """Settings of a listing, and the sources of the index that it is for.

    Attributes:
        sources: sources of the index; a row names its source by the place in this list. A format whose samples lie
            elsewhere appends to it.
        cache_dir: local folder for copies of archives that cannot be read in parts.
        access: what a table may name besides object stores and public web servers.
        labelled: a table must have labels.
        columns: of tables, as the user names them.
        left_out: counts what is no sample.
        folders: states of the folders that are listed.
        unreadable: keys of folders that cannot be read, but may hold images.
        progress: counts the files.
        time_limit: ends the listing early.
        helpers: other ranks that list archives, too; None: there are none.
        tick: gives a sign of progress.
        has_side_indexes: index files of another tool lie beside the archives.
    """

    sources: list[Source]
    cache_dir: str
    access: Access
    labelled: bool
    columns: Columns = field(default_factory=Columns)
    left_out: LeftOut = field(default_factory=LeftOut)
    folders: list[FolderState] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    progress: Progress = field(default_factory=lambda: Progress("listing", "files", is_shown=False))
    time_limit: TimeLimit = field(default_factory=TimeLimit)
    helpers: Helpers | None = None
    tick: Callable[[], None] = lambda: None
    has_side_indexes: bool = False


class SourceFormat(ABC):
    """One format of data: a file of its own in this folder, and one line in :data:`job.data.index.sources.FORMATS`.

    Attributes:
        name: as the index has it.
        suffixes: ends of names, in lower case, by which the format is recognised.
        numbered: pattern of other names by which it is.
        samples: where samples lie: each an object of its own below the source, members of the source, or elsewhere.
        is_shard: samples are stored for sequential reading, so that neighbours may be trained on together.
        lists_async: an archive can be listed by a coroutine, where its filesystem is asynchronous.
        is_packed: the bytes of a sample must be unpacked, which also verifies them.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    numbered: ClassVar[str] = ""
    samples: ClassVar[Literal["objects", "members", "elsewhere"]]
    is_shard: ClassVar[bool] = False
    is_packed: ClassVar[bool] = False
    lists_async: ClassVar[bool] = False

    def source(self, uri: str) -> Source:
        """The source at ``uri``; requests its details.

        Raises:
            StorageError: it is not there.
        """
        whole = compression_of(storage.basename(uri)) is not None or not storage.serves_ranges(uri)
        return Source(uri, self.name, storage.version(storage.info(uri)), whole)

    @abstractmethod
    def rows(self, source: Source, number: int, context: ListingContext) -> Iterator[pa.Table]:
        """The files of a source, in tables of :data:`LISTING`.

        Args:
            source: which one.
            number: its place in ``context.sources``.
            context: settings.
        """

    def unpack(self, raw: bytes, version: int) -> bytes:
        """The content of a sample from its bytes in the source.

        Raises:
            DataError: it is damaged.
        """
        return raw


def is_image(key: str) -> bool:
    """Whether a key has the suffix of an image format; hidden files are none."""
    return re.search(IMAGE_PATTERN, key) is not None


def listing_rows(
    keys: Any,
    source: Any,
    offsets: Any,
    sizes: Any,
    versions: Any,
    *,
    label: Any = None,
    labels: Any = None,
    parts: Any = None,
) -> pa.Table:
    """A table of :data:`LISTING`; ``source`` may be one number for all rows.

    Args:
        keys: of the samples.
        source: numbers of their sources.
        offsets: first bytes; -1 for objects of their own.
        sizes: bytes; -1 where not known.
        versions: see :data:`LISTING`.
        label: class of each sample; None: the folder decides.
        labels: list of the classes of each sample; None: each has at most one.
        parts: part of each sample.

    Raises:
        DataError: a key is not UTF-8.
    """
    sources = [source] * len(keys) if isinstance(source, int) else source
    empty = [None] * len(keys)
    optional = [empty if column is None else column for column in (label, labels, parts)]
    columns = [keys, sources, offsets, sizes, versions, *optional]
    try:
        return pa.Table.from_arrays(
            [
                column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, field.type)
                for column, field in zip(columns, LISTING, strict=True)
            ],
            schema=LISTING,
        )
    except UnicodeEncodeError as error:  # no Arrow file, JSON or bucket holds such a name
        raise DataError(f"the name of {escape(str(error.object))} is not UTF-8. Rename or remove it.") from error
