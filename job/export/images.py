"""Images that an export is checked on: of the run, of ``--data``, or generated ones."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from job import storage
from job.data.dataset import ImageDataset, Preprocessing
from job.data.decode import decode
from job.data.fetch import Fetcher
from job.data.index.access import Access, from_options, is_local_uri
from job.data.index.build import build, split
from job.data.index.file import load_index_info
from job.data.index.index import Index
from job.data.index.local_copy import materialise
from job.data.index.sources import INDEX_FILE
from job.data.index.store import local_index
from job.data.loader import BatchLoader
from job.data.sampler import SelectedBatchSampler
from job.errors import DataError, JobError
from job.export.manifest import ModelDescription
from job.process.cpus import available_cpus

log = logging.getLogger(__name__)

Origin = Literal["run", "data", "generated"]

COMPARED = 32
"""Images on which the outputs of each format are compared with the checkpoint's."""
WHOLE = 16
"""Whole image files among them."""
MOST_BYTES = 512 << 20
"""Memory for the resized images of one part."""
BATCH_SIZE = 32
VAL_FRACTION = 0.2
INDEX_FOLDER = "index"


@dataclass(frozen=True)
class ImageSet:
    """Resized images of one part.

    Attributes:
        pixels: uint8 [N, 3, S, S].
        targets: multi-hot labels, uint8 [N, C]; a row of zeros where there is none.
        has_labels: the data's classes are the network's.
    """

    pixels: Tensor
    targets: npt.NDArray[np.uint8]
    has_labels: bool


@dataclass(frozen=True)
class CheckImages:
    """The images of an export.

    Attributes:
        origin: of the run, from ``--data``, or generated where neither can be read.
        train: training images, for the calibration of int8; None where there are none.
        val: validation images; None where there are none.
        files: image files of the validation, which can be decoded.
    """

    origin: Origin
    train: ImageSet | None
    val: ImageSet | None
    files: list[bytes]

    def compared(self, image_size: int) -> Tensor:
        """Resized images on which outputs are compared, uint8 [B, 3, S, S]."""
        if self.val is not None:
            return self.val.pixels[:COMPARED]
        return generated(COMPARED // 4, image_size)


def generated(count: int, image_size: int) -> Tensor:
    """Smooth random images with some noise, uint8 [count, 3, S, S]; always the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 255
    smooth = F.interpolate(coarse, size=(image_size, image_size), mode="bicubic")
    noise = torch.randn(count, 3, image_size, image_size, generator=generator) * 12
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def find_images(run_dir: str | None, data: str | None, model: ModelDescription, most: int, cache: Path) -> CheckImages:
    """Read images of the run, or of ``data`` where that is given; generated ones stand in for a run's.

    Args:
        run_dir: folder of the run; None where it is unknown.
        data: URI of a data set in the layout of training.
        model: preprocessing and classes.
        most: images to read of each part.
        cache: local folder for copies of archives.

    Raises:
        JobError: ``data`` cannot be read.
    """
    if data is not None:
        with tempfile.TemporaryDirectory(prefix="job-index-") as folder:
            access = from_options(None, [data], "--data")
            build({"root": [data]}, Path(folder), str(cache), "parts", access=access)
            if "val" not in load_index_info(folder).parts:
                split(Path(folder), VAL_FRACTION, seed=0)
            return _read("data", Path(folder), access, model, most, cache)
    try:
        if run_dir is not None:
            index, access = _run_index(run_dir, cache)
            return _read("run", index, access, model, most, cache)
        reason = "the checkpoint is in no run_dir"
    except JobError as error:
        reason = str(error)
    log.warning("the run's images cannot be read, and generated ones are used: %s. Give images by --data", reason)
    return CheckImages("generated", None, None, [])


def _run_index(run_dir: str, cache: Path) -> tuple[Path, Access]:
    """The index that a fit left in run_dir; its sources may be local where run_dir is."""
    folder = storage.join(run_dir, INDEX_FOLDER)
    keys = [entry.key for entry in storage.list_files(folder) if entry.key.endswith(f"/{INDEX_FILE}")]
    if len(keys) != 1:
        raise DataError(f"{folder} has {len(keys)} indexes, not one")
    uri = storage.join(folder, keys[0].removesuffix(f"/{INDEX_FILE}"))
    local = local_index(uri, cache)
    access = from_options(None, [run_dir], "--data")
    access.require_sources([source.uri for source in load_index_info(local).sources], uri, local=is_local_uri(run_dir))
    return local, access


def _read(origin: Origin, folder: Path, access: Access, model: ModelDescription, most: int, cache: Path) -> CheckImages:
    info = load_index_info(folder)
    for source in info.sources:
        materialise(source, str(cache), access)
    parts = {name: Index(folder, name, access) for name in ("train", "val") if name in info.parts}
    sets = {name: _image_set(index, model, most, cache) for name, index in parts.items() if len(index)}
    files = _files(parts["val"], cache) if "val" in sets else []
    return CheckImages(origin, sets.get("train"), sets.get("val"), files)


def _image_set(index: Index, model: ModelDescription, most: int, cache: Path) -> ImageSet:
    """Evenly spread samples of a part; unreadable ones are left out.

    Raises:
        DataError: none of them can be read.
        StorageError: the storage does not answer.
    """
    size = model.image_size
    count = max(min(most, len(index), MOST_BYTES // (3 * size * size)), 1)
    samples = np.linspace(0, len(index) - 1, count).astype(np.int64)
    dataset = ImageDataset(
        index, SelectedBatchSampler(samples, BATCH_SIZE), Preprocessing(size, model.resize), cache_dir=str(cache)
    )
    pixels, readable = [], []
    for batch in BatchLoader(dataset, available_cpus()):
        if batch["error"] is not None:
            raise batch["error"]
        mask = batch["mask"]
        pixels.append(batch["image"][mask])
        readable.append(batch["sample"][mask].numpy())
    chosen = np.concatenate(readable)
    if not len(chosen):
        raise DataError(f"none of {count} images of {index.root} can be read")
    same_classes = list(index.classes) == model.classes
    targets = np.zeros((len(chosen), len(model.classes)), np.uint8)
    if same_classes and index.has_several_labels:
        targets = index.multi_hot_of(chosen)
    elif same_classes:
        labels = index.labels_of(chosen)
        targets[np.flatnonzero(labels >= 0), labels[labels >= 0]] = 1
    return ImageSet(torch.cat(pixels), targets, same_classes)


def _files(index: Index, cache: Path) -> list[bytes]:
    samples = np.unique(np.linspace(0, len(index) - 1, WHOLE).astype(np.int64))
    fetcher, files = Fetcher(index, str(cache)), []
    for fetched in fetcher.start(samples).result():
        try:
            content = fetcher.content(fetched)
            decode(content)
        except DataError:
            continue
        files.append(content)
    return files
