"""Base class of zip and tar files: samples are members, read by ranges; nothing is unpacked to disk."""

from __future__ import annotations

import asyncio
import itertools
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import IO, ClassVar, NamedTuple

import pyarrow as pa
from fsspec.asyn import sync

from job import storage
from job.data.index.bounded import BoundedFile
from job.data.index.left_out import LeftOut
from job.data.index.local_copy import materialise
from job.data.index.sources.base import ROWS, ListingContext, Source, SourceFormat, listing_rows
from job.errors import DataError

SEGMENTS = 128
"""Parts of an archive that are read at once where it is listed alone."""
LINKS_OUTSIDE = "links to no file of the archive"
"""Kind of members that are left out."""


class Member(NamedTuple):
    """One file in an archive.

    Attributes:
        key: its name.
        offset: first byte to read, in the archive.
        size: bytes to read.
        version: the CRC-32 of a zip's member; 0 in a tar, which has none.
        label: class from a neighbouring .cls or .json file, else None.
        labels: several classes from there, else None.
    """

    key: str
    offset: int
    size: int
    version: int
    label: str | None
    labels: tuple[str, ...] | None = None


class Archive(SourceFormat):
    """A file of many samples.

    Attributes:
        has_member_checksums: members have a checksum, else they change with the archive's version.
    """

    samples = "members"
    has_member_checksums: ClassVar[bool] = False

    @abstractmethod
    def members(self, uri: str, file: IO[bytes], left_out: LeftOut) -> Iterator[Member]:
        """The files in an archive.

        Args:
            uri: of the archive, for messages.
            file: its content.
            left_out: counts members that are no files.

        Raises:
            DataError: it is no readable archive.
        """

    def rows(self, source: Source, number: int, context: ListingContext) -> Iterator[pa.Table]:
        """The members of the archive."""
        if self.lists_async and not source.whole and (reader := storage.Reader(source.uri)).is_async:
            context = replace(context, has_side_indexes=self.has_side_index(source))
            yield from self._rows_of_coroutine(reader.loop, self.tables_async(source, number, context, SEGMENTS))
            return
        with storage.open_for_reading(materialise(source, context.cache_dir)) as file:
            members = self.members(source.uri, file, context.left_out)
            while chunk := list(itertools.islice(members, ROWS)):
                context.tick()
                yield self.table(source, number, chunk)

    def tables_async(
        self, source: Source, number: int, context: ListingContext, segments: int
    ) -> AsyncIterator[pa.Table]:
        """:meth:`rows` of an archive on an asynchronous filesystem, if :attr:`lists_async`.

        Args:
            source: which one.
            number: its place in the index.
            context: settings.
            segments: parts of the archive that may be read at once.
        """
        raise NotImplementedError

    def _rows_of_coroutine(
        self, loop: asyncio.AbstractEventLoop, tables: AsyncIterator[pa.Table]
    ) -> Iterator[pa.Table]:
        async def following() -> pa.Table | None:
            return await anext(tables, None)

        while (table := sync(loop, following)) is not None:
            yield table

    def has_side_index(self, source: Source) -> bool:
        """Whether an index file that another tool wrote lies beside an archive."""
        return False

    def table(self, source: Source, number: int, members: list[Member]) -> pa.Table:
        """Members of an archive as a table of :data:`~job.data.index.sources.base.LISTING`."""
        keys, offsets, sizes, versions, label, labels = zip(*members, strict=True)
        if not self.has_member_checksums:
            versions = (source.version,) * len(keys)
        return listing_rows(keys, number, offsets, sizes, versions, label=label, labels=labels)


def unreadable(uri: str, file: BoundedFile | None, error: Exception) -> Exception:
    """The exception for an archive that cannot be parsed, or that of its file."""
    if file is not None and file.failure is not None:
        return file.failure
    return DataError(f"{uri} is not a readable archive: {error or type(error).__name__}. Upload it again.")
