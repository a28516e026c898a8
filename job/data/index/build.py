"""Build an index: list the sources once, find parts and classes, write Arrow files of bounded size."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Collection
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from job import redact
from job.cluster import ranks
from job.cluster.shared_work import Helpers
from job.data.index import classes_of_parts, layout
from job.data.index.access import Access
from job.data.index.file import MOST_CLASSES, IndexInfo, PartInfo, load_index_info
from job.data.index.folder_state import FolderState
from job.data.index.index import Index, PartWriter
from job.data.index.layout import Part
from job.data.index.left_out import LeftOutKind, summary
from job.data.index.parts import Layout, parts_of
from job.data.index.sources import INDEX_FILE, ListingContext, Source, format_of, resolve
from job.data.index.sources.base import LONGEST_CLASS, TimeLimit
from job.data.index.sources.columns import Columns
from job.errors import DataError
from job.process.progress import Progress
from job.storage.local_cache import report_disk_full

log = logging.getLogger(__name__)


def build(
    roots: dict[str, list[str]],
    folder: Path,
    cache_dir: str,
    layout_of: Layout,
    *,
    request: dict[str, Any] | None = None,
    force_listing: bool = False,
    access: Access | None = None,
    columns: Columns | None = None,
    time_limit: TimeLimit | None = None,
    known_classes: Collection[str] | None = None,
    helpers: Helpers | None = None,
) -> IndexInfo:
    """List ``roots`` and write their index into the local ``folder``.

    Args:
        roots: URIs by the name of their part; with the layout "parts" the name is ignored.
        layout_of: "parts" (train, val and test are found below each root), "classes" (each root is
            one part) or "images" (each root is one part, whose images need no labels).
        request: options to store in the index.
        force_listing: do not use an index that ``job index`` left beside the data.
        access: what tables and saved indexes may name; default: what lies in object stores and on public web
            servers, and local files where they are local themselves.
        columns: names of the columns of tables; default: the usual ones.
        time_limit: ends the listing early, so that the index lacks images; default: none.
        known_classes: with the layout "images", keep the labels that images have: those of a table or archive, or
            folders, if some of these are known classes. Default: without labels.
        helpers: other ranks that list archives, too.

    Raises:
        DataError: the layout of the data is not understood.
        StorageError: something cannot be listed or written.
    """
    sources: list[Source] = []
    parts: dict[str, list[Part]] = {}
    locations = [(name, resolve(redact.remember(uri))) for name, uris in roots.items() for uri in uris]
    with (
        report_disk_full(folder, "keep the index"),
        tempfile.TemporaryDirectory(prefix=".list-", dir=folder) as scratch,
        Progress("listing", "files", is_shown=ranks.rank() == 0) as progress,
    ):
        left_out: list[LeftOutKind] = []
        folders: list[FolderState] = []
        for number, (name, location) in enumerate(locations):
            progress.share_done = None
            context = ListingContext(
                sources,
                cache_dir,
                access or Access(typed=(location.uri,)),
                labelled=layout_of != "images",
                columns=columns or Columns(),
                progress=progress,
                time_limit=time_limit or TimeLimit(),
                helpers=helpers,
                tick=helpers.tick if helpers else lambda: None,
            )
            try:
                listed = parts_of(
                    location,
                    name,
                    layout_of,
                    Path(scratch) / str(number),
                    context,
                    force_listing=force_listing,
                    known_classes=known_classes,
                )
            finally:  # of data that is refused, what was left out may be what was meant
                if kinds := context.left_out.kinds():
                    level = logging.INFO if context.left_out.is_expected() else logging.WARNING
                    log.log(level, "%s", summary(redact.identity(location.uri), kinds))
                    left_out += kinds
            for part_name, part in listed.items():
                parts.setdefault(part_name, []).append(part)
            folders += context.folders
        absent = classes_of_parts.settle(parts, test_given="test" in roots)
        classed = parts.get("train", chain(*parts.values()))
        classes = layout.class_order({name for part in classed for name in part.images})
        if len(classes) > MOST_CLASSES or max(map(len, classes), default=0) > LONGEST_CLASS:
            raise DataError(
                f"{len(classes):,} classes, the longest name of {max(map(len, classes)):,} characters, where "
                f"{MOST_CLASSES:,} and {LONGEST_CLASS:,} are possible. Is the label column the right one?"
            )
        several = any(part.several_labels for subparts in parts.values() for part in subparts)
        info = IndexInfo(
            classes=classes,
            sources=sources,
            parts={
                part_name: _write_part(folder / f"{part_name}.arrow", subparts, classes, sources, several)
                for part_name, subparts in parts.items()
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            request=request or {},
            folders=folders,
            left_out=left_out,
            absent=absent,
            several_labels=several or msgspec.UNSET,
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
    hold_out = _held_out_by_label if whole.has_several_labels else _held_out
    held_out = hold_out(whole, fraction, seed)
    info = load_index_info(folder)
    used = {number for batch in whole.batches() for number in pc.unique(batch.column("source")).to_pylist()}
    shards = _all_in_shards(info.sources, used)
    for part, chosen in (("val", held_out), ("train", ~held_out)):
        with PartWriter(folder / f".{part}.arrow", several_labels=whole.has_several_labels) as writer:
            start = 0
            for batch in whole.batches():
                writer.write(pa.table(batch).filter(pa.array(chosen[start : start + len(batch)])))
                start += len(batch)
            info.parts[part] = writer.finish(whole.root, shards=shards)
    for part in ("val", "train"):
        (folder / f".{part}.arrow").replace(folder / f"{part}.arrow")
    (folder / INDEX_FILE).write_bytes(info.to_json())


def _held_out(index: Index, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """bool [len(index)]; 13 bytes per sample are held in memory."""
    hashes = _hashes(index, seed)
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


def _held_out_by_label(index: Index, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """bool [len(index)], of samples with any number of labels.

    The rarest label first, as in iterative stratification (Sechidis et al., ECML PKDD 2011): of its samples that are in
    neither part yet, so many with the smallest hashes are held out that the label has its fraction. Each label has a
    training sample. It has a validation sample, too, unless there is only one, or rarer labels decided otherwise.
    """
    hashes = _hashes(index, seed)
    samples, labels = index.label_lists()
    order = np.argsort(labels, kind="stable")
    counts = index.class_counts()
    members = np.split(samples[order], counts.cumsum()[:-1])
    chosen, decided = np.zeros(len(index), np.bool_), np.zeros(len(index), np.bool_)

    def decide(group: npt.NDArray[np.int64]) -> None:
        count = min(max(round(len(group) * fraction), 1), max(len(group) - 1, 0))
        free = group[~decided[group]]
        free = free[np.argsort(hashes[free], kind="stable")]
        chosen[free[: max(count - int(chosen[group].sum()), 0)]] = True
        decided[free] = True

    for label in np.argsort(counts, kind="stable"):
        decide(members[label])
    decide(np.setdiff1d(np.arange(len(index)), samples))
    for group in members:
        if len(group) and chosen[group].all():
            chosen[group[np.argmax(hashes[group])]] = False
    without = [name for name, group in zip(index.classes, members, strict=True) if not chosen[group].any()]
    if without:
        shown = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        log.warning(
            "%s: %d label(s) have no image held out for validation, their metrics are undefined: %s",
            index.root,
            len(without),
            shown,
        )
    return chosen


def _hashes(index: Index, seed: int) -> npt.NDArray[np.uint64]:
    """A hash of (seed, key) for each sample."""
    hashes = np.empty(len(index), np.uint64)
    start = 0
    for batch in index.batches():
        digests = [
            hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest() for key in batch.column("key").to_pylist()
        ]
        hashes[start : start + len(batch)] = np.frombuffer(b"".join(digests), "<u8")
        start += len(batch)
    return hashes


def _write_part(
    path: Path, contents: list[Part], classes: list[str], sources: list[Source], several_labels: bool
) -> PartInfo:
    names = pa.array(classes, pa.string())
    used: set[int] = set()
    with PartWriter(path, several_labels=several_labels) as writer:
        for table in (table for part in contents for table in part.tables()):
            used |= set(pc.unique(table["source"]).to_pylist())
            label = pa.array(np.full(len(table), -1, np.int32))
            if several_labels:
                table = table.append_column("labels", _label_lists(table, names))
            elif classes:  # images to predict may have lists of labels, also empty ones, which are not used
                label = pc.fill_null(pc.index_in(_single_classes(table), names), -1)
            writer.write(table.append_column("label", label))
        return writer.finish(", ".join(part.root for part in contents), shards=_all_in_shards(sources, used))


def _single_classes(table: pa.Table) -> pa.ChunkedArray:
    """The class of each sample, where each has one; also as a list of one."""
    if "classes" not in table.column_names or table["classes"].null_count == len(table):
        return table["class"]
    first = pc.list_element(table["classes"], 0)
    return first if "class" not in table.column_names else pc.coalesce(first, table["class"])


def _label_lists(table: pa.Table, names: pa.Array) -> pa.ListArray:
    """The class numbers of each sample, in rising order and each once."""
    samples, labels = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    alone = np.ones(len(table), np.bool_)
    if "classes" in table.column_names:
        lists = table["classes"].combine_chunks()
        alone = pc.is_null(lists).to_numpy(zero_copy_only=False)
        numbers = pc.fill_null(pc.index_in(pc.list_flatten(lists), names), -1).to_numpy()
        samples.append(pc.list_parent_indices(lists).to_numpy()[numbers >= 0])
        labels.append(numbers[numbers >= 0])
    if "class" in table.column_names:
        numbers = pc.fill_null(pc.index_in(table["class"].combine_chunks(), names), -1).to_numpy()
        own = np.flatnonzero(alone & (numbers >= 0))
        samples.append(own)
        labels.append(numbers[own])
    pairs = np.unique(np.stack([np.concatenate(samples), np.concatenate(labels)]), axis=1)
    lengths = np.bincount(pairs[0], minlength=len(table))
    offsets = np.append(0, lengths.cumsum()).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(pairs[1].astype(np.int32)))


def _all_in_shards(sources: list[Source], used: set[int]) -> bool:
    return all(format_of(sources[number]).is_shard for number in used)
