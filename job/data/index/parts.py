"""The parts of the data under one URI, from its saved index or by listing it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job import redact, storage
from job.data.index import layout
from job.data.index.access import is_local_uri
from job.data.index.file import DamagedIndex, IndexInfo, OldFormat
from job.data.index.freshness import has_same_images
from job.data.index.index import Index
from job.data.index.layout import Part
from job.data.index.listing import list_location
from job.data.index.sources import INDEX_FILE, ListingContext, Location
from job.data.index.store import fetch_index, is_fresh
from job.errors import DataError, StorageError

log = logging.getLogger(__name__)

Layout = Literal["parts", "classes", "images"]


def parts_of(
    location: Location,
    name: str,
    layout_of: Layout,
    scratch: Path,
    context: ListingContext,
    *,
    force_listing: bool,
    known_classes: Collection[str] | None = None,
) -> dict[str, Part]:
    """The parts under one URI; its sources are appended to those of ``context``.

    Args:
        location: the URI.
        name: of the part, where the URI holds a single one.
        layout_of: see :func:`job.data.index.build.build`.
        scratch: path of local files that must stay as long as the parts are used.
        context: settings of the listing.
        force_listing: do not use a saved index.
        known_classes: see :func:`job.data.index.build.build`.

    Raises:
        DataError: the layout of the data is not understood, or a saved index cannot be used.
        StorageError: something cannot be listed.
    """
    if not force_listing and layout_of != "images":
        saved = _saved_parts(location, scratch.with_name(f"{scratch.name}-saved"), context)
        if saved and layout_of == "parts":
            if "train" not in saved:
                raise DataError(f"the index of {location.uri} has no training part; it has {', '.join(saved)}.")
            return saved
        usable = [part for part in (saved or {}).values() if not part.problem]
        if len(usable) == 1:
            return {name: usable[0]}
        if saved and location.is_saved_index:
            raise DataError(f"{location.uri} has several parts ({', '.join(saved)}): give it by --data.root.")
    listing = list_location(location, scratch, context)
    if layout_of == "parts":
        return layout.find_parts(listing, context.left_out)
    if layout_of == "classes":
        return {name: layout.class_folders(listing, context.left_out)}
    if known_classes is not None:
        return {name: layout.labelled_images(listing, known_classes)}
    return {name: layout.all_images(listing)}


def _saved_parts(location: Location, folder: Path, context: ListingContext) -> dict[str, Part] | None:
    """The parts of the index that ``job index`` left for this URI; None where there is none that can be used."""
    uri, saved = location.uri, location.index_uri
    if not storage.exists(storage.join(saved, INDEX_FILE)):
        if location.is_saved_index:
            raise StorageError(f"there is no {uri}. Make it by python -m job index.")
        return None
    try:
        info = fetch_index(saved, folder)
    except OldFormat as error:
        if location.is_saved_index:
            raise
        log.warning("%s Until then the data is listed at each launch.", error)
        return None
    requested_columns = str(context.columns)
    if requested_columns and requested_columns != info.request.get("columns") and not location.is_saved_index:
        log.info("%s was made with other columns than %s: the data is listed", saved, requested_columns)
        return None
    context.access.require_sources([source.uri for source in info.sources], saved, local=is_local_uri(saved))
    if not info.classes:
        raise DamagedIndex(f"{saved} names no class. Make it again by python -m job index.")
    indexes = {part: Index(folder, part, context.access) for part in info.parts}
    where, saved_parts = storage.join(saved, INDEX_FILE), list(indexes.values())
    if not (
        _has_same_archives(location, where, info)
        and is_fresh(where, info, saved_parts)
        and has_same_images(where, info, saved_parts, folder / "listing", context)
    ):
        if location.is_saved_index:
            raise DataError(f"{uri} is out of date (see above). Make it again by python -m job index.")
        return None
    log.info("%s: using the index of %s", uri, info.created)
    first = len(context.sources)
    context.sources.extend(info.sources)

    def tables(index: Index) -> Iterator[pa.Table]:
        names = pa.array(index.classes, pa.string())
        for batch in index.batches():
            table = pa.table(batch)
            table = table.set_column(1, "source", pc.add(table["source"], first))
            if index.has_several_labels:
                labels = batch.column("labels")
                offsets = np.append(0, labels.value_lengths().to_numpy().cumsum()).astype(np.int32)
                classes = pa.ListArray.from_arrays(offsets, names.take(labels.flatten()))
                yield table.append_column("classes", classes).drop_columns(["label", "labels"])
            else:
                yield table.append_column("class", pc.take(names, table["label"])).drop_columns(["label"])

    for kind in info.left_out:
        context.left_out.add(kind.kind, kind.example, kind.count)
    parts = {part: Part(uri, {}, lambda: iter(()), problem) for part, problem in info.absent.items()}
    for part, index in indexes.items():
        rows, several = functools.partial(tables, index), index.has_several_labels
        parts[part] = Part(index.root, _images(index), rows, several_labels=several)
    return parts


def _has_same_archives(location: Location, where: str, info: IndexInfo) -> bool:
    """Whether a pattern still stands for the archives of an index; if not, a warning says so."""
    if location.is_saved_index or location.format.samples != "members":
        return True
    now, then = ({source.uri for source in sources} for sources in (location.sources(), info.sources))
    if now != then:
        example = min(now ^ then)
        log.warning(
            "%s was made %s and is out of date: %d archives were there then, %d are now, for example %s differs",
            *(where, info.created, len(then), len(now), redact.identity(example)),
        )
    return now == then


def _images(index: Index) -> dict[str, int]:
    """Number of images by class."""
    return {name: count for name, count in zip(index.classes, index.class_counts().tolist(), strict=True) if count}
