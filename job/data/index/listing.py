"""List the files under a URI into an Arrow file, as they are found: memory does not grow with the data.

This is the boundary at which keys of all sources get their names, and at which files that are no samples are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from job.data.index import left_out, names
from job.data.index.collection import (
    Collection,
    ListedRows,
    find_collection,
    for_part,
    in_part,
    is_archive,
    parts_of_pattern,
    tables_of,
)
from job.data.index.duplicates import drop_duplicates, drop_repeated_rows
from job.data.index.folder_state import FolderState
from job.data.index.left_out import LeftOut
from job.data.index.sources import SAVED_INDEX, ListingContext, Location, format_of
from job.data.index.sources.base import IMAGE_PATTERN, LISTING
from job.data.index.unsuffixed import mark_unsuffixed

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


def list_location(location: Location, target: Path, context: ListingContext, *, open_archives: bool = True) -> Listing:
    """List ``location`` into the file ``target``; its sources are appended to those of ``context``.

    Args:
        location: the data.
        target: local file.
        context: settings; counts what is left out.
        open_archives: list the content of archives in a folder, not the folder alone.
    """
    kind, first = location.format.samples, len(context.sources)
    trial = replace(context, left_out=LeftOut())
    all_samples, members = kind == "elsewhere", kind == "members"
    unusual = _write(target, _tables(location, trial), trial)
    listing = Listing(location.uri, target)
    collection = find_collection(location.uri, listing.tables, trial) if kind == "objects" else None
    recounted: tuple[str, ...] = ()
    if collection is not None and open_archives:
        recounted = (left_out.COMPANIONS, left_out.ARCHIVES, left_out.NOT_IMAGES)
    elif collection is None and not all_samples and mark_unsuffixed(target, listing.tables, context):
        recounted = (left_out.NOT_IMAGES,)
    for each in trial.left_out.kinds():
        if each.kind not in recounted:
            context.left_out.add(each.kind, each.example, each.count)
    if kind == "objects":
        context.folders.append(_state(first, listing, collection))
    if collection is not None and open_archives:
        second = target.with_name(f"{target.name}-opened")
        unusual = _write(second, collection.tables(context), context)
        second.replace(target)
        members, all_samples = collection.members, not collection.members
    # Only an archive can hold a key twice, and only keys that are spelled unusually can share a name.
    if not all_samples and (members or unusual):
        drop_duplicates(target, context.left_out, members=members)
    elif all_samples and context.labelled:
        drop_repeated_rows(location.uri, target, [source.uri for source in context.sources], context.left_out)
    return Listing(location.uri, target, tuple(names.normalise(pa.array(context.unreadable, pa.string())).to_pylist()))


def _write(target: Path, tables: Iterable[ListedRows], context: ListingContext) -> bool:
    """Write a listing; returns whether some name differs from its key."""
    unusual = False
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, NAMED) as writer:
        for listed in tables:
            named, renamed = _named(listed.rows, context, all_samples=listed.all_samples)
            if listed.prefix:
                prefixed = pc.binary_join_element_wise(listed.prefix, named["name"], "")
                named = named.set_column(named.column_names.index("name"), "name", prefixed)
            unusual |= renamed
            writer.write_table(named)
            context.progress.advance(len(listed.rows))
            context.tick()
            if len(listed.rows) and context.time_limit.is_over():
                break
    return unusual


def _state(source: int, listing: Listing, collection: Collection | None) -> FolderState:
    """The state of a folder: of its images, and of the archives that hold or the tables that label them."""
    state = FolderState(source)
    for table in listing.tables():
        images = table.filter(table["image"]).combine_chunks()
        state = state.including(*(images[name].combine_chunks() for name in ("key", "size", "version")))
    if collection is not None:
        files = collection.files.combine_chunks()
        state = state.including(*(files[name].combine_chunks() for name in ("key", "size", "version")))
    return state


def _named(table: pa.Table, context: ListingContext, *, all_samples: bool) -> tuple[pa.Table, bool]:
    """A table of :data:`NAMED`, and whether some name differs from its key.

    Args:
        all_samples: the rows are those of a table that someone wrote: each is a sample, whatever its name.
    """
    table = table.combine_chunks()
    for column in ("class", "part"):
        if table[column].null_count < len(table):
            number = table.column_names.index(column)
            table = table.set_column(number, column, names.normalise_labels(table[column]))
    if table["classes"].null_count < len(table):
        number = table.column_names.index("classes")
        table = table.set_column(number, "classes", names.normalise_label_lists(table["classes"].combine_chunks()))
    keys = table["key"].combine_chunks()
    normalised = names.normalise(keys)
    table = table.append_column("name", normalised)
    if all_samples:
        return table.append_column("image", pa.repeat(True, len(table))), normalised is not keys
    hidden = names.is_hidden(normalised)
    if pc.any(hidden).as_py():
        saved_index = pc.starts_with(normalised, f"{SAVED_INDEX}/")
        _count(table.filter(pc.and_(hidden, pc.invert(saved_index))), left_out.HIDDEN, context)
        # A folder that holds nothing else is an empty one, as on a disk, where it would be listed.
        visible = pc.if_else(hidden, names.visible_folders(normalised), normalised)
        table = table.set_column(table.column_names.index("name"), "name", visible)
    if pc.any(pc.equal(table["name"], "")).as_py():
        table = table.filter(pc.not_equal(table["name"], ""))
    image = pc.match_substring_regex(table["name"], IMAGE_PATTERN)
    if not pc.all(image).as_py():
        other = pc.and_(pc.invert(image), pc.invert(pc.ends_with(table["name"], "/")))
        known = pc.match_substring_regex(table["name"], left_out.COMPANION_PATTERN)
        _count(table.filter(pc.and_(other, known)), left_out.COMPANIONS, context)
        other = pc.and_(other, pc.invert(known))
        archive = is_archive(table["name"])
        _count(table.filter(pc.and_(other, archive)), left_out.ARCHIVES, context)
        _count(table.filter(pc.and_(other, pc.invert(archive))), left_out.NOT_IMAGES, context)
    return table.append_column("image", image), normalised is not keys


def _count(rows: pa.Table, kind: str, context: ListingContext) -> None:
    if len(rows):
        context.left_out.add(kind, rows["key"][0].as_py(), len(rows))


def _tables(location: Location, context: ListingContext) -> Iterator[ListedRows]:
    first = len(context.sources)
    sources = location.sources()
    context.sources.extend(sources)
    all_samples = location.format.samples == "elsewhere"
    if len(sources) == 1:
        for table in format_of(sources[0]).rows(sources[0], first, context):
            yield ListedRows(table, all_samples=all_samples)
        return
    parts = parts_of_pattern(location.uri, sources)
    contexts = [for_part(context, part) for part in parts]
    numbers = range(first, first + len(sources))
    for part, tables in zip(parts, tables_of(sources, numbers, contexts), strict=True):
        for table in tables:
            yield ListedRows(in_part(table, part), f"{part}/" if part else "", all_samples)
