"""Tables that name samples, or hold them: CSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pyarrow as pa

from job import storage
from job.data.index.access import OBJECT_STORES, WEB, Access, is_local_uri, leaves_folder, refusal, split_scheme
from job.data.index.bounded import compression_of, decompressed
from job.data.index.embedded_images import EmbeddedImages, open_parquet
from job.data.index.local_copy import materialise
from job.data.index.sources.base import LONGEST_KEY, ROWS, ListingContext, Source, SourceFormat, listing_rows
from job.data.index.sources.parquet_tables import image_column, read_parquet
from job.data.index.sources.table_rows import checked
from job.data.index.sources.text_tables import read_csv, read_json_lines
from job.errors import DataError, first_line

_TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")
_MALFORMED = (
    *(pa.ArrowException, ValueError, KeyError, TypeError, MemoryError, OverflowError, RecursionError),
    csv.Error,
)


class Table(SourceFormat):
    """A CSV, JSON lines or Parquet file; its entries lie below roots, each of which becomes a source.

    The columns and the formats are found by :mod:`job.data.index.sources.columns` and its neighbours.
    """

    name = "manifest"  # in index.json of every release
    suffixes = (*(text + packed for text in _TEXT_SUFFIXES for packed in _COMPRESSED), ".parquet")
    samples = "elsewhere"

    def source(self, uri: str) -> Source:
        """The table at ``uri``; it is read as a stream, whole or not."""
        return Source(uri, self.name, storage.version(storage.info(uri)))

    def rows(self, source: Source, number: int, context: ListingContext) -> Iterator[pa.Table]:
        """The entries of the table; their roots are appended to the sources."""
        if column := _embedded(source, context):
            images = Source(source.uri, ParquetImages.name, source.version, whole=True, column=column)
            context.sources.append(images)
            yield from ParquetImages().rows(images, len(context.sources) - 1, context)
            return
        numbers: dict[str, int] = {}
        resolver, row = Resolver(source.uri, context.access), 0
        for table in read_table(source.uri, context):
            keys, places = [], []
            for entry in table["uri"].to_pylist():
                root, key = resolver.resolve(entry, row)
                row += 1
                if root not in numbers:
                    numbers[root] = len(context.sources)
                    context.sources.append(Source(root, "folder"))
                keys.append(key)
                places.append(numbers[root])
            count = len(keys)
            unknown, label, labels = [-1] * count, table["label"], table["labels"]
            yield listing_rows(
                keys, places, unknown, unknown, [0] * count, label=label, labels=labels, parts=table["split"]
            )


class ParquetImages(SourceFormat):
    """The images in one column of a Parquet file, as members of its copy on this node."""

    name = "parquet"
    suffixes = ()  # a :class:`Table` finds them by its columns
    samples = "members"

    def rows(self, source: Source, number: int, context: ListingContext) -> Iterator[pa.Table]:
        """The images, in the order of the file's rows."""
        images = EmbeddedImages(materialise(source, context.cache_dir))
        for rows in read_table(source.uri, context, images=False):
            for start in range(0, len(rows), ROWS):
                some = rows.slice(start, ROWS)
                places = some["uri"].cast(pa.int64()).to_numpy()  # numbers of the rows
                if len(places) and places[-1] >= len(images.sizes):
                    raise DataError(f"{source.uri} changed while it was read. List it again.")
                offsets, sizes = images.offsets[places], images.sizes[places]
                keys = [images.key(place) for place in places.tolist()]
                versions = [source.version] * len(keys)
                label, labels, parts = some["label"], some["labels"], some["split"]
                yield listing_rows(keys, number, offsets, sizes, versions, label=label, labels=labels, parts=parts)


def read_table(uri: str, context: ListingContext, *, images: bool = True) -> Iterator[pa.Table]:
    """The rows of a table, in tables of :data:`job.data.index.sources.table_rows.ROWS`.

    Args:
        uri: of the table.
        context: settings of the listing.
        images: the column with the images is needed; where it holds them itself, only their labels are.

    Raises:
        DataError: it cannot be parsed, a column is missing, or a value is.
    """
    row = 0
    name = storage.basename(uri).lower()
    with ExitStack() as stack:
        file = stack.enter_context(storage.open_for_reading(uri))
        stack.enter_context(_translated(uri))
        if (codec := compression_of(name)) is not None:
            file = stack.enter_context(decompressed(file, codec, uri))
            name = name.rpartition(".")[0]
        if name.endswith(".parquet"):
            tables = read_parquet(uri, file, context.columns, labelled=context.labelled, images=images)
        else:
            reader = read_csv if name.endswith((".csv", ".tsv")) else read_json_lines
            tables = reader(uri, file, context.columns, labelled=context.labelled)
        for table in tables:
            valid = checked(uri, table, row, labelled=context.labelled)
            row += len(table)
            yield valid


def _embedded(source: Source, context: ListingContext) -> str:
    """The column of a Parquet file that holds the images themselves; empty for tables of URIs."""
    if not storage.basename(source.uri).lower().endswith(".parquet"):
        return ""
    with storage.open_for_reading(source.uri) as file, _translated(source.uri):
        return image_column(open_parquet(file), source.uri, context.columns)


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Raise a DataError for what parsers raise on a malformed table."""
    try:
        yield
    except _MALFORMED as error:
        raise DataError(f"{uri} cannot be read: {first_line(error, 500)}") from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:  # Arrow's own have no number
            raise
        raise DataError(f"{uri} cannot be read: {first_line(error, 500)}") from error


class Resolver:
    """Finds where the entries of one table lie, and refuses those that it may not name.

    Args:
        uri: URI of the table; relative entries lie in its folder.
        access: what it may name besides.
    """

    def __init__(self, uri: str, access: Access) -> None:
        self.uri = uri
        self.access = access
        self.local = is_local_uri(uri)
        self.base = storage.split(uri)[0]
        self._permitted: set[str] = set()

    def resolve(self, entry: str, row: int) -> tuple[str, str]:
        """(root, key) of an entry: the bucket, host or ``/`` for an absolute one, else the table's folder.

        Args:
            row: its number, for messages.

        Raises:
            DataError: the table may not name it.
        """
        root, key = split_uri(entry, self.base)
        if len(entry) > LONGEST_KEY or not key or "\0" in entry:
            raise DataError(f"{self.uri}: row {row} (from 0) names no file: {entry[:200]!r}.")
        if root is self.base:
            if reason := self._relative_problem(key):
                raise self._refused(entry, row, reason)
        elif root not in self._permitted:
            if reason := self.access.problem(root, local=self.local, filesystem_of=self.uri):
                if self.access.problem(entry, local=self.local, filesystem_of=self.uri):
                    raise self._refused(entry, row, reason)
                # Of a refused root the index names only what is allowed, so that its next reader allows it, too.
                prefix, path = self.access.permitted_prefix(entry), entry.removeprefix("file://")
                if prefix is not None and path != prefix:
                    return prefix.rstrip("/"), path[len(prefix) :].lstrip("/")
            else:
                self._permitted.add(root)
        return self._normalized(root, key) if ".." in key else (root, key)

    def _relative_problem(self, key: str) -> str | None:
        if self.local:
            return None
        if leaves_folder(key, split_scheme(self.base)[0]):
            return "leads out of the table's folder"
        # Nothing would read it as a URI of its own; it is refused since it can only be meant as one.
        scheme = key.partition(":")[0].lower()
        if "::" in key or (":" in key and scheme in _PROTOCOLS):
            return "is a URI of a kind that a table in a bucket or on the web may not hold"
        return None

    def _normalized(self, root: str, key: str) -> tuple[str, str]:
        """Without ``..``, where the filesystem would follow it."""
        scheme = split_scheme(root)[0]
        if scheme in OBJECT_STORES or scheme == "memory" or ".." not in key.split("?")[0].split("/"):
            return root, key
        if scheme in WEB:
            path, mark, query = key.partition("?")
            return root, posixpath.normpath(f"/{path}")[1:] + mark + query
        path = posixpath.normpath(posixpath.join(root.removeprefix("file://") or "/", key))
        folder, _, name = path.rpartition("/")
        return ("/", path[1:]) if path.startswith("/") else (folder or ".", name)

    def _refused(self, entry: str, row: int, reason: str) -> DataError:
        return DataError(refusal(f"{self.uri}: row {row} (from 0) names {entry}, which {reason}"))


def split_uri(uri: str, base: str) -> tuple[str, str]:
    """(root, key) of a manifest's entry: the bucket, host or ``/`` for an absolute one, else ``base``."""
    if uri.startswith("/"):
        return "/", uri[1:]
    scheme, authority = split_scheme(uri)
    if not scheme:
        return base, uri.removeprefix("./")
    rest = uri[len(scheme) + 3 + len(authority) :]
    root = f"{scheme}://{authority}" if authority or scheme != "file" else "file:///"
    return root, rest.removeprefix("/")


_PROTOCOLS = frozenset(storage.protocols())
