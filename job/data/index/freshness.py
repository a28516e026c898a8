"""Whether the folders of a saved index hold the same images as when it was made."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job import storage
from job.data.index.file import IndexInfo
from job.data.index.folder_state import FolderState
from job.data.index.index import Index
from job.data.index.left_out import LeftOut
from job.data.index.listing import list_location
from job.data.index.names import folder_of, is_hidden_name
from job.data.index.sources import ListingContext, resolve
from job.data.index.sources.base import is_image

log = logging.getLogger(__name__)

MOST_LISTED = 2_000_000
"""Images of an index whose folders are listed again before it is used; of a larger one a sample of folders is."""
FOLDERS_SAMPLED = 32


def has_same_images(
    uri: str, info: IndexInfo, indexes: Sequence[Index], scratch: Path, context: ListingContext
) -> bool:
    """Whether no image was added, removed or changed in the folders of an index; if one was, a warning says so.

    Args:
        uri: of the index, for messages.
        info: of the index.
        indexes: its parts.
        scratch: path of a temporary file.
        context: settings of listings.
    """
    with context.access.guarded():
        return all(_has_same_images(uri, info, state, indexes, scratch, context) for state in info.folders)


def _has_same_images(
    uri: str, info: IndexInfo, state: FolderState, indexes: Sequence[Index], scratch: Path, context: ListingContext
) -> bool:
    root = info.sources[state.source].uri
    if state.images > MOST_LISTED:
        if changed := _changed_folder(root, state.source, indexes):
            log.warning("%s was made %s and is out of date: the images in %s changed since", uri, info.created, changed)
            return False
        log.warning(
            "the index %s of %s is used. It has %s images, too many to list them at each start: %d folders were "
            "compared, and images added to others since then are not noticed. To list them anew: python -m job "
            "index %s",
            uri,
            info.created,
            f"{state.images:,}",
            FOLDERS_SAMPLED,
            root,
        )
        return True
    current = _listed(root, scratch, context)
    if (current.images, current.digest) != (state.images, state.digest):
        kinds = "images, archives and tables of labels"
        difference = (
            f"{root} had {state.images:,} {kinds} then and has {current.images:,} now"
            if current.images != state.images
            else f"some of {state.images:,} {kinds} in {root} were replaced or renamed since"
        )
        log.warning("%s was made %s and is out of date: %s", uri, info.created, difference)
        return False
    return True


def _listed(root: str, scratch: Path, context: ListingContext) -> FolderState:
    """The state of a folder now."""
    location = resolve(root)
    if location.format.samples != "objects":
        return FolderState(0)
    trial = replace(context, sources=[], left_out=LeftOut(), folders=[], unreadable=[])
    try:
        list_location(location, scratch, trial, open_archives=False)
    finally:
        scratch.unlink(missing_ok=True)
    return trial.folders[0] if trial.folders else FolderState(0)


def _changed_folder(root: str, source: int, indexes: Sequence[Index]) -> str | None:
    """A folder whose images differ from those of the index, among some; None: there is none."""
    ordered = sorted(_folders(source, indexes))
    known = {folder[:end] for folder in ordered for end in _ends(folder)}
    spread = np.linspace(0, len(ordered) - 1, min(FOLDERS_SAMPLED, len(ordered)), dtype=np.int64)
    chosen = {ordered[place] for place in spread}
    inner = {folder.rpartition("/")[0] for folder in ordered}
    expected = _states(source, indexes, chosen)
    # New classes appear beside others.
    for folder in sorted(chosen | set(sorted(inner)[:FOLDERS_SAMPLED])):
        uri = storage.join(root, folder) if folder else root
        page = next(storage.list_pages(uri, is_hidden_name, pass_over_unreadable=True), [])
        for entry in page:
            child = f"{folder}/{entry.key}".strip("/")
            if entry.is_dir and not is_hidden_name(entry.key) and child not in known and _holds_image(root, child):
                return storage.join(root, child)
        if folder in expected:
            images = [entry for entry in page if not entry.is_dir and not entry.problem and is_image(entry.key)]
            keys = [f"{folder}/{entry.key}" if folder else entry.key for entry in images]
            current = FolderState(source).including(
                pa.array(keys, pa.string()),
                pa.array([entry.size for entry in images], pa.int64()),
                pa.array([entry.version for entry in images], pa.uint64()),
            )
            if current != expected[folder]:
                return uri
    return None


def _ends(path: str) -> list[int]:
    """End positions of the path and of each folder above it."""
    return [place for place, character in enumerate(path) if character == "/"] + [len(path)]


def _holds_image(root: str, folder: str) -> bool:
    pages = storage.list_pages(storage.join(root, folder), is_hidden_name, pass_over_unreadable=True)
    return any(is_image(entry.key) for page in pages for entry in page)


def _rows(source: int, indexes: Sequence[Index]) -> Iterator[pa.Table]:
    for index in indexes:
        for batch in index.batches():
            table = pa.table(batch)
            table = table.filter(pc.equal(table["source"], source))
            yield table.append_column("folder", folder_of(table["key"]))


def _folders(source: int, indexes: Sequence[Index]) -> set[str]:
    """Folders of the index's samples."""
    return {folder for table in _rows(source, indexes) for folder in pc.unique(table["folder"]).to_pylist()}


def _states(source: int, indexes: Sequence[Index], folders: set[str]) -> dict[str, FolderState]:
    """States of some folders, of the images directly in them."""
    states = {folder: FolderState(source) for folder in folders}
    chosen = pa.array(sorted(folders), pa.string())
    for table in _rows(source, indexes):
        table = table.filter(pc.is_in(table["folder"], chosen))
        for folder in pc.unique(table["folder"]).to_pylist():
            rows = table.filter(pc.equal(table["folder"], folder)).combine_chunks()
            columns = (rows[name].combine_chunks() for name in ("key", "size", "version"))
            states[folder] = states[folder].including(*columns)
    return states
