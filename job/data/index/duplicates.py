"""Files of one listing that have the same name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from job.data.index.left_out import COPIES, REPEATED_ROWS, REPLACED, LeftOut
from job.errors import DataError
from job.process.terminal import escape

_ODD = np.uint64(0x9E3779B97F4A7C15)


def drop_duplicates(path: Path, left_out: LeftOut, *, members: bool) -> None:
    """Leave one row per name in the listing at ``path``, the last one.

    In an archive, a member replaces an earlier one of the same name, whatever it holds. Elsewhere two keys of one name
    (``é`` composed and decomposed, say) are files of their own, and copies only if their sizes are equal, too.
    8 bytes per row are held in memory.

    Args:
        path: of an Arrow file, which is written anew if there are duplicates.
        left_out: counts them.
        members: the rows are members of archives.
    """
    with pa.memory_map(str(path)) as file:
        hashes = _file_hashes(pa.ipc.open_file(file), sizes=not members)
        ordered = np.sort(hashes)
        repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        if not len(repeated):
            return
        last = np.full(len(repeated), -1, np.int64)
        candidates = np.flatnonzero(np.isin(hashes, repeated))
        # Later rows overwrite earlier ones.
        np.maximum.at(last, np.searchsorted(repeated, hashes[candidates]), candidates)
        dropped = np.zeros(len(hashes), np.bool_)
        dropped[candidates] = True
        dropped[last] = False
        _rewrite(pa.ipc.open_file(file), path, dropped, left_out, REPLACED if members else COPIES)


def drop_repeated_rows(uri: str, path: Path, sources: Sequence[str], left_out: LeftOut) -> None:
    """Leave one row per image and part in the listing of tables at ``path``, the last one.

    Args:
        uri: of the table, or of the folder with the tables, for messages.
        path: of an Arrow file, which is written anew if there are repeated rows.
        sources: URIs of the sources by number: two tables may name one image below different folders.
        left_out: counts them.

    Raises:
        DataError: rows of one image have different labels.
    """
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        folders = pa.array([source.rstrip("/") for source in sources], pa.string())

        def places(batch: pa.RecordBatch) -> list[pa.Array]:
            uris = pc.binary_join_element_wise(pc.take(folders, batch.column("source")), batch.column("key"), "/")
            return [uris, pc.fill_null(batch.column("part"), "train")]

        hashes = _hashes(reader, places)
        order = np.argsort(hashes, kind="stable")
        repeats = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        if not len(repeats):
            return
        labels = _hashes(reader, lambda batch: [batch.column("class"), batch.column("classes")])
        differ = repeats[labels[order[repeats]] != labels[order[repeats + 1]]]
        if len(differ):
            first = differ[np.argmin(order[differ])]  # of rows, not of hashes, which differ from process to process
            raise _contradiction(uri, reader, order[first : first + 2].tolist())
        dropped = np.zeros(len(hashes), np.bool_)
        dropped[order[repeats]] = True
        _rewrite(reader, path, dropped, left_out, REPEATED_ROWS)


def _contradiction(uri: str, reader: pa.ipc.RecordBatchFileReader, rows: list[int]) -> DataError:
    start, values = 0, []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        values += [batch.slice(row - start, 1).to_pylist()[0] for row in rows if start <= row < start + len(batch)]
        start += len(batch)
    first, second = (escape(str(value["class"] if value["classes"] is None else value["classes"])) for value in values)
    return DataError(
        f"{uri}: {escape(values[0]['key'])} has the label {first} in one row and {second} in another. Remove one, or "
        "give several labels as a list."
    )


def _file_hashes(reader: pa.ipc.RecordBatchFileReader, *, sizes: bool) -> npt.NDArray[np.uint64]:
    """A hash of source and name per row, and of the size if ``sizes``; a folder's row has a unique hash."""
    hashes = _hashes(reader, lambda batch: [batch.column("source"), batch.column("name")])
    if sizes:
        batches = [reader.get_batch(number).column("size") for number in range(reader.num_record_batches)]
        size = np.concatenate([np.empty(0, np.int64), *(batch.to_numpy() for batch in batches)])
        hashes = hashes ^ (size.view(np.uint64) * _ODD)
        unknown = np.flatnonzero(size < 0)
        hashes[unknown] = unknown.astype(np.uint64)
    return hashes


def _hashes(
    reader: pa.ipc.RecordBatchFileReader, columns: Callable[[pa.RecordBatch], list[pa.Array]]
) -> npt.NDArray[np.uint64]:
    """A hash per row of some columns of its batch."""
    # Python's hash of a string is keyed anew per process: nobody can make an archive whose names collide.
    batch_hashes = [np.empty(0, np.uint64)]
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        hashes = np.zeros(len(batch), np.uint64)
        for column in columns(batch):
            hashes = hashes * _ODD + _column_hashes(column)
        batch_hashes.append(hashes)
    return np.concatenate(batch_hashes)


def _column_hashes(column: pa.Array) -> npt.NDArray[np.uint64]:
    if column.null_count == len(column):
        return np.zeros(len(column), np.uint64)
    if pa.types.is_integer(column.type):
        numbers: npt.NDArray[np.uint64] = column.to_numpy().astype(np.uint64)
        return numbers
    values = column.to_pylist()
    if pa.types.is_list(column.type):
        values = [None if value is None else tuple(sorted(value)) for value in values]
    hashes = (0 if value is None else hash(value) for value in values)
    return np.fromiter(hashes, np.int64, len(column)).view(np.uint64)


def _rewrite(
    reader: pa.ipc.RecordBatchFileReader, path: Path, dropped: npt.NDArray[np.bool_], left_out: LeftOut, kind: str
) -> None:
    target, start = path.with_name(f"{path.name}-once"), 0
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, reader.schema) as writer:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            drop = pa.array(dropped[start : start + len(batch)])
            start += len(batch)
            samples = batch.filter(pc.and_(drop, batch.column("image")))
            if len(samples):
                left_out.add(kind, samples.column("key")[0].as_py(), len(samples))
            writer.write_batch(batch.filter(pc.invert(drop)))
    target.replace(path)
