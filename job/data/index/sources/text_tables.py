"""Tables of text: CSV with and without a header, and JSON lines."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
from collections.abc import Iterator
from typing import IO, Any

import msgspec
import pyarrow as pa
import pyarrow.csv

from job import typed
from job.data.index.sources.base import is_image
from job.data.index.sources.columns import NAMES, Columns, MissingColumn
from job.data.index.sources.table_rows import ROWS, is_part, text_table
from job.data.index.sources.webdataset import scalar_text

LINES_BYTES = 4 << 20
"""Lines that are parsed together."""
LONGEST_LINE = 8 << 20
LONGEST_HEADER = 1 << 16
_DELIMITERS = (",", ";", "\t", "|")
_ML_USE = "aiplatform.googleapis.com/ml_use"

Scalar = str | int | float | bool | None


class _Image(msgspec.Struct):
    """An image as Hugging Face describes it; other fields are ignored."""

    path: Scalar = None


class _Annotation(msgspec.Struct):
    displayName: Scalar = None


class _VertexLine(msgspec.Struct):
    """One line of a Vertex AI import file for image classification; other fields are ignored."""

    imageGcsUri: Scalar = None
    classificationAnnotation: _Annotation | None = None
    classificationAnnotations: list[_Annotation] | None = None
    dataItemResourceLabels: dict[str, Scalar] | None = None
    ml_use: Scalar = None


def read_csv(uri: str, file: IO[bytes], columns: Columns, *, labelled: bool) -> Iterator[pa.Table]:
    """The rows of a CSV or TSV file, in tables of :data:`ROWS`; its other columns may hold anything.

    Comma, semicolon, tab or bar separates the values, as the first line tells. Without a header the columns are the
    path and the labels, before them optionally the part: Vertex AI's import files.

    Raises:
        DataError: a column is missing.
        ValueError: it is malformed.
    """
    head = file.read(LONGEST_HEADER)
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    lines = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head).splitlines(keepends=True)
    if not lines:
        raise ValueError("it is empty")
    skipped = 0
    delimiters = list(_DELIMITERS)
    if lines[0].strip().lower() in [f"sep={each}" for each in _DELIMITERS]:  # Excel's hint
        delimiters, skipped, lines = [lines[0].strip()[4:]], 1, lines[1:]
    while lines and not lines[0].strip():
        skipped, lines = skipped + 1, lines[1:]
    if not lines or (len(lines) == 1 and len(head) == LONGEST_HEADER):
        raise ValueError(f"its first line is empty or longer than {LONGEST_HEADER:,} bytes")
    rejoined = _Rejoined(head, file)
    headers = {each: next(csv.reader([lines[0]], delimiter=each), []) for each in delimiters}
    if not columns.uri:
        for delimiter, cells in headers.items():
            if any(is_image(cell) or "://" in cell for cell in cells[:2]):
                yield from _read_headerless(rejoined, encoding, delimiter, skipped)
                return
    delimiter = _delimiter(headers, columns)
    names = [name.strip() for name in headers[delimiter]]
    chosen = columns.find(uri, names)
    require_columns(uri, names, chosen, labelled=labelled)
    positions = {role: names.index(name) for role in ("uri", "label", "split") if (name := getattr(chosen, role))}
    if repeated := [names[place] for place in positions.values() if names.count(names[place]) > 1]:
        raise ValueError(f"column {repeated[0]} is there twice")
    batches = pyarrow.csv.open_csv(
        pa.PythonFile(rejoined, mode="r"),
        pyarrow.csv.ReadOptions(
            block_size=LONGEST_LINE,
            column_names=[str(place) for place in range(len(names))],
            skip_rows=skipped + 1,
            encoding="utf-16" if encoding == "utf-16" else "utf8",
        ),
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pyarrow.csv.ConvertOptions(
            include_columns=[str(place) for place in positions.values()],
            column_types={str(place): pa.string() for place in positions.values()},
        ),
    )
    for batch in batches:
        table = pa.table(batch)
        empty = pa.nulls(len(table), pa.string())
        arrays = {
            role: table[str(positions[role])] if role in positions else empty for role in ("uri", "label", "split")
        }
        arrays["labels"] = pa.nulls(len(table), ROWS.field("labels").type)
        yield pa.table({name: arrays[name] for name in ROWS.names})


def read_json_lines(uri: str, file: IO[bytes], columns: Columns, *, labelled: bool) -> Iterator[pa.Table]:
    """The rows of JSON lines, in tables of :data:`ROWS`; their other fields may hold anything.

    A field may be missing in some lines, and a label may be a list. Lines of Vertex AI's import files are understood.

    Raises:
        DataError: a field is missing everywhere.
        ValueError: it is malformed.
    """
    # pyarrow's own reader ends the process by a segmentation fault where values are nested 10^5 deep.
    row = 0
    reader: _LineReader | None = None
    for content in _line_chunks(file):
        if reader is None:
            # Where the table goes on, a field may come later.
            reader = _line_reader(uri, content, columns, labelled=labelled and len(content) < LINES_BYTES // 2)
        table, count = reader.read(content, row)
        row += count
        yield table
    if reader is None:
        raise ValueError("it is empty")


def require_columns(uri: str, names: list[str], chosen: Columns, *, labelled: bool) -> None:
    """Check that a table has the columns that are needed.

    Raises:
        MissingColumn: it has not.
    """
    needed = ("uri", "label") if labelled else ("uri",)
    if missing := [role for role in needed if not getattr(chosen, role)]:
        raise MissingColumn(
            f"{uri} has no column {' and no '.join(missing)}; it has {', '.join(names)[:1000]}. "
            "Needed: uri (absolute, or relative to the table) and label. Optional: split (train, val, test). "
            "Other names: --data.columns uri=NAME,label=NAME,split=NAME."
        )


def _delimiter(headers: dict[str, list[str]], columns: Columns) -> str:
    """The delimiter by which the first line has a column that names images, else the one with the most columns."""
    accepted = [columns.uri] if columns.uri else NAMES["uri"]
    for delimiter, cells in headers.items():
        if any(cell.strip().lower() in accepted or cell.strip() in accepted for cell in cells):
            return delimiter
    return max(headers, key=lambda each: len(headers[each]))


def _read_headerless(file: _Rejoined, encoding: str, delimiter: str, skipped: int) -> Iterator[pa.Table]:
    row = 0
    decoder = codecs.getincrementaldecoder(encoding)()
    for content in _line_chunks(file, decoder=decoder):
        lines = io.StringIO(content.decode(), newline="")
        rows = list(csv.reader(itertools.islice(lines, skipped, None), delimiter=delimiter, strict=True))
        skipped = 0
        uris, labels, splits = [], [], []
        for cells in rows:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            has_part = len(cells) > 1 and (not cells[0] or is_part(cells[0]))
            splits.append(cells.pop(0) if has_part else None)
            uris.append(cells[0])
            several = [cell for cell in cells[1:] if cell]
            if sum(map(_is_fraction, several)) >= 2:
                raise ValueError(f"row {row} (from 0) holds coordinates: it is a table of objects in images")
            labels.append(several if len(several) > 1 else several[0] if several else None)
            row += 1
        if labels and all(isinstance(each, list) and is_part(each[-1]) for each in labels):
            raise ValueError("its last column names parts: it needs a header, for example path,label,split")
        yield text_table(uris, labels, splits)  # type: ignore[arg-type]


def _is_fraction(cell: str) -> bool:
    try:
        return "." in cell and 0 <= float(cell) <= 1
    except ValueError:
        return False


class _Rejoined(io.RawIOBase):
    """A file whose first bytes were read already."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if self._head:
            size = len(self._head) if size is None or size < 0 else size
            content, self._head = self._head[:size], self._head[size:]
            return content
        return self._file.read(-1 if size is None else size)


def _line_chunks(file: IO[bytes] | _Rejoined, decoder: codecs.IncrementalDecoder | None = None) -> Iterator[bytes]:
    """Whole lines, about :data:`LINES_BYTES` together, in UTF-8.

    Raises:
        ValueError: a line is longer than :data:`LONGEST_LINE`.
    """
    decoder = decoder or codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
    pending: list[bytes] = []
    size = row = 0
    while chunk := file.read(LINES_BYTES):
        content = decoder.decode(chunk).encode(errors="surrogateescape")
        whole, mark, rest = content.rpartition(b"\n")
        if mark:
            lines = b"".join([*pending, whole, mark])
            row += lines.count(b"\n")
            yield lines
            pending, size = [], 0
        pending.append(rest)
        size += len(rest)
        if size > LONGEST_LINE:
            raise ValueError(f"a line after row {row} (from 0) is longer than {LONGEST_LINE:,} bytes")
    pending.append(decoder.decode(b"", final=True).encode(errors="surrogateescape"))
    if rest := b"".join(pending):
        yield rest


class _LineReader:
    """Decodes JSON lines with the fields of one table.

    Args:
        line: type of a line.
        fields: attributes of ``line`` by role; the first that is not null counts.
    """

    def __init__(self, line: type[msgspec.Struct], fields: dict[str, list[str]]) -> None:
        self._decoder = typed.decoder(line)
        self._fields = fields

    def read(self, content: bytes, row: int) -> tuple[pa.Table, int]:
        """A table of :data:`ROWS`, and its number of rows."""
        lines = self._decoded(content, row)
        columns = [[self._value(line, role) for line in lines] for role in ("uri", "label", "split")]
        return text_table(*columns), len(lines)

    def _value(self, line: msgspec.Struct, role: str) -> Any:
        if isinstance(line, _VertexLine):
            return _vertex_value(line, role)
        values = (getattr(line, name) for name in self._fields[role])
        value = next((value for value in values if value is not None), None)
        if isinstance(value, list):
            return [_text(each) for each in value]
        return _text(value.path if isinstance(value, _Image) else value)

    def _decoded(self, content: bytes, row: int) -> list[msgspec.Struct]:
        try:
            return self._decoder.decode_lines(content)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            for number, line in enumerate((each for each in content.split(b"\n") if each.strip()), row):
                try:
                    self._decoder.decode(line)
                except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
                    raise ValueError(f"row {number} (from 0): {error}") from error
            raise


def _line_reader(uri: str, content: bytes, columns: Columns, *, labelled: bool) -> _LineReader:
    """The reader for a table that begins with ``content``."""
    names = _field_names(content)
    if "imageGcsUri" in names and not columns.uri:
        return _LineReader(_VertexLine, {})
    columns_of_table = columns.find(uri, names)
    require_columns(uri, names, columns_of_table, labelled=labelled)
    fields: dict[str, list[str]] = {}
    types: list[tuple[str, str, Any]] = []
    for role in ("uri", "label", "split"):
        chosen = getattr(columns_of_table, role)
        fields[role] = [f"{role}_{number}" for number in range(1 if chosen else len(NAMES[role]))]
        kind: Any = {"uri": Scalar | _Image, "label": Scalar | list[Scalar], "split": Scalar}[role]
        types += [
            (attribute, name, kind)
            for attribute, name in zip(fields[role], [chosen] if chosen else NAMES[role], strict=True)
        ]
    line = msgspec.defstruct(
        "Line",
        [(attribute, kind, None) for attribute, _, kind in types],
        rename={attribute: name for attribute, name, _ in types},
    )
    return _LineReader(line, fields)


def _field_names(content: bytes) -> list[str]:
    """Names of the fields of some lines."""
    decoder = typed.decoder(dict[str, msgspec.Raw])
    names: dict[str, None] = {}
    for number, line in enumerate(each for each in content.split(b"\n") if each.strip()):
        try:
            names |= dict.fromkeys(decoder.decode(line))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(f"row {number} (from 0): {error}") from error
    return list(names)


def _vertex_value(line: _VertexLine, role: str) -> Any:
    if role == "uri":
        return _text(line.imageGcsUri)
    if role == "split":
        return _text((line.dataItemResourceLabels or {}).get(_ML_USE, line.ml_use))
    if line.classificationAnnotations is not None:
        return [_text(each.displayName) for each in line.classificationAnnotations]
    return _text(line.classificationAnnotation.displayName) if line.classificationAnnotation else None


def _text(value: Scalar) -> str | None:
    return None if value is None else scalar_text(value)
