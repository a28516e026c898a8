"""The rows of a table: checked, as text, whatever its format."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from job.data.index.left_out import LeftOut
from job.data.index.sources.base import LONGEST_CLASS, LONGEST_KEY, MOST_LABELS
from job.errors import DataError

ROWS = pa.schema({"uri": pa.string(), "label": pa.string(), "labels": pa.list_(pa.string()), "split": pa.string()})
"""Columns of the tables that readers return; null where a row has no value."""
PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "unassigned": None,
}
"""Parts by the values of a split column, in lower case."""


def text_table(
    uris: list[str | None],
    labels: list[str | tuple[str, ...] | list[str] | None],
    splits: list[str | None],
) -> pa.Table:
    """A table of :data:`ROWS`; several labels of a row are a list or tuple."""
    several = [list(label) if isinstance(label, (list, tuple)) else None for label in labels]
    one = [label if isinstance(label, str) else None for label in labels]
    columns = [pa.array(c, field.type) for c, field in zip((uris, one, several, splits), ROWS, strict=True)]
    return pa.Table.from_arrays(columns, schema=ROWS)


def checked(uri: str, table: pa.Table, first_row: int, left_out: LeftOut, *, labelled: bool) -> pa.Table:
    """A table of :data:`ROWS` whose values are valid; unlabelled rows of the test part are left out.

    Args:
        uri: of the table, for messages.
        table: some of its rows.
        first_row: their number.
        left_out: counts rows that are left out.
        labelled: each row must have a label.

    Raises:
        DataError: a value is missing or malformed.
    """
    columns = {name: _stripped(table[name]) for name in ("uri", "label", "split")}
    columns["label"] = pc.if_else(pc.equal(pc.utf8_lower(columns["label"]), "nan"), None, columns["label"])
    columns["labels"] = table["labels"]
    _require(uri, columns["uri"], first_row, "uri")
    columns["split"] = _parts(uri, columns["split"])
    if labelled:
        has_label = pc.or_(pc.is_valid(columns["label"]), pc.is_valid(columns["labels"]))
        unneeded = pc.and_(pc.invert(has_label), pc.fill_null(pc.equal(columns["split"], "test"), False))
        _require(uri, pc.if_else(pc.or_(has_label, unneeded), True, None), first_row, "label")
        if count := pc.sum(unneeded).as_py():
            left_out.add("unlabelled rows of the test part", pc.filter(columns["uri"], unneeded)[0].as_py(), count)
            keep = pc.invert(unneeded)
            columns = {name: pc.filter(column, keep) for name, column in columns.items()}
    lists = columns["labels"]
    if (pc.max(pc.list_value_length(lists)).as_py() or 0) > MOST_LABELS:
        raise DataError(f"{uri}: a row has more than {MOST_LABELS:,} labels.")
    lengths = {"uri": columns["uri"], "label": columns["label"], "label in a list": pc.list_flatten(lists)}
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


def _parts(uri: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = pc.unique(column)
    parts: list[str | None] = []
    for value in values.to_pylist():
        if value is not None and value.lower() not in PART_NAMES:
            known = ", ".join(PART_NAMES)
            raise DataError(f"{uri}: unknown split {value[:200]!r}; known are {known}. See --data.columns.")
        parts.append(None if value is None else PART_NAMES[value.lower()])
    return pc.take(pa.array(parts, pa.string()), pc.index_in(column, values))


def _stripped(column: pa.ChunkedArray) -> pa.ChunkedArray:
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(text, ""), None, text)
