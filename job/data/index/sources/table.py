"""Tables that name samples: CSV, JSON lines or Parquet with the columns ``uri`` and ``label``."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import IO

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from job import storage
from job.data.index.access import OBJECT_STORES, WEB, Access, is_local_uri, leaves_folder, refusal, split_scheme
from job.data.index.sources.base import LONGEST_CLASS, LONGEST_KEY, ListingContext, Source, SourceFormat, listing_rows
from job.errors import DataError, first_line

COLUMNS = ("uri", "label")
LABELS = pa.list_(pa.string())
LINES_BYTES = 4 << 20
"""JSON lines that are parsed together."""
LONGEST_LINE = 1 << 20
PARQUET_GROUP_BYTES = 1 << 30
"""Bytes of a row group, uncompressed."""
_PART_NAMES = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}

_MALFORMED = (pa.ArrowException, ValueError, KeyError, TypeError, MemoryError, OverflowError, RecursionError)
Scalar = str | int | float | bool | None


class _Line(msgspec.Struct):
    """One JSON line; other fields are ignored."""

    uri: Scalar = None
    label: Scalar | list[Scalar] = None
    split: Scalar = None


class Table(SourceFormat):
    """A CSV, JSON lines or Parquet file; its entries lie below roots, each of which becomes a source."""

    name = "manifest"  # in index.json of every release
    suffixes = (".csv", ".jsonl", ".parquet")
    samples = "elsewhere"

    def rows(self, source: Source, number: int, context: ListingContext) -> Iterator[pa.Table]:
        """The entries of the table; their roots are appended to the sources."""
        numbers: dict[str, int] = {}
        resolver, row = Resolver(source.uri, context.access), 0
        for table in read_table(source.uri, labelled=context.labelled):
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
            unknown, zeros = [-1] * count, [0] * count
            label, labels, parts = (table[name] for name in ("label", "labels", "split"))
            yield listing_rows(keys, places, unknown, unknown, zeros, label=label, labels=labels, parts=parts)


def read_table(uri: str, *, labelled: bool = True) -> Iterator[pa.Table]:
    """Tables with the columns ``uri``, ``label``, ``labels`` and ``split``, strings or null.

    ``labels`` are a list in place of ``label``, for any number of labels.

    Raises:
        DataError: it cannot be parsed, a column is missing, or a value is.
    """
    row = 0
    with storage.open_for_reading(uri) as file:
        try:
            for table in _tables(uri, file):
                checked = _checked(uri, table, row, labelled)
                row += len(checked)
                yield checked
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


def _tables(uri: str, file: IO[bytes]) -> Iterator[pa.Table]:
    name = storage.basename(uri).lower()
    if name.endswith(".jsonl"):
        yield from _json_tables(file)
    elif name.endswith(".csv"):
        # A label such as 007 must stay what it is.
        kept = pyarrow.csv.ConvertOptions(column_types={c: pa.string() for c in (*COLUMNS, "split")})
        for batch in pyarrow.csv.open_csv(pa.PythonFile(file, mode="r"), convert_options=kept):
            yield pa.table(batch)
    else:
        yield from _parquet_tables(pyarrow.parquet.ParquetFile(pa.PythonFile(file, mode="r")))


def _parquet_tables(file: pyarrow.parquet.ParquetFile) -> Iterator[pa.Table]:
    wanted = [name for name in (*COLUMNS, "split") if name in file.schema_arrow.names]
    if not {*COLUMNS} & {*wanted}:
        yield file.schema_arrow.empty_table()
        return
    for group in range(file.metadata.num_row_groups):
        # Not by column: pyarrow ends the process when it looks at one whose statistics are damaged.
        size = file.metadata.row_group(group).total_byte_size
        if not 0 <= size <= PARQUET_GROUP_BYTES:
            raise ValueError(f"row group {group} says that it expands to {size:,} bytes; write smaller row groups")
    for batch in file.iter_batches(batch_size=1 << 16, columns=wanted):
        table = pa.table(batch)
        table.validate(full=True)
        yield table


def _json_tables(file: IO[bytes]) -> Iterator[pa.Table]:
    """pyarrow's own reader ends the process by a segmentation fault where values are nested 10^5 deep."""
    decoder = msgspec.json.Decoder(_Line)
    pending, row, first = b"", 0, True
    while True:
        chunk = file.read(LINES_BYTES)
        content = pending + chunk
        if first:
            content, first = content.removeprefix(b"\xef\xbb\xbf"), False
        if chunk:
            whole, mark, pending = content.rpartition(b"\n")
            content = whole + mark
            if len(pending) > LONGEST_LINE:
                raise ValueError(f"a line after row {row} (from 0) is longer than {LONGEST_LINE:,} bytes")
        lines = _decoded(decoder, content, row)
        row += len(lines)
        if lines or not chunk:
            columns = {name: [getattr(line, name) for line in lines] for name in ("uri", "label", "split")}
            lists = [value if isinstance(value, list) else None for value in columns["label"]]
            columns["label"] = [None if isinstance(value, list) else value for value in columns["label"]]
            table = pa.table({name: pa.array(map(_text, values), pa.string()) for name, values in columns.items()})
            named = [None if values is None else [_text(value) for value in values] for values in lists]
            yield table.append_column("labels", pa.array(named, LABELS))
        if not chunk:
            return


def _decoded(decoder: msgspec.json.Decoder[_Line], content: bytes, row: int) -> list[_Line]:
    try:
        return decoder.decode_lines(content)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        for number, line in enumerate((each for each in content.split(b"\n") if each.strip()), row):
            try:
                decoder.decode(line)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
                raise ValueError(f"row {number} (from 0): {error}") from error
        raise


def _text(value: Scalar) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if value is None else str(value)


def _checked(uri: str, table: pa.Table, first_row: int, labelled: bool) -> pa.Table:
    needed = COLUMNS if labelled else COLUMNS[:1]
    if missing := [name for name in needed if name not in table.column_names]:
        columns_found = ", ".join(table.column_names)
        raise DataError(
            f"{uri} has no column {' and no '.join(missing)}; it has {columns_found[:1000]}. "
            "Needed: uri (absolute, or relative to the table) and label. Optional: split (train, val, test)."
        )
    columns = {name: _strings(table, name) for name in (*COLUMNS, "split")}
    columns["labels"] = _label_lists(table)
    each_label = pc.list_flatten(columns["labels"])
    for name in needed:
        missing_rows = pc.is_null(columns[name])
        if name == "label":
            missing_rows = pc.and_(missing_rows, pc.is_null(columns["labels"]))
        if pc.any(missing_rows).as_py():
            row = first_row + pc.index(missing_rows, True).as_py()
            raise DataError(f"{uri}: row {row} (from 0) has no {name}. Complete or remove it.")
    if pc.any(pc.equal(pc.fill_null(each_label, ""), "")).as_py():
        raise DataError(f"{uri}: a list of labels holds an empty one. Complete or remove it.")
    limits = ((columns["uri"], "uri", LONGEST_KEY), (columns["label"], "label", LONGEST_CLASS))
    for column, name, limit in (*limits, (each_label, "label", LONGEST_CLASS)):
        length = pc.max(pc.utf8_length(column)).as_py() or 0
        if length > limit:
            raise DataError(f"{uri}: a {name} has {length:,} characters, at most {limit:,} are possible.")
    unknown = set(pc.unique(columns["split"]).to_pylist()) - {None, *_PART_NAMES}
    if unknown:
        raise DataError(f"{uri}: unknown split {sorted(unknown)[0][:200]!r}; known are {', '.join(_PART_NAMES)}.")
    columns["split"] = pa.array([_PART_NAMES.get(name) for name in columns["split"].to_pylist()], pa.string())
    return pa.table(columns)


def _strings(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.string())])
    column = table[name].cast(pa.string())
    return pc.if_else(pc.equal(column, ""), None, column)


def _label_lists(table: pa.Table) -> pa.ChunkedArray:
    return table["labels"] if "labels" in table.column_names else pa.chunked_array([pa.nulls(len(table), LABELS)])


_PROTOCOLS = frozenset(storage.protocols())
