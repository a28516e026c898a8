"""Search for the most similar images in files of embeddings, by the cosine of their vectors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job import redact, storage
from job.data.index.bounded import LARGEST_MEMBER
from job.embed.embedder import Embedder
from job.embed.file import Block, Embeddings
from job.errors import ConfigError, DataError
from job.predict.work import done, read

log = logging.getLogger(__name__)

PARQUET = ".parquet"


@dataclass(frozen=True)
class Neighbour:
    """A similar image.

    Attributes:
        similarity: cosine of the vectors, from -1 to 1.
        uri: of the image.
        labels: its class names; empty where the data has none.
    """

    similarity: float
    uri: str
    labels: tuple[str, ...]


def embedding_files(output: str, embedder: Embedder) -> list[Embeddings]:
    """The files of an output of ``embed``; the embedder takes their precision.

    Args:
        output: URI of a Parquet file, or of a folder of parts.
        embedder: the backbone that they must be of.

    Raises:
        ConfigError: there are no embeddings, not all of them, or those of another backbone.
        DataError: a file is damaged.
    """
    files = [Embeddings(uri) for uri in _uris(output)]
    for file in files:
        if file.info is None:
            log.warning("%s does not say by which backbone it was computed", file.uri)
        elif file.info.model != embedder.fingerprint:
            raise ConfigError(
                f"{file.uri} was computed by another backbone ({file.info.backbone}, {file.info.model}), not by this "
                f"one ({embedder.net.name}, {embedder.fingerprint}). Give its run, or another --output."
            )
        elif file.info.precision in ("bf16", "fp32"):
            embedder.precision = "bf16" if file.info.precision == "bf16" else "fp32"
    return files


def query_vector(embedder: Embedder, uri: str) -> npt.NDArray[np.float32]:
    """The vector of one image, float32 [F].

    Raises:
        DataError: it is no readable image.
        StorageError: it cannot be read.
    """
    try:
        pixels = embedder.preprocessing.decoded(storage.read_bounded(uri, LARGEST_MEMBER))
    except DataError as error:
        raise DataError(f"--query {redact.identity(uri)} {error}.") from error
    vector: npt.NDArray[np.float32] = embedder.vectors(embedder.features(pixels[None]))[0]
    return vector


def _uris(output: str) -> Iterator[str]:
    if output.lower().endswith(PARQUET):
        if not storage.exists(output):
            raise ConfigError(
                f"--output {output} does not exist: there are no embeddings to search. Give --input, too."
            )
        yield output
        return
    work = read(output, "embeddings")
    if work is None:
        raise ConfigError(f"--output {output} holds no embeddings to search. Give --input, too, or another --output.")
    if missing := work.parts - len(done(output, work)):
        raise ConfigError(
            f"--output {output} lacks {missing:,} of {work.parts:,} parts. Run the command that writes them again."
        )
    for part in range(work.parts):
        yield storage.join(output, work.name_of(part))


def nearest(queries: npt.NDArray[np.float32], files: Iterable[Embeddings], k: int) -> list[list[Neighbour]]:
    """The ``k`` most similar images of each query, the most similar first.

    Memory holds some thousand vectors at a time, whatever the number of images.

    Args:
        queries: float32 [Q, F].
        files: whose vectors are searched.
        k: number of images.

    Raises:
        DataError: vectors have another length.
    """
    queries = _normalised(queries)
    best: list[list[Neighbour]] = [[] for _ in queries]
    for file in files:
        if file.width != queries.shape[1]:
            raise DataError(
                f"{file.uri} holds vectors of {file.width} numbers, and those of the query have {queries.shape[1]}: "
                "they were computed by another backbone."
            )
        for block in file.blocks():
            similarities = queries @ _normalised(block.vectors).T
            similarities[:, ~block.valid] = -np.inf
            for neighbours, values in zip(best, similarities, strict=True):
                neighbours[:] = _merged(neighbours, block, values, k)
    return best


def _merged(neighbours: Sequence[Neighbour], block: Block, values: npt.NDArray[np.float32], k: int) -> list[Neighbour]:
    worst = neighbours[-1].similarity if len(neighbours) == k else -np.inf
    rows = np.argpartition(-values, k - 1)[:k] if k < len(values) else np.arange(len(values))
    found = [
        Neighbour(float(np.clip(values[row], -1, 1)), block.uris[row], _labels(block.labels[row]))
        for row in rows.tolist()
        if values[row] > worst and np.isfinite(values[row])
    ]
    return sorted([*neighbours, *found], key=lambda each: (-each.similarity, each.uri))[:k]


def _labels(label: str | list[str] | None) -> tuple[str, ...]:
    if label is None:
        return ()
    return (label,) if isinstance(label, str) else tuple(label)


def _normalised(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Vectors of length 1; those of length 0 stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: npt.NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return result
