"""Parquet tables: of URIs, or with the images themselves, as Hugging Face writes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import IO, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from job import typed
from job.data.index.embedded_images import open_parquet
from job.data.index.sources.base import LONGEST_KEY
from job.data.index.sources.columns import Columns
from job.data.index.sources.table_rows import ROWS
from job.data.index.sources.text_tables import require_columns

BATCH_ROWS = 1 << 14
LONGEST_VALUE = 4 * LONGEST_KEY
"""Bytes of the longest text that is read: Parquet stores a value that is repeated only once."""
ROWS_CHECKED = 64
"""Rows among which the first image is looked for: some may be missing."""
LARGEST_METADATA = 1 << 24
"""Bytes of the description of features that Hugging Face puts into a file."""


def image_column(parquet: pyarrow.parquet.ParquetFile, uri: str, columns: Columns) -> str:
    """The column that holds images as bytes, or as ``{bytes, path}``; empty where there is none.

    Raises:
        DataError: several might be meant.
    """
    schema = parquet.schema_arrow
    names = [field.name for field in schema if _may_hold_images(field.type)]
    if columns.uri:
        names = [name for name in names if name == columns.uri]
    names = [name for name in names if _holds_images(parquet, name)]
    return names[0] if len(names) == 1 else Columns().find(uri, names).uri


def read_parquet(uri: str, file: IO[bytes], columns: Columns, *, labelled: bool, images: bool) -> Iterator[pa.Table]:
    """The rows of a Parquet file, in tables of :data:`ROWS`; its other columns are not read.

    Args:
        uri: of the table, for messages.
        file: its content.
        columns: names of columns.
        labelled: it must have labels.
        images: read the column that names the images; else they are named by the numbers of their rows.

    Raises:
        DataError: a column is missing.
        ValueError: it is malformed (a :class:`pyarrow.ArrowInvalid`, too).
    """
    parquet = open_parquet(file)
    schema = parquet.schema_arrow
    if not images:
        columns = Columns(image_column(parquet, uri, columns), columns.label, columns.split)
    chosen = columns.find(uri, schema.names)
    require_columns(uri, schema.names, chosen, labelled=labelled)
    names = {role: name for role in ("uri", "label", "split") if (name := getattr(chosen, role))}
    if repeated := [name for name in names.values() if schema.names.count(name) > 1]:
        raise ValueError(f"column {repeated[0]} is there twice")
    class_names = _class_names(schema, chosen.label)
    paths = {role: _path(schema, name) for role, name in names.items()}
    if not images:
        del paths["uri"]
    row = 0
    leaves = [parquet.schema.column(place).path for place in range(len(parquet.schema))]
    texts = [leaf for leaf in leaves if any(f"{leaf}.".startswith(f"{path}.") for path in paths.values())]
    for batch in _batches(open_parquet(file, texts), list(paths.values())):
        batch.validate(full=True)
        count = len(batch)
        values = {role: pa.chunked_array([_values(batch, path)]) for role, path in paths.items()}
        row += count
        if not images:
            values["uri"] = pa.chunked_array([pa.array(range(row - count, row))])
        arrays = {role: _text(values[role]) if role in values else _nulls(count) for role in ("uri", "split")}
        arrays["label"], arrays["labels"] = _label_columns(values.get("label"), class_names, count)
        yield pa.table({name: arrays[name] for name in ROWS.names}, schema=ROWS)


def _batches(parquet: pyarrow.parquet.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if columns:
        yield from parquet.iter_batches(BATCH_ROWS, columns=columns)
        return
    for start in range(0, parquet.metadata.num_rows, BATCH_ROWS):
        count = min(BATCH_ROWS, parquet.metadata.num_rows - start)
        yield pa.RecordBatch.from_arrays([pa.nulls(count)], ["none"])


def _may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_binary(kind.field(place).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_images(parquet: pyarrow.parquet.ParquetFile, name: str) -> bool:
    """Whether the first value of a column is an image rather than a path; texts are stored as bytes, too.

    Null and empty values are passed over.
    """
    is_struct = pa.types.is_struct(parquet.schema_arrow.field(name).type)
    batches = parquet.iter_batches(1, columns=[f"{name}.bytes" if is_struct else name])
    for batch in itertools.islice(batches, ROWS_CHECKED):
        batch.validate(full=True)
        value = batch.column(0)[0].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content:
            return len(content) > LONGEST_KEY or not _is_text(content)
    return False


def _is_text(content: bytes) -> bool:
    try:
        return content.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _path(schema: pa.Schema, name: str) -> str:
    """The column as it is read; of images that are not in the file themselves their paths."""
    kind = schema.field(name).type
    return f"{name}.path" if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else name


def _values(batch: pa.RecordBatch, path: str) -> pa.Array:
    if path in batch.schema.names:
        return batch.column(path)
    name, _, field = path.rpartition(".")
    return batch.column(name).field(field)


def _label_columns(
    column: pa.ChunkedArray | None, class_names: list[str], count: int
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """(label, labels) as text."""
    no_lists = pa.chunked_array([pa.nulls(count, ROWS.field("labels").type)])
    if column is None:
        return _nulls(count), no_lists
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lists = []
        for chunk in column.chunks:
            texts = _named(pa.chunked_array([chunk.flatten()]), class_names).combine_chunks()
            lengths = pc.fill_null(pc.list_value_length(chunk), 0).cast(pa.int32())
            offsets = pc.cumulative_sum(pa.concat_arrays([pa.array([0], pa.int32()), lengths]))
            lists.append(pa.ListArray.from_arrays(offsets, texts, mask=chunk.is_null()))
        return _nulls(count), pa.chunked_array(lists, ROWS.field("labels").type)
    return _named(column, class_names), no_lists


def _named(column: pa.ChunkedArray, class_names: list[str]) -> pa.ChunkedArray:
    """Labels as text; numbers of a ClassLabel by its names, of which -1 stands for none."""
    if class_names and pa.types.is_integer(column.type):
        numbers = column.cast(pa.int64())
        has_name = pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(class_names)))
        if not pc.all(pc.or_(has_name, pc.equal(numbers, -1)), min_count=0).as_py():
            raise ValueError(f"a label is not one of the {len(class_names):,} class names in the file")
        return pc.take(pa.array(class_names, pa.string()), pc.if_else(has_name, numbers, None))
    return _text(column)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        texts = column.type.value_type
        if pa.types.is_string(texts) or pa.types.is_large_string(texts) or _is_binary(texts):
            longest = max(
                (pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0 for chunk in column.chunks), default=0
            )
            if longest > LONGEST_VALUE:
                raise ValueError(f"a value has {longest:,} bytes, more than {LONGEST_VALUE:,}")
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column.cast(pa.string())


def _nulls(count: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(count, pa.string())])


def _class_names(schema: pa.Schema, label: str) -> list[str]:
    """Names of the classes of a Hugging Face ClassLabel, from the schema's metadata."""
    content = (schema.metadata or {}).get(b"huggingface", b"")
    if not content or len(content) > LARGEST_METADATA:
        return []
    try:
        feature: Any = typed.from_json(content)["info"]["features"][label]
        while "names" not in feature and "feature" in feature:  # a list of labels
            feature = feature["feature"]
        names = feature["names"]
    except (msgspec.MsgspecError, RecursionError, KeyError, TypeError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
