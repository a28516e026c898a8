"""Everything that lies under a URI, written to an Arrow file as it is found: memory does not grow with the data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from job import storage
from job.data.index.access import Access
from job.data.index.archive import Member, list_tar, list_zip
from job.data.index.source import Source, find_sources, is_image, materialise
from job.data.index.table import Resolver, read_manifest
from job.errors import DataError
from job.process.terminal import escape

ROWS = 1 << 16
"""Rows that are written together."""
SHARDS_AT_ONCE = 8
LISTING = pa.schema(
    {
        "key": pa.string(),  # ends with a slash for a folder
        "source": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "version": pa.uint64(),
        "class": pa.string(),  # null where nothing but the folder tells
        "part": pa.string(),  # likewise
    }
)
"""One row for everything that was found; see :data:`job.data.index.index.SCHEMA`."""


@dataclass(frozen=True)
class Listing:
    """What was found under one URI: an Arrow file of :data:`LISTING`.

    Attributes:
        uri: where.
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


def list_everything(
    uri: str, sources: list[Source], target: Path, cache_dir: str, *, labelled: bool, access: Access | None = None
) -> Listing:
    """List ``uri`` into the file ``target``.

    Args:
        sources: those found are appended here; rows name them by their place.
        cache_dir: local folder for copies of archives that cannot be read in parts.
        labelled: a manifest must have labels.
        access: what a manifest may name besides object stores and public web servers.
    """
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, LISTING) as writer:
        for table in _tables(uri, sources, cache_dir, labelled, access or Access(typed=(uri,))):
            writer.write_table(table)
    return Listing(uri, target)


def _tables(uri: str, sources: list[Source], cache_dir: str, labelled: bool, access: Access) -> Iterator[pa.Table]:
    number = len(sources)
    found = find_sources(uri)
    if found[0].kind == "folder" and is_image(storage.basename(uri)):
        details = storage.info(uri)
        if details["type"] == "file":
            return _one_image(uri, details, sources)
    sources += found
    if found[0].kind == "folder":
        return _folder_rows(uri, number)
    if found[0].kind == "manifest":
        return _manifest_rows(uri, sources, labelled, access)
    return _archive_rows(found, number, cache_dir)


def _one_image(uri: str, details: dict[str, Any], sources: list[Source]) -> Iterator[pa.Table]:
    folder, key = storage.split(uri)
    sources.append(Source(folder, "folder"))
    yield _rows([key], len(sources) - 1, [-1], [-1], [storage.version(details)])


def _folder_rows(uri: str, number: int) -> Iterator[pa.Table]:
    entries = (entry for page in storage.list_pages(uri) for entry in page)
    while chunk := list(itertools.islice(entries, ROWS)):
        keys, sizes, versions = zip(*chunk, strict=True)
        yield _rows(keys, number, [-1] * len(keys), sizes, versions)


def _archive_rows(found: list[Source], first: int, cache_dir: str) -> Iterator[pa.Table]:
    """Several archives are listed at once; in the order of their names."""

    def members(place: int) -> list[pa.Table]:
        source = found[place]
        location = materialise(source, cache_dir)
        with storage.open_for_reading(location) as file:
            listed = list_zip(source.uri, file) if source.kind == "zip" else list_tar(source.uri, file)
            return list(_member_tables(listed, source, first + place))

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for place in range(0, len(found), SHARDS_AT_ONCE):
            for tables in pool.map(members, range(place, min(place + SHARDS_AT_ONCE, len(found)))):
                yield from tables


def _member_tables(members: Iterator[Member], source: Source, number: int) -> Iterator[pa.Table]:
    while chunk := list(itertools.islice(members, ROWS)):
        keys, offsets, sizes, versions, labels = zip(*chunk, strict=True)
        # A tar has no checksum of its members: what changes with their content is the archive's version.
        yield _rows(
            keys, number, offsets, sizes, versions if source.kind == "zip" else [source.version] * len(keys), labels
        )


def _manifest_rows(uri: str, sources: list[Source], labelled: bool, access: Access) -> Iterator[pa.Table]:
    """A manifest's entries lie below roots, each of which becomes a source."""
    numbers: dict[str, int] = {}
    resolver, row = Resolver(uri, access), 0
    for table in read_manifest(uri, labelled=labelled):
        keys, places = [], []
        for entry in table["uri"].to_pylist():
            root, key = resolver.resolve(entry, row)
            row += 1
            if root not in numbers:
                numbers[root] = len(sources)
                sources.append(Source(root, "folder"))
            keys.append(key)
            places.append(numbers[root])
        count = len(keys)
        yield _rows(keys, places, [-1] * count, [-1] * count, [0] * count, table["label"], table["split"])


def _rows(
    keys: Any, source: Any, offsets: Any, sizes: Any, versions: Any, classes: Any = None, parts: Any = None
) -> pa.Table:
    sources = [source] * len(keys) if isinstance(source, int) else source
    nothing = [None] * len(keys)
    columns = [keys, sources, offsets, sizes, versions, nothing if classes is None else classes]
    columns.append(nothing if parts is None else parts)
    try:
        return pa.Table.from_arrays(
            [
                column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, kind.type)
                for column, kind in zip(columns, LISTING, strict=True)
            ],
            schema=LISTING,
        )
    except UnicodeEncodeError as error:  # no Arrow file, JSON or bucket holds such a name
        raise DataError(f"the name of {escape(str(error.object))} is not UTF-8. Rename or remove it.") from error
