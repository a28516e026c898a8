"""The index of samples: an Arrow file per part, memory-mapped by all processes of a node.

An index is a folder: ``index.json``, and for each part ``PART.arrow`` with one row per sample, in the
order of sample ids. A row costs 36 bytes and its key.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from job import redact, storage
from job.data.index.access import Access, is_chained, split_scheme
from job.data.index.file import (
    ROWS_PER_BATCH,
    SCHEMA,
    SEVERAL_LABELS_SCHEMA,
    DamagedIndex,
    PartInfo,
    hash_file,
    load_index_info,
    open_part,
)
from job.errors import DataError

RUN_BYTES = 1 << 20
"""Bytes of one read from tar shards: below some MB a bucket's latency costs more than its bandwidth."""


class Sample(NamedTuple):
    """Place of a sample; the columns of :data:`SCHEMA`."""

    key: str
    source: int
    offset: int
    size: int
    version: int


class Index:
    """The samples of one part; a sample's id is its row. Pickled as its path.

    Args:
        folder: local folder of the index.
        part: train, val, test, …
        access: sources that may be read besides object stores and public web servers; default: any.

    Attributes:
        has_several_labels: samples have any number of labels, and :attr:`labels` are all -1.

    The values in it are not checked here, in each process: see :func:`job.data.index.file.verify_parts`.

    Raises:
        DataError: the index is damaged, or has no such part.
    """

    def __init__(self, folder: str | Path, part: str, access: Access | None = None) -> None:
        self.folder, self.part = str(folder), part
        self.access = access or Access(unrestricted=True)
        info = load_index_info(folder)
        if part not in info.parts:
            raise DataError(f"the index in {folder} has no part {part}; it has {', '.join(info.parts)}.")
        self.classes = tuple(info.classes)
        self.sources = tuple(info.sources)
        self.created = info.created
        self.has_several_labels = bool(info.several_labels)
        self.info: PartInfo = info.parts[part]
        self.root = self.info.root
        path = Path(folder) / f"{part}.arrow"
        try:
            if path.stat().st_size != self.info.bytes:
                raise ValueError(f"{path.stat().st_size:,} bytes, {self.info.bytes:,} in index.json")
            self._batches = open_part(path, self.info.rows, info.schema, ROWS_PER_BATCH)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise DamagedIndex(f"{path} is damaged: {error}. Remove {folder}.") from error

    def __reduce__(self) -> tuple[type[Index], tuple[str, str, Access]]:
        return Index, (self.folder, self.part, self.access)

    def __len__(self) -> int:
        return self.info.rows

    def __getitem__(self, sample: int) -> Sample:
        return self.rows([sample])[0]

    def rows(self, samples: Sequence[int]) -> list[Sample]:
        """Places of some samples, in the given order."""
        places: dict[int, Sample] = {}
        for number in {sample // ROWS_PER_BATCH for sample in samples}:
            chosen = [sample for sample in samples if sample // ROWS_PER_BATCH == number]
            batch = self._batches[number].take(pa.array([sample % ROWS_PER_BATCH for sample in chosen]))
            columns = [batch.column(name).to_pylist() for name in Sample._fields]
            places.update(zip(chosen, map(Sample, *columns), strict=True))
        return [places[sample] for sample in samples]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, :data:`ROWS_PER_BATCH` at a time."""
        return iter(self._batches)

    @functools.cached_property
    def stores(self) -> tuple[str, ...]:
        """URI of one source on each filesystem: a thousand shards in a bucket are one."""
        uris = {uri if is_chained(uri) else split_scheme(uri): uri for uri in (source.uri for source in self.sources)}
        return tuple(uris.values())

    @property
    def keys(self) -> Sequence[str]:
        """All keys, in memory."""
        return [key for batch in self._batches for key in batch.column("key").to_pylist()]

    @functools.cached_property
    def labels(self) -> npt.NDArray[np.int32]:
        """int32 [len(self)], the class number of every sample; -1 where there is none."""
        columns = [batch.column("label").to_numpy() for batch in self._batches]
        return columns[0] if len(columns) == 1 else np.concatenate([np.empty(0, np.int32), *columns])

    def labels_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64, same shape: the class numbers of some samples, without reading all."""
        return self._values("label", samples)

    def label_lists(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Labels of all samples of data with several: (sample ids, class numbers), one pair per label, in order."""
        samples, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for number, batch in enumerate(self._batches):
            column = batch.column("labels")
            samples.append(column.value_parent_indices().to_numpy() + number * ROWS_PER_BATCH)
            numbers.append(column.flatten().to_numpy())
        return np.concatenate(samples), np.concatenate(numbers)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """int64 [C], the number of samples of each class."""
        counts = np.zeros(len(self.classes), np.int64)
        for batch in self._batches:
            labels = (batch.column("labels").flatten() if self.has_several_labels else batch.column("label")).to_numpy()
            counts += np.bincount(labels[labels >= 0], minlength=len(counts))
        return counts

    def rarest_labels(self) -> npt.NDArray[np.int32]:
        """int32 [len(self)], the class of each sample that the fewest samples have; -1 where there is none."""
        if not self.has_several_labels:
            return self.labels
        order = np.argsort(self.class_counts(), kind="stable").astype(np.int32)  # the rarest class first
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order), dtype=np.int32)
        order = np.append(order, np.int32(-1))
        parts = [np.empty(0, np.int32)]
        for batch in self._batches:
            column = batch.column("labels")
            lowest = np.full(len(batch), len(ranks), np.int32)
            np.minimum.at(lowest, column.value_parent_indices().to_numpy(), ranks[column.flatten().to_numpy()])
            parts.append(order[lowest])
        return np.concatenate(parts)

    def multi_hot_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """uint8 [len(samples), C]: 1 for each label of some samples of data with several."""
        targets = np.zeros((len(samples), len(self.classes)), np.uint8)
        for number in np.unique(samples // ROWS_PER_BATCH):
            rows = np.flatnonzero(samples // ROWS_PER_BATCH == number)
            chosen = self._batches[number].column("labels").take(pa.array(samples[rows] % ROWS_PER_BATCH))
            targets[rows[chosen.value_parent_indices().to_numpy()], chosen.flatten().to_numpy()] = 1
        return targets

    def sizes_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64, same shape: the bytes of some samples as they lie in their sources; -1 where not known."""
        return self._values("size", samples)

    def _values(self, column: str, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        values = np.empty(len(samples), np.int64)
        for number in np.unique(samples // ROWS_PER_BATCH):
            chosen = samples // ROWS_PER_BATCH == number
            values[chosen] = self._batches[number].column(column).to_numpy()[samples[chosen] % ROWS_PER_BATCH]
        return values

    def fingerprint(self) -> str:
        """Identity of this part: its size and a hash of keys and labels, but not its place."""
        digest = hashlib.sha256(repr((self.classes, self.info.fingerprint, self.info.run_length)).encode())
        return f"{len(self):,} images, {digest.hexdigest()[:16]}"

    def uri(self, sample: int) -> str:
        """URI of a sample; a member of an archive as ARCHIVE/MEMBER."""
        return self.uris([sample])[0]

    def uris(self, samples: Sequence[int]) -> list[str]:
        """URIs of some samples, in the given order."""
        places = self.rows(samples)
        return [redact.identity(storage.join(self.sources[place.source].uri, place.key)) for place in places]


class PartWriter:
    """Writes the samples of one part, with rows of the schema given in any portions.

    Memory holds no more than :data:`ROWS_PER_BATCH` rows and one portion.

    Args:
        path: the Arrow file.
        several_labels: samples have any number of labels.
    """

    def __init__(self, path: Path, *, several_labels: bool = False) -> None:
        self._path = path
        self._schema = SEVERAL_LABELS_SCHEMA if several_labels else SCHEMA
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._pending: list[pa.Table] = []
        self._digest = hashlib.sha256()
        self.rows = 0
        self._bytes = 0
        self._same_neighbours = 0
        self._label_counts = np.zeros(0, np.int64)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def write(self, rows: pa.Table) -> None:
        """Append ``rows``."""
        self._pending.append(rows.select(self._schema.names).cast(self._schema))
        if sum(len(table) for table in self._pending) >= ROWS_PER_BATCH:
            table = pa.concat_tables(self._pending)
            full = len(table) - len(table) % ROWS_PER_BATCH
            for start in range(0, full, ROWS_PER_BATCH):
                self._write_batch(table.slice(start, ROWS_PER_BATCH))
            self._pending = [table.slice(full)]

    def finish(self, root: str, *, shards: bool) -> PartInfo:
        """Write the remaining rows, and close the file.

        Args:
            root: URI to name in messages.
            shards: all samples lie in tar files.
        """
        rest = pa.concat_tables(self._pending) if self._pending else self._schema.empty_table()
        if len(rest):
            self._write_batch(rest)
        mean = self._bytes / max(self.rows, 1)
        run_length = int(np.clip(RUN_BYTES / max(mean, 1), 1, 256)) if shards and self._is_shuffled() else 1
        self._close()
        return PartInfo(
            root=root,
            rows=self.rows,
            fingerprint=self._digest.hexdigest(),
            run_length=run_length,
            mean_bytes=mean,
            bytes=self._path.stat().st_size,
            sha256=hash_file(self._path),
        )

    def _close(self) -> None:
        if not self._file.closed:
            self._writer.close()
            self._file.close()

    def _write_batch(self, table: pa.Table) -> None:
        batch = table.combine_chunks().to_batches()[0]
        self._writer.write_batch(batch)
        keys, labels = batch.column("key"), batch.column("label").to_numpy()
        self._digest.update("\0".join(keys.to_pylist()).encode())
        self._digest.update(labels.tobytes())
        if "labels" in self._schema.names:
            several = batch.column("labels")
            lengths = several.value_lengths().to_numpy()
            self._digest.update(lengths.tobytes() + several.flatten().to_numpy().tobytes())
            labels = np.full(len(batch), -1, np.int32)  # the first ones stand for all in the search for runs
            labels[lengths > 0] = several.flatten().to_numpy()[(lengths.cumsum() - lengths)[lengths > 0]]
        self.rows += len(batch)
        self._bytes += int(batch.column("size").to_numpy().clip(0).sum())
        self._same_neighbours += int((labels[1:] == labels[:-1]).sum())
        counts = np.bincount(labels[labels >= 0], minlength=len(self._label_counts))
        counts[: len(self._label_counts)] += self._label_counts
        self._label_counts = counts

    def _is_shuffled(self) -> bool:
        """Whether neighbours share a class hardly more often than two random samples do."""
        chance = float(((self._label_counts / max(self.rows, 1)) ** 2).sum())
        return self._same_neighbours / max(self.rows, 1) <= chance + 0.1 * (1 - chance)
