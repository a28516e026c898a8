"""List the files under a URI into an Arrow file, as they are found: memory does not grow with the data."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from job.data.index.sources import ListingContext, Location, Source, format_of
from job.data.index.sources.base import LISTING

SHARDS_AT_ONCE = 8


@dataclass(frozen=True)
class Listing:
    """The files under one URI: an Arrow file of :data:`LISTING`.

    Attributes:
        uri: the URI.
        path: the local file.
    """

    uri: str
    path: Path

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Its rows, as they were written."""
        with pa.memory_map(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)


def list_location(location: Location, target: Path, context: ListingContext) -> Listing:
    """List ``location`` into the file ``target``; its sources are appended to those of ``context``."""
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, LISTING) as writer:
        for table in _tables(location, context):
            writer.write_table(table)
    return Listing(location.uri, target)


def _tables(location: Location, context: ListingContext) -> Iterator[pa.Table]:
    first = len(context.sources)
    sources = location.sources()
    context.sources.extend(sources)
    if len(sources) == 1:
        yield from format_of(sources[0]).rows(sources[0], first, context)
        return

    def tables(source: Source, number: int) -> list[pa.Table]:
        return list(format_of(source).rows(source, number, context))

    # Several archives at once, in the order of their names.
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for start in range(0, len(sources), SHARDS_AT_ONCE):
            some = sources[start : start + SHARDS_AT_ONCE]
            for listed in pool.map(tables, some, range(first + start, first + start + len(some))):
                yield from listed
