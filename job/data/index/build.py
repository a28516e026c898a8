"""Builds an index: list the sources once, find parts and classes, write Arrow files of bounded size."""

from __future__ import annotations

import functools
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from job import redact, storage
from job.data.index import layout
from job.data.index.access import Access, is_local_uri
from job.data.index.file import (
    LONGEST_CLASS,
    MOST_CLASSES,
    DamagedIndex,
    IndexInfo,
    OldFormat,
    PartInfo,
    load_index_info,
)
from job.data.index.index import Index, PartWriter
from job.data.index.layout import Part
from job.data.index.listing import list_everything
from job.data.index.source import INDEX_FILE, Source, is_saved_index
from job.data.index.store import fetch_index, is_fresh, saved_index
from job.data.local_files import room_needed
from job.errors import DataError, StorageError

log = logging.getLogger(__name__)


Layout = Literal["parts", "classes", "images"]


def build(
    roots: dict[str, list[str]],
    folder: Path,
    cache_dir: str,
    layout_of: Layout,
    *,
    request: dict[str, Any] | None = None,
    listed_anew: bool = False,
    access: Access | None = None,
) -> IndexInfo:
    """List ``roots`` and write their index into the local ``folder``.

    Args:
        roots: URIs by the name of their part; with the layout "parts" the name is ignored.
        layout_of: "parts" (train, val and test are found below each root), "classes" (each root is
            one part) or "images" (likewise, without labels).
        request: what to note in the index, for whoever reads it.
        listed_anew: do not take an index that ``job index`` left beside the data.
        access: what tables and saved indexes may name; default: what lies in object stores and on public web
            servers, and local files where they are local themselves.

    Raises:
        DataError: the layout of the data is not understood.
        StorageError: something cannot be listed or written.
    """
    sources: list[Source] = []
    found: dict[str, list[Part]] = {}
    roots = {name: [redact.remember(uri) for uri in uris] for name, uris in roots.items()}
    with room_needed(folder, "keep the index"), tempfile.TemporaryDirectory(prefix=".list-", dir=folder) as scratch:
        for number, (name, uri) in enumerate((name, uri) for name, uris in roots.items() for uri in uris):
            listing = Path(scratch) / str(number)
            listed = _parts_of(
                uri, name, sources, listing, cache_dir, layout_of, listed_anew, access or Access(typed=(uri,))
            )
            for part, content in listed.items():
                found.setdefault(part, []).append(content)
        train = found.get("train", [])
        for part, contents in found.items():
            if part != "train" and train:
                _require_same_classes(train, contents)
        classes = layout.class_order({name for parts in found.values() for part in parts for name in part.classes})
        if len(classes) > MOST_CLASSES or max(map(len, classes), default=0) > LONGEST_CLASS:
            raise DataError(
                f"{len(classes):,} classes, the longest name of {max(map(len, classes)):,} characters, where "
                f"{MOST_CLASSES:,} and {LONGEST_CLASS:,} are possible. Is the label column the right one?"
            )
        info = IndexInfo(
            classes=classes,
            sources=sources,
            parts={
                part: _write_part(folder / f"{part}.arrow", contents, classes, sources)
                for part, contents in found.items()
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            request=request or {},
        )
        (folder / INDEX_FILE).write_bytes(info.to_json())
    return info


def split(folder: Path, fraction: float, seed: int) -> None:
    """Split the train part of the index in ``folder`` into train and val: stratified, each class in both.

    Within a class the samples with the smallest hash of (seed, key) are held out. So the split is
    the same on every machine, and a sample added later does not move the others across.

    Raises:
        DataError: a class with fewer than two samples.
    """
    whole = Index(folder, "train")
    held_out = _held_out(whole, fraction, seed)
    info = load_index_info(folder)
    shards = _all_in_shards(info.sources)
    for part, chosen in (("val", held_out), ("train", ~held_out)):
        with PartWriter(folder / f".{part}.arrow") as writer:
            start = 0
            for batch in whole.batches():
                writer.write(pa.table(batch).filter(pa.array(chosen[start : start + len(batch)])))
                start += len(batch)
            info.parts[part] = writer.finish(whole.root, shards=shards)
    for part in ("val", "train"):
        (folder / f".{part}.arrow").replace(folder / f"{part}.arrow")
    (folder / INDEX_FILE).write_bytes(info.to_json())


def _held_out(index: Index, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """bool [len(index)]; 13 bytes a sample are held in memory."""
    hashes = np.empty(len(index), np.uint64)
    start = 0
    for batch in index.batches():
        digests = [
            hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest() for key in batch.column("key").to_pylist()
        ]
        hashes[start : start + len(batch)] = np.frombuffer(b"".join(digests), "<u8")
        start += len(batch)
    chosen = np.zeros(len(index), np.bool_)
    for label, name in enumerate(index.classes):
        members = np.flatnonzero(index.labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {name!r} in {index.root} has {len(members)} image: at least 2 are needed to hold one out "
                "for validation. Add images, or give --data.val."
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return chosen


def _require_same_classes(train: list[Part], others: list[Part]) -> None:
    ours, theirs = ({name for part in parts for name in part.classes} for parts in (train, others))
    if ours == theirs:
        return
    told = [f"only in {train[0].root}: {', '.join(sorted(ours - theirs))}"] if ours - theirs else []
    told += [f"only in {others[0].root}: {', '.join(sorted(theirs - ours))}"] if theirs - ours else []
    raise DataError(f"the class folders differ; {'; '.join(told)}. Make them agree.")


def _parts_of(
    uri: str,
    name: str,
    sources: list[Source],
    listing: Path,
    cache_dir: str,
    layout_of: Layout,
    listed_anew: bool,
    access: Access,
) -> dict[str, Part]:
    """The parts under one URI, from its saved index or by listing it; its sources are added to ``sources``."""
    if not listed_anew and layout_of != "images":
        saved = _from_saved(uri, sources, Path(f"{listing}-saved"), access)
        if saved and layout_of == "parts":
            if "train" not in saved:
                raise DataError(f"the index of {uri} has no training part; it has {', '.join(saved)}.")
            return saved
        if saved and len(saved) == 1:
            return {name: next(iter(saved.values()))}
        if saved and is_saved_index(uri):
            raise DataError(f"{uri} has several parts ({', '.join(saved)}): give it by --data.root.")
    found = list_everything(uri, sources, listing, cache_dir, labelled=layout_of != "images", access=access)
    if layout_of == "parts":
        return layout.find_parts(found)
    return {name: layout.class_folders(found) if layout_of == "classes" else layout.all_images(found)}


def _from_saved(uri: str, sources: list[Source], folder: Path, access: Access) -> dict[str, Part] | None:
    saved = saved_index(uri)
    if not storage.exists(storage.join(saved, INDEX_FILE)):
        if is_saved_index(uri):
            raise StorageError(f"there is no {uri}. Make it by python -m job index.")
        return None
    try:
        info = fetch_index(saved, folder)
    except OldFormat as error:
        if is_saved_index(uri):
            raise
        log.warning("%s Until then the data is listed anew.", error)
        return None
    access.require_sources([source.uri for source in info.sources], saved, local=is_local_uri(saved))
    if not info.classes:
        raise DamagedIndex(f"{saved} names no class. Make it again by python -m job index.")
    indexes = {part: Index(folder, part, access) for part in info.parts}
    if not all(is_fresh(storage.join(saved, INDEX_FILE), info, index) for index in indexes.values()):
        if is_saved_index(uri):
            raise DataError(f"{uri} is out of date (see above). Make it again by python -m job index.")
        return None
    log.info("%s: as listed %s", uri, info.created)
    first = len(sources)
    sources += info.sources

    def tables(index: Index) -> Iterator[pa.Table]:
        names = pa.array(index.classes, pa.string())
        for batch in index.batches():
            table = pa.table(batch)
            table = table.set_column(1, "source", pc.add(table["source"], first))
            yield table.append_column("class", pc.take(names, table["label"])).drop_columns(["label"])

    return {
        part: Part(index.root, list(info.classes), functools.partial(tables, index)) for part, index in indexes.items()
    }


def _write_part(path: Path, contents: list[Part], classes: list[str], sources: list[Source]) -> PartInfo:
    names = pa.array(classes, pa.string())
    with PartWriter(path) as writer:
        for table in (table for part in contents for table in part.tables()):
            label = pc.fill_null(pc.index_in(table["class"], names), -1)
            writer.write(table.append_column("label", label))
        return writer.finish(", ".join(part.root for part in contents), shards=_all_in_shards(sources))


def _all_in_shards(sources: list[Source]) -> bool:
    return all(source.kind == "tar" for source in sources)
