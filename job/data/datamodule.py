"""The data of a run, as a LightningDataModule."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytorch_lightning as pl
import torch
from torchvision.transforms import v2

from job import storage
from job.cluster import ranks
from job.data.dataset import Batch, ImageDataset, ResizeMode, resize_transform
from job.data.index import Index, find_parts, index_class_folders, require_same_classes, split
from job.data.loader import BatchLoader
from job.data.order import BatchOrder
from job.data.source import default_cache_dir, materialise
from job.errors import ConfigError, DataError, StorageError

log = logging.getLogger(__name__)


class ImageDataModule(pl.LightningDataModule):
    """Labelled images from any fsspec URI.

    Give ``root``, or ``train`` (and ``val``, ``test``). Each is a folder or bucket prefix of class
    folders, or a .zip, .tar or .tar.gz of one.

    Args:
        root: URI that holds train/ and validation/ or val/ (and test/), or class folders directly.
        train: URI of the training images.
        val: URI of the validation images. Without any, ``val_fraction`` of train is held out.
        test: URI of the test images.
        val_fraction: share of each class held out for validation when there is no validation part.
        global_batch_size: samples a training step, over all processes.
        image_size: height and width of the model's input, in pixels.
        resize: "squash" to the square, or "crop" its centre, for evaluation and prediction (and
            training, unless ``augment`` is given).
        augment: torchvision.transforms.v2 transform of a uint8 [3, H, W] training image, ending at
            [3, image_size, image_size]. Default: ``resize``, then a random horizontal flip.
        num_workers: loader processes a rank; default: one a CPU core, shared by the node's ranks.
        cache_dir: local folder where archives are unpacked. Default: ~/.cache/job.
        max_bad_samples: unreadable images to tolerate; past it the run ends. Tolerated ones are named
            in the log and left out of loss and metrics.
        seed: seed of order, augmentation and split; follows --seed_everything.
    """

    def __init__(
        self,
        root: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        val_fraction: float = 0.2,
        global_batch_size: int = 32,
        image_size: int = 224,
        resize: ResizeMode = "squash",
        augment: v2.Transform | None = None,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        max_bad_samples: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (root is None) == (train is None):
            raise ConfigError("give either --data.root, or --data.train with --data.val: where are the images?")
        if root is not None and (val or test):
            raise ConfigError("--data.root already says where validation and test images are; give --data.train too.")
        for name, value, low, high in (
            ("val_fraction", val_fraction, 0.0, 1.0),
            ("global_batch_size", global_batch_size, 0, None),
            ("image_size", image_size, 0, None),
        ):
            if value <= low or (high is not None and value >= high):
                raise ConfigError(f"--data.{name} must be above {low}{f' and below {high}' if high else ''}: {value}.")
        self.uris = {"root": root} if root is not None else {"train": train, "val": val, "test": test}
        self.val_fraction = val_fraction
        self.global_batch_size = global_batch_size
        self.image_size = image_size
        self.resize: ResizeMode = resize
        self.augment = augment
        self.num_workers = num_workers
        self.cache_dir = cache_dir or default_cache_dir()
        self.max_bad_samples = max_bad_samples
        self.seed = seed
        self.parts: dict[str, Index] = {}
        self.bad_samples: set[str] = set()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted; known after :meth:`setup`."""
        return self.parts["train"].classes

    def prepare_data(self) -> None:
        """Fetch and unpack archives, once a node (Lightning calls this on local rank 0)."""
        for uri in self.uris.values():
            if uri is not None:
                materialise(uri, self.cache_dir)

    def setup(self, stage: str) -> None:
        """List the data on rank 0 and give the index, or the error, to every rank."""
        self._check_batch_size()
        if self.parts:
            return
        # All ranks train on one listing, even while somebody is uploading.
        self.parts = ranks.from_rank_zero(self._find_parts)
        sizes = ", ".join(f"{part} {len(index):,}" for part, index in self.parts.items())
        log.info("%d classes; images: %s", len(self.classes), sizes)

    def fingerprint(self) -> dict[str, Any]:
        """What a run that resumes must have in common with this one, by name."""
        return {
            "data.train": self.parts["train"].fingerprint(),
            "data.global_batch_size": self.global_batch_size,
            "seed_everything": self.seed,
        }

    def train_dataloader(self) -> BatchLoader:
        """Every training sample once an epoch, in the order of (seed, epoch)."""
        default = v2.Compose([resize_transform(self.image_size, self.resize), v2.RandomHorizontalFlip()])
        return self._loader("train", self.augment or default, shuffle=True)

    def val_dataloader(self) -> BatchLoader:
        """Every validation sample once."""
        return self._loader("val", resize_transform(self.image_size, self.resize), shuffle=False)

    def test_dataloader(self) -> BatchLoader:
        """Every test sample once.

        Raises:
            DataError: the data has no test part.
        """
        if "test" not in self.parts:
            raise DataError("there is no test part: give --data.test, or a --data.root with a test/ folder.")
        return self._loader("test", resize_transform(self.image_size, self.resize), shuffle=False)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Raise what a loader process reported, and hold unreadable samples against the limit."""
        if batch["error"]:
            raise StorageError(batch["error"])
        for problem in batch["bad"]:
            if problem not in self.bad_samples:
                log.warning("bad sample: %s", problem)
            self.bad_samples.add(problem)
        require_few_bad(self.bad_samples, self.max_bad_samples)
        return batch

    def share_bad_samples(self) -> None:
        """Tell all ranks which samples any of them could not read, at the end of an epoch."""
        self.bad_samples = ranks.union(self.bad_samples)
        require_few_bad(self.bad_samples, self.max_bad_samples)

    def _find_parts(self) -> dict[str, Index]:
        local = {name: materialise(uri, self.cache_dir) for name, uri in self.uris.items() if uri is not None}
        parts = find_parts(local["root"]) if "root" in local else {n: index_class_folders(u) for n, u in local.items()}
        if "val" not in parts:
            parts["train"], parts["val"] = split(parts["train"], self.val_fraction, self.seed)
        for name in parts.keys() - {"train"}:
            require_same_classes(parts["train"], parts[name])
        return parts

    def _loader(self, part: str, transform: torch.nn.Module, *, shuffle: bool) -> BatchLoader:
        index = self.parts[part]
        order = BatchOrder(
            len(index),
            self.global_batch_size,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            seed=self.seed,
            shuffle=shuffle,
        )
        if self.trainer is not None:
            # Lightning names the epoch only after loader processes have begun to fetch.
            order.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        dataset = ImageDataset(index, transform, image_size=self.image_size, seed=self.seed)
        return BatchLoader(dataset, order, self._workers(index))

    def _workers(self, index: Index) -> int:
        if storage.is_process_local(index.root):
            return 0  # another process would find an empty filesystem
        if self.num_workers is not None:
            return self.num_workers
        return max(len(os.sched_getaffinity(0)) // ranks.local_world_size(), 1)

    def _check_batch_size(self) -> None:
        world_size = ranks.world_size()
        if self.global_batch_size % world_size:
            below = self.global_batch_size - self.global_batch_size % world_size
            nearest = " or ".join(str(n) for n in (below, below + world_size) if n)
            raise ConfigError(
                f"--data.global_batch_size {self.global_batch_size} does not divide over {world_size} processes. "
                f"Choose {nearest}."
            )


def require_few_bad(bad: set[str], limit: int) -> None:
    """Raise :class:`~job.errors.DataError` when more than ``limit`` samples could not be read."""
    if len(bad) > limit:
        shown = "\n  ".join(sorted(bad)[:10])
        raise DataError(
            f"{len(bad)} unreadable image(s), {limit} allowed:\n  {shown}\n"
            "Repair or remove them, or allow some by --data.max_bad_samples."
        )
