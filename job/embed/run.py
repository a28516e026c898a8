"""Embeddings of all images of an index, into one file or into the parts of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from job import storage
from job.data.bad_samples import BadSample
from job.data.dataset import Batch
from job.data.index.index import Index
from job.embed.embedder import Embedder
from job.embed.file import Block, EmbeddingFile, Embeddings, FileInfo, VectorType
from job.errors import DataError
from job.predict.run import Reading, commit_part, computed, read_batches, true_labels
from job.predict.work import Work, remaining
from job.process import temporary
from job.storage.json_files import write_json

SUMMARY_FILE = "summary.json"


def info_of(embedder: Embedder) -> FileInfo:
    """What vectors are computed by."""
    return FileInfo(embedder.fingerprint, embedder.net.name, embedder.precision)


def embed_index(embedder: Embedder, index: Index, samples: range, reading: Reading) -> Iterator[Block]:
    """Compute the vectors of images of an index, in its order.

    Args:
        embedder: the backbone.
        index: the images.
        samples: sample ids.
        reading: how images are read.

    Yields:
        the rows of each batch.

    Raises:
        DivergedError: a vector is not finite.
        StorageError: the images cannot be read at present.
    """
    batches = read_batches(embedder.preprocessing, index, samples, reading)
    for batch, features in computed(batches, embedder.features):
        yield _rows(embedder, index, batch, features)


def _rows(embedder: Embedder, index: Index, batch: Batch, features: Tensor) -> Block:
    """The rows of a batch, without its padding."""
    count = batch["global_size"]
    bad = {each.sample: each.line for each in batch["bad"]}
    samples = batch["sample"].tolist()[:count]
    valid = np.array([sample not in bad for sample in samples])
    # What a network makes of the black image in the place of an unreadable one does not matter.
    vectors = np.zeros((count, embedder.width), np.float32)
    vectors[valid] = embedder.vectors(features[:count].cpu()[valid])
    uris = index.uris(samples)
    errors = [
        bad[sample].removeprefix(f"{uri} ") if sample in bad else None
        for sample, uri in zip(samples, uris, strict=True)
    ]
    return Block(uris, vectors, valid, true_labels(index, batch)[:count], errors)


def embed_to_file(
    embedder: Embedder, index: Index, reading: Reading, output: str, vector_type: VectorType
) -> Iterator[Block]:
    """Write the vectors of all images of an index into a file, which appears at the end, whole.

    Yields:
        the rows of each batch.
    """
    scratch = temporary.folder("embed")
    try:
        path = scratch / "embeddings.parquet"
        with EmbeddingFile(path, embedder.width, vector_type, info_of(embedder)) as file:
            for rows in embed_index(embedder, index, range(len(index)), reading):
                file.add(rows)
                yield rows
        storage.upload(path, output)
    finally:
        temporary.remove(scratch)


def embed_to_folder(
    embedder: Embedder, index: Index, reading: Reading, folder: str, work: Work, vector_type: VectorType
) -> Iterator[Block]:
    """Write the vectors of the parts that are not in ``folder`` yet, until there are all of them.

    Yields:
        the rows of each batch that this process computes.
    """
    scratch = temporary.folder("embed")
    try:
        for part in remaining(folder, work):
            path = scratch / work.name_of(part)
            with EmbeddingFile(path, embedder.width, vector_type, info_of(embedder)) as file:
                for rows in embed_index(embedder, index, work.samples_of(part), reading):
                    file.add(rows)
                    yield rows
            commit_part(path, folder, work, part)
            path.unlink()
    finally:
        temporary.remove(scratch)


@dataclass
class Totals:
    """Numbers of embeddings.

    Attributes:
        images: images, unreadable ones included.
        unreadable: the images that cannot be read.
    """

    images: int = 0
    unreadable: list[BadSample] = field(default_factory=list)

    def add(self, rows: Block) -> None:
        """Count rows."""
        for number, (uri, error) in enumerate(zip(rows.uris, rows.errors, strict=True)):
            if error is not None:
                self.unreadable.append(BadSample("all", self.images + number, f"{uri} {error}"))
        self.images += len(rows)

    @classmethod
    def of_folder(cls, folder: str, work: Work, width: int) -> Totals:
        """Count the rows of all parts, of which names and errors are read, not vectors.

        Raises:
            DataError: a part is damaged, or does not have one row per image.
        """
        totals = cls()
        for part in range(work.parts):
            uri = storage.join(folder, work.name_of(part))
            embeddings = Embeddings(uri)
            samples = work.samples_of(part)
            if (embeddings.rows, embeddings.width) != (len(samples), width):
                raise DataError(
                    f"{uri} holds {embeddings.rows:,} vectors of {embeddings.width} numbers, {len(samples):,} of "
                    f"{width} are needed. Delete it, and run the same command again."
                )
            for rows in embeddings.blocks(("uri", "error")):
                totals.add(rows)
        return totals


def write_summary(folder: str, embedder: Embedder, totals: Totals, parts: int, vector_type: VectorType) -> None:
    """Write what the folder holds; its file says that all parts are there."""
    write_json(
        storage.join(folder, SUMMARY_FILE),
        {
            "images": totals.images,
            "unreadable": len(totals.unreadable),
            "parts": parts,
            "model": embedder.fingerprint,
            "backbone": embedder.net.name,
            "width": embedder.width,
            "vector_type": vector_type,
            "precision": embedder.precision,
        },
    )
