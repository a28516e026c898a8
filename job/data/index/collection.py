"""Folders whose images lie in archives, or are labelled by a table that lies beside them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job import storage
from job.data.index.bounded import compression_of
from job.data.index.names import folder_of
from job.data.index.parallel import ArchiveTask, list_archives
from job.data.index.part_names import part_of_path, recognise
from job.data.index.sources import FORMATS, ListingContext, Source, format_of, resolve
from job.data.index.sources.base import LISTING
from job.data.index.sources.columns import NAMES, Columns, MissingColumn
from job.errors import DataError

UNNAMED = "images that no metadata file names"
UNLABELLED_METADATA = "metadata files without a column of labels"
MOST_ARCHIVES = 1 << 20
_METADATA = r"(?i)(^|/)metadata\.(csv|tsv|jsonl|parquet)$"
"""As Hugging Face's image folders have them."""
_PARQUET = r"(?i)\.parquet$"


class ListedRows(NamedTuple):
    """Rows of a folder.

    Attributes:
        rows: a table of :data:`LISTING`.
        prefix: goes before the normalised keys.
        all_samples: each row is a sample, whatever its name.
    """

    rows: pa.Table
    prefix: str = ""
    all_samples: bool = False


@dataclass(frozen=True)
class Collection:
    """Sources of a folder's samples: archives, or images with a table of labels.

    Attributes:
        files: the files that hold or label the samples, with the columns of a listing.
        members: the samples are members of archives.
        tables: returns the samples, and the other files of the folder.
    """

    files: pa.Table
    members: bool
    tables: Callable[[ListingContext], Iterator[ListedRows]]


def find_collection(uri: str, listed: Callable[[], Iterable[pa.Table]], context: ListingContext) -> Collection | None:
    """Archives, or tables of labels, in a folder; None if its images have neither.

    Args:
        uri: of the folder.
        listed: returns its files, in tables of :data:`job.data.index.listing.NAMED`.
        context: settings of the listing.

    Raises:
        DataError: it is not clear what the files mean.
    """
    archives, metadata, has_images = _survey(listed())
    if has_images:
        if not len(metadata) or not context.labelled:
            return None
        return Collection(metadata, False, functools.partial(_labelled_by_metadata, uri, metadata, listed))
    if not len(archives):
        return None
    if len(archives) > MOST_ARCHIVES:
        raise DataError(f"{uri} holds {len(archives):,} archives, at most {MOST_ARCHIVES:,} are read.")
    members = not pc.any(pc.match_substring_regex(archives["name"], _PARQUET)).as_py()
    return Collection(archives, members, functools.partial(_archives, uri, archives, listed))


def tables_of(
    sources: list[Source], numbers: Iterable[int], contexts: Iterable[ListingContext]
) -> Iterator[Iterable[pa.Table]]:
    """The rows of several sources in order; archives are listed several at once."""
    each = list(zip(sources, numbers, contexts, strict=True))
    if any(format_of(source).samples == "elsewhere" for source in sources):  # which add sources of their own
        for done, (source, number, context) in enumerate(each):
            context.progress.share_done = done / len(each)
            yield format_of(source).rows(source, number, context)
        return
    tasks = [ArchiveTask(source, number, context.labelled) for source, number, context in each]
    yield from list_archives(tasks, each[0][2])


def parts_of_pattern(uri: str, sources: list[Source]) -> list[str | None]:
    """Parts of the sources that a pattern stands for, by their names; None for all if these name less than two.

    Raises:
        DataError: some of them have a part and others have none.
    """
    names = ["/".join(storage.join(source.uri).split("?")[0].split("/")[-2:]) for source in sources]
    parts = [placement.part for placement in _placements(uri, names)]
    return parts if len({*parts}) > 1 else [None] * len(parts)


def for_part(context: ListingContext, part: str | None) -> ListingContext:
    """The context for listing one part: labels of a test part are not needed."""
    return replace(context, labelled=False) if part == "test" else context


def in_part(rows: pa.Table, part: str | None) -> pa.Table:
    """A table of :data:`LISTING` whose rows are in ``part``, where they do not name another one."""
    if part is None:
        return rows
    return rows.set_column(rows.column_names.index("part"), "part", pc.fill_null(rows["part"], part))


def is_archive(names: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Whether files hold samples, by their names; bool [N]."""
    return pc.match_substring_regex(names, _ARCHIVES)


def _archive_pattern() -> str:
    formats = [format for format in FORMATS if format.samples == "members"]
    ends = [re.escape(suffix) for format in formats for suffix in format.suffixes] + [r"\.parquet"]
    numbered = [format.numbered for format in formats if format.numbered]
    return f"(?i)(({'|'.join(ends)})$|{'|'.join(numbered)})"


_ARCHIVES = _archive_pattern()


def _survey(listed: Iterable[pa.Table]) -> tuple[pa.Table, pa.Table, bool]:
    """The archives and the metadata files in a listing, and whether it has images."""
    archives, metadata, has_images = [], [], False
    for table in listed:
        has_images = has_images or bool(pc.any(table["image"]).as_py())
        others = table.filter(pc.invert(table["image"]))
        is_metadata = pc.match_substring_regex(others["name"], _METADATA)
        metadata.append(others.filter(is_metadata))
        archives.append(others.filter(pc.and_(is_archive(others["name"]), pc.invert(is_metadata))))
    if not archives:
        return LISTING.empty_table(), LISTING.empty_table(), False
    samples = pa.concat_tables(archives)
    parquet = pc.match_substring_regex(samples["name"], _PARQUET)
    if not pc.all(parquet, min_count=0).as_py():  # Parquet files beside archives describe them
        samples = samples.filter(pc.invert(parquet))
    return samples, pa.concat_tables(metadata), has_images


def _archives(
    uri: str, archives: pa.Table, listed: Callable[[], Iterable[pa.Table]], context: ListingContext
) -> Iterator[ListedRows]:
    """The samples in the archives of a folder.

    An archive stands for a folder: of its name if it holds nothing but images without labels (an archive per class),
    else of the part that its name means.
    """
    for table in listed():
        yield ListedRows(_others(table, archives))
    archives = archives.sort_by("name")
    keys, names, versions = (archives[name].to_pylist() for name in ("key", "name", "version"))
    placements = _placements(uri, names)
    sources = [_source(storage.join(uri, key), version) for key, version in zip(keys, versions, strict=True)]
    first = len(context.sources)
    context.sources.extend(sources)
    contexts = [for_part(context, placement.part) for placement in placements]
    numbers = range(first, first + len(sources))
    for placement, source, tables in zip(placements, sources, tables_of(sources, numbers, contexts), strict=True):
        all_samples = format_of(source).samples == "elsewhere"
        prefix: str | None = None
        for table in tables:
            if prefix is None:
                prefix = placement.flat_prefix if not all_samples and _is_flat(table) else placement.prefix
            yield ListedRows(in_part(table, placement.part), prefix, all_samples)


class _Placement(NamedTuple):
    """Meaning of an archive's name.

    Attributes:
        part: part of a data set, if any.
        prefix: folder for which an archive of folders stands.
        flat_prefix: folder for which an archive of images without labels stands.
    """

    part: str | None
    prefix: str
    flat_prefix: str


def _placements(uri: str, names: list[str]) -> list[_Placement]:
    paths = [name.rpartition("/")[0] for name in names]
    stems = [_stem(name.rpartition("/")[2]) for name in names]
    words = [re.sub(r"[-_. ]?\d+([-_.]of[-_.]\d+)?$", "", stem) for stem in stems]
    of_folder = [part_of_path(path) for path in paths]
    recognised = recognise({word for word, part in zip(words, of_folder, strict=True) if part is None}).folders
    by_word = {word: part for part, same in recognised.items() for word in same}
    unknown = [
        name for name, word, part in zip(names, words, of_folder, strict=True) if part is None and word not in by_word
    ]
    if unknown and len(recognised) > 1:
        raise DataError(
            f"{uri} holds archives of the parts {', '.join(recognised)} and others, for example {unknown[0]}: which "
            "part is it? Give the parts by --data.train, --data.val and --data.test."
        )
    if unknown:
        by_word = {}  # pictures of trains, say
    shards = {path for path in set(paths) if _are_shards([s for p, s in zip(paths, stems, strict=True) if p == path])}
    placements = []
    for path, stem, word, part in zip(paths, stems, words, of_folder, strict=True):
        folder = f"{path}/" if path else ""
        if part is None and word in by_word:
            part, folder = by_word[word], f"{folder}{by_word[word]}/"
            placements.append(_Placement(part, folder, folder))
        else:
            placements.append(_Placement(part, folder, folder if path in shards else f"{folder}{stem}/"))
    return placements


def _stem(name: str) -> str:
    return re.sub(_ARCHIVES, "", name)


def _are_shards(stems: list[str]) -> bool:
    """Whether names are numbered from 0 or 1 on, so that they mean no classes."""
    matches = [re.fullmatch(r"(.*?)(\d+)(?:[-_.]of[-_.]\d+)?", stem) for stem in stems]
    if len(stems) < 2 or not all(matches):
        return False
    pairs = [(match[1], match[2]) for match in matches if match]
    numbers = sorted(int(number) for _, number in pairs)
    consecutive = numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))
    padded = any(len(number) > 1 and number.startswith("0") for _, number in pairs)
    return len({prefix for prefix, _ in pairs}) == 1 and consecutive and (pairs[0][0] != "" or padded)


def _is_flat(table: pa.Table) -> bool:
    """Whether an archive begins with images that have neither labels nor folders."""
    labelled = any(table[name].null_count < len(table) for name in ("class", "classes"))
    nested = pc.match_substring_regex(table["key"], r"^(\./)*[^/\\]+[/\\][^/\\]")
    return not labelled and not pc.any(nested).as_py()


def _source(uri: str, version: int) -> Source:
    """The source of a file that was listed; only servers that may not serve ranges are asked for details."""
    format = resolve(uri).format
    if not version or uri.startswith("http"):
        return format.source(uri)
    packed = format.samples == "members" and compression_of(storage.basename(uri)) is not None
    return Source(uri, format.name, version, packed)


def _labelled_by_metadata(
    uri: str, metadata: pa.Table, listed: Callable[[], Iterable[pa.Table]], context: ListingContext
) -> Iterator[ListedRows]:
    """The images that metadata files name, with their labels; the images of the folder if none has labels."""
    columns = context.columns
    if not columns.uri:
        columns = Columns(NAMES["uri"][1], columns.label, columns.split)
    folders_of_parts = _folders_of_parts(listed())
    named: list[np.ndarray] = []
    for key, name, version in zip(
        *(metadata[column].to_pylist() for column in ("key", "name", "version")), strict=True
    ):
        table = _source(storage.join(uri, key), version)
        part = part_of_path(name.rpartition("/")[0])
        labelled = replace(context, columns=columns)
        place = len(context.sources)
        context.sources.append(table)
        try:
            folder = key.rpartition("/")[0]
            for rows in format_of(table).rows(table, place, labelled):
                if part is None and folders_of_parts:
                    rows = _in_parts_of_folders(rows, folders_of_parts, folder, storage.split(table.uri)[0], context)
                named.append(_hashes(f"{folder}/{each}" if folder else each for each in rows["key"].to_pylist()))
                yield ListedRows(in_part(rows, part), f"{folder}/" if folder else "", all_samples=True)
        except MissingColumn:
            if str(context.columns):  # the user's
                raise
            del context.sources[place:]
            context.left_out.add(UNLABELLED_METADATA, key)
    named_hashes = np.concatenate([np.empty(0, np.int64), *named])
    for table in listed():
        if not len(named_hashes):
            yield ListedRows(_without(table, metadata).select(LISTING.names))
            continue
        images = table.filter(table["image"])
        missing = images.filter(pa.array(~np.isin(_hashes(images["key"].to_pylist()), named_hashes)))
        if len(missing):
            context.left_out.add(UNNAMED, missing["key"][0].as_py(), len(missing))
        yield ListedRows(_others(table, metadata))


def _folders_of_parts(listed: Iterable[pa.Table]) -> dict[str, str]:
    """Parts by the folders of a listing that mean one; empty where none is for training."""
    parts: dict[str, str] = {}
    for table in listed:
        for folder in pc.unique(folder_of(table.filter(table["image"])["name"])).to_pylist():
            if (part := part_of_path(folder)) is not None:
                parts[folder] = part
    return parts if "train" in parts.values() else {}


def _in_parts_of_folders(
    rows: pa.Table, parts: dict[str, str], folder: str, base: str, context: ListingContext
) -> pa.Table:
    """The rows of a metadata file, in the parts of the folders that their relative paths name.

    Args:
        rows: a table of :data:`LISTING`.
        parts: see :func:`_folders_of_parts`.
        folder: of the file, in the listing.
        base: URI of that folder.
        context: settings of the listing.
    """
    relative = pa.array([source.uri == base for source in context.sources])
    names = folder_of(rows["key"])
    names = pc.binary_join_element_wise(folder, names, "/") if folder else names
    places = pc.index_in(names, pa.array(list(parts)))
    of_folders = pc.if_else(pc.take(relative, rows["source"]), pc.take(pa.array(list(parts.values())), places), None)
    return rows.set_column(rows.column_names.index("part"), "part", pc.coalesce(rows["part"], of_folders))


def _others(table: pa.Table, files: pa.Table) -> pa.Table:
    """The files of a listing that are neither images nor among ``files``."""
    return _without(table.filter(pc.invert(table["image"])), files).select(LISTING.names)


def _without(table: pa.Table, files: pa.Table) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["key"], files["key"].combine_chunks())))


def _hashes(names: Iterable[str]) -> np.ndarray:
    # Python's hash of a string is keyed anew per process: nobody can make names that collide.
    return np.fromiter((hash(name) for name in names), np.int64)
