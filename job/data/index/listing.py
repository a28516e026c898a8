"""List the files under a URI into an Arrow file, as they are found: memory does not grow with the data.

This is the boundary at which keys of all sources get their names, and at which files that are no samples are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from job.data.index import left_out, names
from job.data.index.duplicates import drop_duplicates
from job.data.index.folder_state import FolderState
from job.data.index.sources import ListingContext, Location, Source, format_of
from job.data.index.sources.base import IMAGE_PATTERN, LISTING

SHARDS_AT_ONCE = 8
NAMED = LISTING.append(pa.field("name", pa.string())).append(pa.field("image", pa.bool_()))
"""Columns of a listing on disk: ``name`` is the normalised key (see :mod:`job.data.index.names`), ``image`` tells
whether the row is a sample: by its suffix, or because a table names it."""


@dataclass(frozen=True)
class Listing:
    """The files under one URI: an Arrow file of :data:`NAMED`, without hidden files.

    Attributes:
        uri: the URI.
        path: the local file.
        unreadable: folders that cannot be read, but may hold images.
    """

    uri: str
    path: Path
    unreadable: Sequence[str] = ()

    def tables(self) -> Iterator[pa.Table]:
        """Its rows, as they were written."""
        with pa.memory_map(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield pa.table(reader.get_batch(number))


def list_location(location: Location, target: Path, context: ListingContext) -> Listing:
    """List ``location`` into the file ``target``; its sources are appended to those of ``context``."""
    all_meant, members, unusual = location.format.samples == "elsewhere", location.format.samples == "members", False
    state = FolderState(len(context.sources))
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, NAMED) as writer:
        for table in _tables(location, context):
            named, renamed = _named(table, context, all_meant=all_meant)
            unusual |= renamed
            writer.write_table(named)
            if location.format.samples == "objects":
                images = named.filter(named["image"]).combine_chunks()
                state = state.including(*(images[name].combine_chunks() for name in ("key", "size", "version")))
    if location.format.samples == "objects":
        context.folders.append(state)
    # Only an archive can hold a key twice, and only keys that are spelled unusually can share a name.
    if not all_meant and (members or unusual):
        drop_duplicates(target, context.left_out, members=members)
    return Listing(location.uri, target, tuple(names.normalise(pa.array(context.unreadable, pa.string())).to_pylist()))


def _named(table: pa.Table, context: ListingContext, *, all_meant: bool) -> tuple[pa.Table, bool]:
    """A table of :data:`NAMED`, and whether some name differs from its key.

    Args:
        all_meant: the rows are those of a table that someone wrote: each is a sample, whatever its name.
    """
    table = table.combine_chunks()
    for column in ("class", "part"):
        if table[column].null_count < len(table):
            number = table.column_names.index(column)
            table = table.set_column(number, column, names.normalise_labels(table[column]))
    keys = table["key"].combine_chunks()
    normalised = names.normalise(keys)
    table = table.append_column("name", normalised)
    if all_meant:
        return table.append_column("image", pa.repeat(True, len(table))), normalised is not keys
    hidden = names.is_hidden(normalised)
    if pc.any(hidden).as_py():
        _count(table.filter(hidden), left_out.HIDDEN, context)
        table = table.filter(pc.invert(hidden))
    if pc.any(pc.equal(table["name"], "")).as_py():
        table = table.filter(pc.not_equal(table["name"], ""))
    image = pc.match_substring_regex(table["name"], IMAGE_PATTERN)
    if not pc.all(image).as_py():
        other = pc.and_(pc.invert(image), pc.invert(pc.ends_with(table["name"], "/")))
        known = pc.match_substring_regex(table["name"], left_out.COMPANION_PATTERN)
        _count(table.filter(pc.and_(other, known)), left_out.COMPANIONS, context)
        _count(table.filter(pc.and_(other, pc.invert(known))), left_out.NOT_IMAGES, context)
    return table.append_column("image", image), normalised is not keys


def _count(rows: pa.Table, kind: str, context: ListingContext) -> None:
    if len(rows):
        context.left_out.add(kind, rows["key"][0].as_py(), len(rows))


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
