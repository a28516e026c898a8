"""LightningDataModule of a run's images."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor
from torchvision.transforms import v2

from job import redact, storage
from job.cluster import ranks
from job.cluster.shared_work import Helpers, from_rank_zero
from job.data.augment import ResizeMode
from job.data.bad_samples import BadSample, BadSampleLimit, BadSamples
from job.data.cache import SampleCache
from job.data.dataset import Batch, ImageDataset, Preprocessing
from job.data.index.access import from_options
from job.data.index.build import build, split
from job.data.index.file import load_index_info
from job.data.index.index import Index
from job.data.index.left_out import LeftOutKind
from job.data.index.local_copy import materialise
from job.data.index.parallel import help_to_list
from job.data.index.parts import Layout
from job.data.index.sources.base import TimeLimit
from job.data.index.sources.columns import from_option as columns_from_option
from job.data.index.store import is_run_index_usable, local_index, publish_index
from job.data.loader import BatchLoader
from job.data.pixels import MAX_IMAGE_PIXELS
from job.data.sampler import BalancedBatchSampler, FeatureBatchSampler, ResumableBatchSampler, SelectedBatchSampler
from job.errors import ConfigError, DataError
from job.features.store import FeatureStore
from job.lightning_internals import epochs_processed
from job.process.cpus import available_cpus
from job.resilience.lease_check import write_check
from job.storage.local_cache import default_cache_dir, report_disk_full, usable_cache_dir

log = logging.getLogger(__name__)


class ImageDataModule(pl.LightningDataModule):
    """Labelled images from any fsspec URI.

    Give ``root``, or ``train`` (and ``val``, ``test``). Each is one of these, or a list of them:
    a folder or bucket prefix of class folders; a .zip or .tar of one, compressed or not; tar shards in the
    WebDataset convention (``NAME-{000..146}.tar``, labels in .cls or .json); TFRecord files; a table (.csv,
    .jsonl or .parquet) that names the images and their labels; the index.json that ``job index`` wrote.

    Args:
        root: URI that holds train/ and validation/ or val/ (and test/), or class folders directly.
        train: URI of the training images.
        val: URI of the validation images. Without any, ``val_fraction`` of train is held out.
        test: URI of the test images.
        val_fraction: share of each class held out for validation when there is no validation part.
        sampling: "shuffle": each image once per epoch; "balanced": as many images per epoch, but each class equally
            often, so that images of rare classes come several times. An image with several labels counts as its rarest.
        global_batch_size: samples per training step, over all processes.
        image_size: height and width of the model's input, in pixels; "auto", on the command line, is that of the
            pretrained weights.
        resize: "squash" to the square, or "crop" its centre, for evaluation and prediction (and
            training, unless ``augment`` is given).
        augment: torchvision.transforms.v2 transform of a uint8 [3, H, W] training image, ending at
            [3, image_size, image_size]. Default: ``resize``, then a random horizontal flip.
        augment_views: number of augmented variants per image, of which each epoch uses one, so that backbone
            features can be cached. Default: unlimited, a new variant in each epoch.
        num_workers: decoding threads per rank, or processes if ``augment`` is given. More than four threads are
            divided among processes. Default: one per CPU core, divided among the ranks of the node.
        cache_dir: local folder of the node's cache. Default: ~/.cache/job.
        cache_gb: size of the cache of samples from buckets, in 10^9 bytes; the least recently used are deleted
            first. 0 disables it.
        max_bad_samples: unreadable images to tolerate; with more, the run ends. They are logged and left out of
            loss and metrics. A number over all parts, or a share of each part's images ("0.5%").
        max_image_pixels: height times width of the largest image; a larger one is unreadable. Default: 178956970, as
            in Pillow.
        allow: hosts (HOST or HOST:PORT) and URI prefixes, or a list of them, that a table or a saved index may
            name besides object stores and public web servers. A table in a bucket or on the web may name no
            local files otherwise, and none may name link-local, loopback or metadata addresses.
        columns: names of a table's columns, as uri=NAME,label=NAME,split=NAME (any of them). Default: the usual
            names; see docs/data.md.
        seed: seed of order, augmentation and split; follows --seed_everything.
    """

    def __init__(
        self,
        root: str | list[str] | None = None,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        val_fraction: float = 0.2,
        sampling: Literal["shuffle", "balanced"] = "shuffle",
        global_batch_size: int = 32,
        image_size: int | Literal["auto"] = 224,
        resize: ResizeMode = "squash",
        augment: v2.Transform | None = None,
        augment_views: int | None = None,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        cache_gb: float = 10.0,
        max_bad_samples: int | str = 0,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        allow: str | list[str] | None = None,
        columns: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (root is None) == (train is None):
            raise ConfigError("give either --data.root or --data.train, and not both, to locate the images.")
        if root is not None and (val or test):
            raise ConfigError("--data.root already says where validation and test images are; give --data.train too.")
        if image_size == "auto":
            raise ConfigError("image_size=auto: give the number that job.model.image_size.own_image_size returns.")
        for name, value, low, high in (
            ("val_fraction", val_fraction, 0.0, 1.0),
            ("global_batch_size", global_batch_size, 0, None),
            ("image_size", image_size, 0, None),
            ("max_image_pixels", max_image_pixels, 0, None),
        ):
            if value <= low or (high is not None and value >= high):
                raise ConfigError(f"--data.{name} must be above {low}{f' and below {high}' if high else ''}: {value}.")
        if augment_views is not None and (augment is None or augment_views < 1):
            raise ConfigError("--data.augment_views must be at least 1, and needs --data.augment.")
        if cache_gb < 0:
            raise ConfigError(f"--data.cache_gb must be at least 0 (0 disables the cache), not {cache_gb}.")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"--data.num_workers must be at least 0, not {num_workers}.")
        uris_by_part = {"root": root} if root is not None else {"train": train, "val": val, "test": test}
        listed = {name: [uris] if isinstance(uris, str) else uris for name, uris in uris_by_part.items() if uris}
        if not {"root", "train"} & listed.keys():
            raise ConfigError(f"--data.{next(iter(uris_by_part))} is empty: give a path or URI of the images.")
        # Credentials are no part of what names the data: indexes and caches outlive them.
        self.uris = {name: [redact.remember(uri) for uri in uris] for name, uris in listed.items()}
        self.val_fraction = val_fraction
        self.global_batch_size = global_batch_size
        self.image_size = image_size
        self.resize: ResizeMode = resize
        self.sampling = sampling
        self.augment = augment
        self.augment_views = augment_views
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir or default_cache_dir()).expanduser()
        self.cache_bytes = int(cache_gb * 1e9)
        option = "--data.max_bad_samples"
        self.bad_samples = BadSamples(BadSampleLimit.parse(max_bad_samples, option), option)
        self.max_image_pixels = max_image_pixels
        self.access = from_options(allow, [uri for uris in self.uris.values() for uri in uris])
        self.columns = columns_from_option(columns)
        self.seed = seed
        self.parts: dict[str, Index] = {}
        self.absent_parts: dict[str, str] = {}
        self.left_out: list[LeftOutKind] = []
        self.is_cache_usable = True
        self.cache: SampleCache | None = None
        self.features: dict[str, FeatureStore] = {}
        self._loaders: WeakSet[BatchLoader] = WeakSet()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted; known after :meth:`setup`."""
        return self.parts["train"].classes

    def setup(self, stage: str) -> None:
        """Index the data on rank 0, or load the index from run_dir, and broadcast it, or the error, to all ranks."""
        self._check_batch_size()
        if self.parts:
            return
        wanted_dir, self.cache_dir = self.cache_dir, usable_cache_dir(self.cache_dir)
        self.is_cache_usable = wanted_dir == self.cache_dir
        # All ranks train on one listing, even while somebody is uploading.
        uri = from_rank_zero(self._find_index, partial(help_to_list, cache_dir=str(self.cache_dir)))
        self.open_index(local_index(uri, self.cache_dir))
        self._open_cache()

    def teardown(self, stage: str | None = None) -> None:
        """Close the loaders, and finish writing the cache of samples."""
        for loader in self._loaders:
            loader.close()
        if self.cache is not None:
            self.cache.flush()

    def on_exception(self, exception: BaseException) -> None:
        """End what is read ahead: after an error or a signal Lightning does not call :meth:`teardown`."""
        for loader in self._loaders:
            loader.end_reading_ahead()

    def open_index(self, folder: Path) -> None:
        """Take the parts from the index in a local folder."""
        info = load_index_info(folder)
        self.parts = {part: Index(folder, part, self.access) for part in info.parts}
        self.absent_parts = info.absent
        self.left_out = info.left_out
        for source in info.sources:
            materialise(source, str(self.cache_dir), self.access)
        sizes = ", ".join(f"{part} {len(index):,}" for part, index in self.parts.items())
        log.info("%d classes; images: %s", len(self.classes), sizes)

    def fingerprint(self) -> dict[str, Any]:
        """Values that must be equal when a run resumes, by name."""
        train = self.parts["train"].fingerprint()
        return {
            # Checkpoints of earlier versions have no entry for the sampling.
            "data.train": train if self.sampling == "shuffle" else f"{train}, {self.sampling} sampling",
            "data.global_batch_size": self.global_batch_size,
            "seed_everything": self.seed,
        }

    def train_dataloader(self) -> BatchLoader:
        """The training samples of an epoch, in an order that follows from (seed, epoch)."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> BatchLoader:
        """Every validation sample once."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> BatchLoader:
        """Every test sample once.

        Raises:
            DataError: the data has no test part.
        """
        if "test" not in self.parts:
            reason = f" ({self.absent_parts['test']})" if "test" in self.absent_parts else ""
            raise DataError(f"there is no test part{reason}: give --data.test, or a --data.root with a test/ folder.")
        return self._loader("test", shuffle=False)

    def variant_loader(self, part: str, chunks: Sequence[range], batch_size: int) -> BatchLoader:
        """Every variant of the samples in ``chunks``, in the batches of a FeatureBatchSampler."""
        variants = self.preprocessing(part).variants
        assert variants is not None, "the number of variants is unlimited"
        dataset = self.dataset(part, FeatureBatchSampler(chunks, variants, batch_size))
        return BatchLoader(dataset, self._workers(dataset.index))

    def selected_loader(self, part: str, samples: npt.NDArray[np.int64], batch_size: int) -> BatchLoader:
        """Images of some samples, int64 [N], in the given order."""
        dataset = self.dataset(part, SelectedBatchSampler(samples, batch_size))
        return BatchLoader(dataset, self._workers(dataset.index))

    def preprocessing(self, part: str) -> Preprocessing:
        """Preprocessing of a part's images; those of the training part are augmented."""
        if part == "train":
            return Preprocessing(
                self.image_size,
                self.resize,
                self.augment,
                self.augment_views,
                flip=True,
                max_image_pixels=self.max_image_pixels,
            )
        return Preprocessing(self.image_size, self.resize, max_image_pixels=self.max_image_pixels)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Raise the error of a loader, and count unreadable samples."""
        if batch["error"] is not None:
            raise batch["error"]
        self.report_bad(batch["bad"])
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the tensors, without Lightning's recursive search through each value."""
        for name, value in batch.items():
            if isinstance(value, Tensor):
                batch[name] = value.to(device, non_blocking=device.type == "cuda")  # type: ignore[literal-required]
        return batch

    def report_bad(self, samples: Iterable[BadSample]) -> None:
        """Count unreadable samples.

        Raises:
            DataError: there are too many.
        """
        self.bad_samples.add(samples, self._sizes())

    def share_bad_samples(self) -> None:
        """Union of the unreadable samples of all ranks, at the end of an epoch."""
        self.bad_samples.share(self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {part: len(index) for part, index in self.parts.items()}

    def _find_index(self, helpers: Helpers | None) -> str:
        """URI of the index's folder: that of an earlier attempt in run_dir, or a new one."""
        run_dir = self._run_dir()
        if (usable := self.usable_index(run_dir)) is not None:
            return usable
        uri = self.index_uri(run_dir)
        with report_disk_full(self.cache_dir, "make the index"):
            scratch = tempfile.TemporaryDirectory(prefix=".index-", dir=self.cache_dir)
        with scratch as folder:
            self.make_index(Path(folder), helpers=helpers)
            publish_index(Path(folder), uri, write_check(self.trainer))
        return uri

    def usable_index(self, run_dir: str) -> str | None:
        """URI of the index that an earlier attempt left in run_dir; None if there is none of this data as it is."""
        uri, roots = self.index_uri(run_dir), [root for roots in self.uris.values() for root in roots]
        return uri if is_run_index_usable(uri, self.cache_dir, self._request(), roots, self.access) else None

    def make_index(self, folder: Path, time_limit: TimeLimit | None = None, helpers: Helpers | None = None) -> None:
        """List the data, and write their index into a local folder.

        Args:
            folder: of the index.
            time_limit: ends the listing early, so that the index lacks images; default: none.
            helpers: other ranks that list archives, too.

        Raises:
            DataError: the layout of the data is not understood.
            StorageError: something cannot be listed or written.
        """
        layout: Layout = "parts" if "root" in self.uris else "classes"
        info = build(
            self.uris,
            folder,
            str(self.cache_dir),
            layout,
            request=self._request(),
            access=self.access,
            columns=self.columns,
            time_limit=time_limit,
            helpers=helpers,
        )
        if "val" not in info.parts:
            split(folder, self.val_fraction, self.seed)

    def _request(self) -> dict[str, Any]:
        """The options that an index depends on."""
        request: dict[str, Any] = {"uris": self.uris, "val_fraction": self.val_fraction, "seed": self.seed}
        if str(self.columns):
            request["columns"] = str(self.columns)
        return request

    def index_uri(self, run_dir: str) -> str:
        """Where the index of this data is in run_dir, once a run has made it."""
        name = hashlib.sha256(json.dumps(self._request()).encode()).hexdigest()[:16]
        return storage.join(run_dir, "index", name)

    def _run_dir(self) -> str:
        if self.trainer is not None:
            return self.trainer.default_root_dir
        self._own_folder = tempfile.TemporaryDirectory()  # for use without a Trainer
        return self._own_folder.name

    def _open_cache(self) -> None:
        stores = {uri for index in self.parts.values() for uri in index.stores}
        self.cache = None
        if self.cache_bytes and self.is_cache_usable and not all(map(_is_on_this_machine, stores)):
            self.cache = SampleCache(self.cache_dir / "samples", self.cache_bytes)
            if ranks.local_rank() == 0:
                try:
                    self.cache.recount()
                except OSError as error:
                    self.cache.give_up(error)

    def dataset(self, part: str, sampler: ResumableBatchSampler) -> ImageDataset:
        """The dataset of a part, with the batches of ``sampler``."""
        return ImageDataset(
            self.parts[part],
            sampler,
            self.preprocessing(part),
            seed=self.seed,
            cache_dir=str(self.cache_dir),
            cache=self.cache,
        )

    def _loader(self, part: str, *, shuffle: bool) -> BatchLoader:
        index = self.parts[part]
        sampler: ResumableBatchSampler
        if shuffle and self.sampling == "balanced":
            sampler = BalancedBatchSampler(
                len(index),
                self.global_batch_size,
                classes=index.rarest_labels,
                rank=ranks.rank(),
                world_size=ranks.world_size(),
                seed=self.seed,
            )
        else:
            sampler = ResumableBatchSampler(
                len(index),
                self.global_batch_size,
                rank=ranks.rank(),
                world_size=ranks.world_size(),
                seed=self.seed,
                shuffle=shuffle,
                # A batch keeps at least eight places of the data set, however small it is.
                run_length=max(min(index.info.run_length, self.global_batch_size // 8), 1),
            )
        if self.trainer is not None:
            # Lightning names the epoch only after loader processes have begun to fetch.
            sampler.set_epoch(epochs_processed(self.trainer))
        follows = self._trains_in if part == "train" else lambda epoch: False
        dataset = self.dataset(part, sampler)
        loader = BatchLoader(dataset, self._workers(index), lambda: self.features.get(part), follows)
        self._loaders.add(loader)
        return loader

    def _trains_in(self, epoch: int) -> bool:
        """Whether the Trainer has an epoch of this number."""
        most = None if self.trainer is None else self.trainer.max_epochs
        return most is not None and (most < 0 or epoch < most)

    def _workers(self, index: Index) -> int:
        if any(map(storage.is_process_local, index.stores)):
            return 0  # another process would find an empty filesystem
        if self.num_workers is not None:
            return self.num_workers
        return max(available_cpus() // ranks.local_world_size(), 1)

    def _check_batch_size(self) -> None:
        world_size = ranks.world_size()
        if self.global_batch_size % world_size:
            below = self.global_batch_size - self.global_batch_size % world_size
            nearest = " or ".join(str(n) for n in (below, below + world_size) if n)
            raise ConfigError(
                f"--data.global_batch_size {self.global_batch_size} does not divide over {world_size} processes. "
                f"Choose {nearest}."
            )


def image_data(trainer: pl.Trainer) -> ImageDataModule:
    """The data module of a trainer, typed."""
    return cast("ImageDataModule", trainer.datamodule)  # type: ignore[attr-defined]


def _is_on_this_machine(uri: str) -> bool:
    return storage.is_local(uri) or storage.is_process_local(uri)
