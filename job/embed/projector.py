"""Embedded images in TensorBoard's projector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from job import storage
from job.data.augment import resize
from job.data.dataset import ImageDataset
from job.data.index.index import Index
from job.data.loader import BatchLoader
from job.data.sampler import SelectedBatchSampler
from job.embed.embedder import Embedder
from job.monitoring.drawing.class_labels import class_labels, shortened
from job.monitoring.drawing.image_grid import join_labels
from job.monitoring.tensorboard.projector import (
    CONFIG,
    KEY_LENGTH,
    SPRITE_SIZE,
    configuration,
    spread_samples,
    sprite_sheet,
    vectors,
)
from job.predict.run import Reading

FILES = ("projector-vectors.tsv", "projector-labels.tsv", "projector-sprites.jpg")


def write_projector(embedder: Embedder, index: Index, reading: Reading, folder: str, most: int) -> int:
    """Write the files of the projector for images that are evenly spread over an index.

    Args:
        embedder: the backbone.
        index: the images.
        reading: how images are read.
        folder: of the files; TensorBoard's ``--logdir``.
        most: images to show, at most.

    Returns:
        the number of images; below 2 there are no files.

    Raises:
        StorageError: the images cannot be read at present.
    """
    sampler = SelectedBatchSampler(spread_samples(len(index), most), reading.batch_size)
    dataset = ImageDataset(index, sampler, embedder.preprocessing, cache_dir=reading.cache_dir)
    samples: list[int] = []
    features: list[Tensor] = []
    sprites: list[Tensor] = []
    for batch in BatchLoader(dataset, reading.num_workers):
        if batch["error"] is not None:
            raise batch["error"]
        readable, images = batch["mask"], batch["image"]
        samples += batch["sample"][readable].tolist()
        features.append(torch.from_numpy(embedder.vectors(embedder.features(images).cpu()[readable])))
        sprites += [resize(image, SPRITE_SIZE, "squash") for image in images[readable]]
    if len(samples) < 2:
        return len(samples)
    contents = [vectors(torch.cat(features)), _label_table(index, samples), sprite_sheet(torch.stack(sprites))]
    for name, content in {**dict(zip(FILES, contents, strict=True)), CONFIG: configuration(*FILES)}.items():
        storage.write_bytes(storage.join(folder, name), content)
    return len(samples)


def _label_table(index: Index, samples: list[int]) -> bytes:
    """Class and name of each sample, as tab-separated values with a header."""
    names = (*class_labels(index.classes), "")  # the last for -1, no label
    if index.has_several_labels:
        rows = [
            join_labels([names[number] for number in row.nonzero()[0].tolist()])
            for row in index.multi_hot_of(np.array(samples))
        ]
    else:
        rows = [names[number] for number in index.labels_of(np.array(samples)).tolist()]
    keys = [shortened(row.key, KEY_LENGTH) for row in index.rows(samples)]
    lines = ["\t".join(cells) for cells in zip(rows, keys, strict=True)]
    return "\n".join(["class\tfile", *lines, ""]).encode()
