"""Images whose names have no suffix, as objects that are named by a hash or an id: their content decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job import storage
from job.data.index import left_out
from job.data.index.bounded import LARGEST_MEMBER
from job.data.index.collection import is_archive
from job.data.index.local_copy import materialise
from job.data.index.magic import HEAD_BYTES, image_suffix
from job.data.index.sources import ListingContext, format_of
from job.errors import DataError, StorageError
from job.storage import TooLarge

FILES_CHECKED = 16
_NO_SUFFIX = r"(?s)(^|/)[^/.]+$"
_NOTES = (
    r"(?i)(^|/)(authors|notice|version|citation|todo|install|news|contributing|manifest|classes|labels|checksums?"
    r"|(md5|sha\d+)sums?)$"
)
"""Names of notes, besides those of :data:`job.data.index.left_out.COMPANION_PATTERN`."""


def mark_unsuffixed(path: Path, listed: Callable[[], Iterable[pa.Table]], context: ListingContext) -> bool:
    """Take files without a suffix for images, where no file in a listing has the suffix of an image.

    Some of them, spread over the listing, are looked at: if one is an image, all files are meant whose names are not
    those of usual notes. Those that turn out to be something else are bad samples.

    Args:
        path: of the listing, which is written anew.
        listed: returns its tables.
        context: settings; counts the files that are still no images.

    Returns:
        whether there are such images.
    """
    count = 0
    for table in listed():
        if pc.any(table["image"]).as_py():
            return False
        count += pc.sum(_candidates(table)).as_py() or 0
    if not count or not _any_image(listed, count, context):
        return False
    target = path.with_name(f"{path.name}-unsuffixed")
    with pa.OSFile(str(target), "wb") as file:
        writer = None
        for table in listed():
            candidates = _candidates(table)
            others = table.filter(pc.invert(pc.or_(candidates, pc.ends_with(table["name"], "/"))))
            counted = pc.or_(
                pc.match_substring_regex(others["name"], left_out.COMPANION_PATTERN), is_archive(others["name"])
            )
            others = others.filter(pc.invert(counted))
            if len(others):
                context.left_out.add(left_out.NOT_IMAGES, others["key"][0].as_py(), len(others))
            writer = writer or pa.ipc.new_file(file, table.schema)
            writer.write_table(table.set_column(table.column_names.index("image"), "image", candidates))
        assert writer is not None
        writer.close()
    target.replace(path)
    return True


def _candidates(table: pa.Table) -> pa.ChunkedArray:
    names = table["name"]
    notes = pc.or_(pc.match_substring_regex(names, left_out.COMPANION_PATTERN), pc.match_substring_regex(names, _NOTES))
    return pc.and_(pc.match_substring_regex(names, _NO_SUFFIX), pc.invert(notes))


def _any_image(listed: Callable[[], Iterable[pa.Table]], count: int, context: ListingContext) -> bool:
    rows = np.unique(np.linspace(0, count - 1, min(count, FILES_CHECKED), dtype=np.int64))
    start = 0
    for table in listed():
        files = table.filter(_candidates(table))
        inside = rows[(rows >= start) & (rows < start + len(files))] - start
        start += len(files)
        if any(_is_image(row, context) for row in files.take(pa.array(inside)).to_pylist()):
            return True
    return False


def _is_image(row: dict[str, Any], context: ListingContext) -> bool:
    source = context.sources[row["source"]]
    format = format_of(source)
    reader = storage.Reader(materialise(source, context.cache_dir), LARGEST_MEMBER)
    try:
        if row["offset"] < 0:
            content = reader.read(row["key"], 0, HEAD_BYTES)
        else:
            size = row["size"] if format.is_packed else min(row["size"], HEAD_BYTES)
            if size > LARGEST_MEMBER:
                return False
            content = format.unpack(reader.read("", row["offset"], size), row["version"])
    except (StorageError, DataError, TooLarge):
        return False
    return image_suffix(content[:HEAD_BYTES]) is not None
