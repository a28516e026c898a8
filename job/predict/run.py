"""Predictions of all images of an index, into one file or into the parts of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from job import storage
from job.data.dataset import Batch, ImageDataset, Preprocessing
from job.data.index.index import Index
from job.data.loader import BatchLoader
from job.data.sampler import FeatureBatchSampler
from job.errors import StorageError, StorageOutage
from job.predict.output import FileFormat, Row, prediction_file
from job.predict.predictor import Predictor
from job.predict.work import Work, done, remaining
from job.process import temporary


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        batch_size: images per batch.
        num_workers: number of decoding threads.
        cache_dir: local folder for copies of archives that cannot be read in parts.
    """

    batch_size: int
    num_workers: int
    cache_dir: str


def predict_index(predictor: Predictor, index: Index, samples: range, reading: Reading) -> Iterator[list[Row]]:
    """Classify images of an index, in its order.

    Args:
        predictor: the network.
        index: the images.
        samples: sample ids.
        reading: how images are read.

    Yields:
        the rows of each batch.

    Raises:
        StorageError: the images cannot be read at present.
    """
    batches = read_batches(predictor.preprocessing, index, samples, reading)
    for batch, probabilities in computed(batches, predictor.probabilities):
        yield _rows(predictor, index, batch, probabilities)


def computed(batches: Iterable[Batch], network: Callable[[Tensor], Tensor]) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with what the network makes of their images, each after the next one was begun.

    So a GPU computes a batch while the caller writes the rows of the one before it.
    """
    pending: tuple[Batch, Tensor] | None = None
    for batch in batches:
        begun = batch, network(batch["image"])
        if pending is not None:
            yield pending
        pending = begun
    if pending is not None:
        yield pending


def read_batches(preprocessing: Preprocessing, index: Index, samples: range, reading: Reading) -> Iterator[Batch]:
    """Read images of an index, in its order.

    Args:
        preprocessing: of the images.
        index: the images.
        samples: sample ids.
        reading: how images are read.

    Raises:
        StorageError: the images cannot be read at present.
    """
    sampler = FeatureBatchSampler([samples], 1, reading.batch_size)
    dataset = ImageDataset(index, sampler, preprocessing, cache_dir=reading.cache_dir)
    for batch in BatchLoader(dataset, reading.num_workers):
        if batch["error"] is not None:
            raise batch["error"]
        yield batch


def _rows(predictor: Predictor, index: Index, batch: Batch, probabilities: Tensor) -> list[Row]:
    """The rows of a batch, without its padding."""
    bad = {each.sample: each.line for each in batch["bad"]}
    samples = batch["sample"].tolist()[: batch["global_size"]]
    labels = true_labels(index, batch)
    predictions = predictor.predictions(probabilities)
    return [
        Row(uri, None, bad[sample].removeprefix(f"{uri} "), label)
        if sample in bad
        else Row(uri, prediction, None, label)
        for sample, uri, prediction, label in zip(samples, index.uris(samples), predictions, labels, strict=False)
    ]


def true_labels(index: Index, batch: Batch) -> list[str | list[str] | None]:
    """The label of each image of a batch, or a list where the data has several per image; None without one."""
    names = index.classes
    if "labels" in batch:
        return [[names[number] for number in row.nonzero().flatten().tolist()] for row in batch["labels"]]
    return [names[number] if number >= 0 else None for number in batch["label"].tolist()]


def predict_to_file(
    predictor: Predictor, index: Index, reading: Reading, output: str | None, form: FileFormat, top_k: int | None
) -> Iterator[list[Row]]:
    """Classify all images of an index; with ``output``, that file appears at the end, whole.

    Yields:
        the rows of each batch.
    """
    batches = predict_index(predictor, index, range(len(index)), reading)
    if output is None:
        yield from batches
        return
    scratch = temporary.folder("predict")
    try:
        with prediction_file(form, scratch / "predictions", predictor, top_k) as file:
            for rows in batches:
                file.add(rows)
                yield rows
        storage.upload(file.path, output)
    finally:
        temporary.remove(scratch)


def predict_to_folder(
    predictor: Predictor,
    index: Index,
    reading: Reading,
    folder: str,
    work: Work,
    form: FileFormat,
    top_k: int | None,
) -> Iterator[list[Row]]:
    """Classify the images of the parts that are not in ``folder`` yet, until there are all of them.

    Yields:
        the rows of each batch that this process computes.
    """
    scratch = temporary.folder("predict")
    try:
        for part in remaining(folder, work):
            with prediction_file(form, scratch / work.name_of(part), predictor, top_k) as file:
                for rows in predict_index(predictor, index, work.samples_of(part), reading):
                    file.add(rows)
                    yield rows
            commit_part(file.path, folder, work, part)
            file.path.unlink()
    finally:
        temporary.remove(scratch)


def commit_part(path: Path, folder: str, work: Work, part: int) -> None:
    """Upload a part; a bucket that lets nobody replace it has the same rows from another process."""
    try:
        storage.upload(path, storage.join(folder, work.name_of(part)))
    except StorageOutage:
        raise
    except StorageError:
        if part not in done(folder, work):
            raise
