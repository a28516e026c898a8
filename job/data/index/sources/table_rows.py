"""The rows of a table: checked, as text, whatever its format."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from job.data.index.part_names import part_of
from job.data.index.sources.base import LONGEST_CLASS, LONGEST_KEY, MOST_LABELS
from job.errors import DataError

ROWS = pa.schema({"uri": pa.string(), "label": pa.string(), "labels": pa.list_(pa.string()), "split": pa.string()})
"""Columns of the tables that readers return; null where a row has no value."""
UNASSIGNED = "unassigned"
"""Vertex AI's name for rows that may be in any part."""


def text_table(
    uris: list[str | None],
    labels: list[str | list[str | None] | None],
    splits: list[str | None],
) -> pa.Table:
    """A table of :data:`ROWS`; several labels of a row are a list."""
    several = [label if isinstance(label, list) else None for label in labels]
    one = [label if isinstance(label, str) else None for label in labels]
    columns = [pa.array(c, field.type) for c, field in zip((uris, one, several, splits), ROWS, strict=True)]
    return pa.Table.from_arrays(columns, schema=ROWS)


def checked(uri: str, table: pa.Table, first_row: int, *, labelled: bool) -> pa.Table:
    """A table of :data:`ROWS` whose values are valid.

    Args:
        uri: of the table, for messages.
        table: some of its rows.
        first_row: their number.
        labelled: each row must have a label, unless it is of the test part.

    Raises:
        DataError: a value is missing or malformed.
    """
    columns = {name: _stripped(table[name]) for name in ("uri", "label", "split")}
    columns["label"] = pc.if_else(pc.equal(pc.utf8_lower(columns["label"]), "nan"), None, columns["label"])
    columns["labels"] = table["labels"]
    _require(uri, columns["uri"], first_row, "uri")
    columns["split"] = _parts(uri, columns["split"])
    if labelled:  # a test part without labels is not needed for training
        unlabelled = pc.and_(pc.is_null(columns["label"]), pc.is_null(columns["labels"]))
        unlabelled = pc.and_(unlabelled, pc.not_equal(pc.fill_null(columns["split"], "train"), "test"))
        _require(uri, pc.if_else(unlabelled, None, True), first_row, "label")
    lists = columns["labels"]
    each_label = pc.list_flatten(lists)
    if pc.any(pc.equal(pc.fill_null(each_label, ""), "")).as_py():
        raise DataError(f"{uri}: a list of labels holds an empty one. Complete or remove it.")
    if (pc.max(pc.list_value_length(lists)).as_py() or 0) > MOST_LABELS:
        raise DataError(f"{uri}: a row has more than {MOST_LABELS:,} labels.")
    lengths = {"uri": columns["uri"], "label": columns["label"], "label in a list": each_label}
    for name, column in lengths.items():
        length = pc.max(pc.utf8_length(column)).as_py() or 0
        limit = LONGEST_KEY if name == "uri" else LONGEST_CLASS
        if length > limit:
            raise DataError(f"{uri}: a {name} has {length:,} characters, at most {limit:,} are possible.")
    return pa.table({name: columns[name] for name in ROWS.names})


def _require(uri: str, column: pa.ChunkedArray, first_row: int, name: str) -> None:
    if column.null_count:
        row = first_row + pc.index(pc.is_null(column), True).as_py()
        raise DataError(f"{uri}: row {row} (from 0) has no {name}. Complete or remove it.")


def is_part(value: str) -> bool:
    """Whether a value of a split column is understood."""
    return value.lower() == UNASSIGNED or part_of(value) is not None


def _parts(uri: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = pc.unique(column)
    if unknown := [value for value in values.to_pylist() if value is not None and not is_part(value)]:
        raise DataError(
            f"{uri}: unknown split {unknown[0][:200]!r}; known are train, val and test, in their usual spellings. "
            "See --data.columns."
        )
    parts = [None if value is None else part_of(value) for value in values.to_pylist()]
    return pc.take(pa.array(parts, pa.string()), pc.index_in(column, values))


def _stripped(column: pa.ChunkedArray) -> pa.ChunkedArray:
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(text, ""), None, text)
