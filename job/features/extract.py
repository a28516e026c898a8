"""Backbone features of any images, without a Trainer: computed once, kept, and mapped into memory.

They are found where ``fit`` has left them, and ``fit`` finds them, where network, images, preprocessing and precision
are the same. Any number of processes share the work through the folder of the features: process r of W computes the
chunks r, r + W, …, and goes on with those that others have left. So none waits for a process that was killed, and a
restart, also of another number of processes, computes what is missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from job import storage
from job.cluster import ranks
from job.data.bad_samples import BadSample
from job.data.cache import SampleCache
from job.data.dataset import Batch, ImageDataset, Preprocessing
from job.data.index.index import Index
from job.data.loader import BatchLoader
from job.data.sampler import FeatureBatchSampler, ResumableBatchSampler
from job.errors import ConfigError, DataError, first_line
from job.features.compute import PartWork, compute_chunks
from job.features.disk_space import make_room
from job.features.key import content_hash, feature_key, weights_hash
from job.features.store import FOLDER, FeatureStore
from job.model.classifier import Classifier
from job.predict.precision import Precision
from job.predict.work import next_part
from job.process.cpus import available_cpus
from job.process.progress import Progress
from job.storage.local_cache import locked, private_folder, report_disk_full

log = logging.getLogger(__name__)

LIGHTNING_PRECISION = {"bf16": "bf16-mixed", "fp32": "32-true"}
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ExtractionSettings:
    """Where features are kept, and how they are computed.

    Attributes:
        cache_dir: local folder of the node's cache.
        uri: folder of features that nodes and runs share, such as ``RUN_DIR/features``; None: on this node's disk only.
        batch_size: images per batch.
        num_workers: number of decoding threads; None: one per CPU core, divided among the ranks of the node.
        precision: "bf16" computes by autocast, "fp32" in float32; as :attr:`~job.predict.Predictor.precision`.
        max_gb: size of all features in ``cache_dir``, in 10^9 bytes.
    """

    cache_dir: Path
    uri: str | None = None
    batch_size: int = 64
    num_workers: int | None = None
    precision: Precision = "fp32"
    max_gb: float = 100.0


@dataclass(frozen=True, eq=False)
class Features:
    """The features of all samples of one index.

    Attributes:
        variants: float32 [V, N, F], mapped read-only into memory; zeros for an unreadable sample.
        labels: int64 [N], class numbers; -1 where there is none, or where samples have any number of labels.
        valid: bool [N]; False for an unreadable sample.
        index: the samples; ``index.multi_hot_of(samples)`` are the targets where samples have any number of labels.
        bad: the unreadable samples.
    """

    variants: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    index: Index
    bad: list[BadSample]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """float32 [N, F], mapped read-only into memory: the first variant, which for the default preprocessing is the
        image as validation sees it."""
        first: npt.NDArray[np.float32] = self.variants[0]
        return first

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the data, in the order of labels; empty without labels."""
        return self.index.classes

    def uris(self, samples: Sequence[int]) -> list[str]:
        """URIs of some samples, in the given order."""
        return self.index.uris(samples)


def features_of(
    net: Classifier,
    index: Index,
    preprocessing: Preprocessing,
    settings: ExtractionSettings,
    *,
    seed: int = 0,
    cache: SampleCache | None = None,
) -> Features:
    """Compute the features of all samples of an index, or find them; called on all ranks, and returns them on each.

    Args:
        net: the network, on the device that computes; its head is not used.
        index: the samples.
        preprocessing: of the samples, with a limited number of variants.
        settings: where features are kept, and how they are computed.
        seed: of the augmentation.
        cache: of samples from buckets, on this node.

    Raises:
        ConfigError: there are several nodes, and no folder that they share; the disk has no room.
        DivergedError: features are not finite.
        DataError: no sample can be read.
        StorageError: samples cannot be read at present, or features cannot be written.
    """
    extraction = _Extraction(net, index, preprocessing, settings, seed, cache)
    return extraction.run()


class _Extraction:
    """One call of :func:`features_of`."""

    def __init__(
        self,
        net: Classifier,
        index: Index,
        preprocessing: Preprocessing,
        settings: ExtractionSettings,
        seed: int,
        cache: SampleCache | None,
    ) -> None:
        if preprocessing.variants is None:
            raise ConfigError("the augmentation has no limited number of variants: give --data.augment_views.")
        if settings.uri is None and ranks.world_size() > ranks.local_world_size():
            raise ConfigError("several nodes need a folder in a bucket through which they share features.")
        if not len(index):
            raise DataError(f"there are no images in {index.root}.")
        self.net = net
        self.index = index
        self.preprocessing = preprocessing
        self.settings = settings
        self.seed = seed
        self.cache = cache
        self.weights = weights_hash(net.backbone)
        self.content = content_hash(index)
        with _evaluating(net):
            size = preprocessing.image_size
            device = net.mean.device
            self.example = self._features(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))

    def run(self) -> Features:
        """Find or compute the features."""
        variants = self.preprocessing.variants
        assert variants is not None, "checked above"
        store = self._store(self.preprocessing)
        if variants == 1 and self.preprocessing.augment is None and not self._is_complete(store):
            # The first variant of training images that are flipped at random is the image as it is.
            flipped = self._store(
                Preprocessing(
                    self.preprocessing.image_size,
                    self.preprocessing.resize,
                    flip=True,
                    max_image_pixels=self.preprocessing.max_image_pixels,
                )
            )
            if self._is_complete(flipped):
                store = flipped
        self._make_room(store)
        path = store.folder / f"{self.index.part}.float32.npy"
        while True:
            self._compute_missing(store)
            with self._alone_on_node(store):
                if self._fetch_missing(store):
                    values = _assembled(store, path)
                    bad = store.open()
                    break
        valid = store.valid.all(dim=1).numpy()
        if not valid.any():
            raise DataError(f"none of {len(valid):,} images of {self.index.root} can be read: {bad[0].line}")
        labels = self.index.labels.astype(np.int64)
        return Features(values[:variants], labels, valid, self.index, bad)

    def _store(self, preprocessing: Preprocessing) -> FeatureStore:
        key = feature_key(
            self.net,
            self.weights,
            self.content,
            preprocessing,
            seed=self.seed,
            precision=LIGHTNING_PRECISION[self.settings.precision],
        )
        nothing = ResumableBatchSampler(1, 1, rank=0, world_size=1, seed=0, shuffle=False)
        dataset = self._dataset(preprocessing, nothing)
        uri = None if self.settings.uri is None else storage.join(self.settings.uri, key)
        folder = self.settings.cache_dir / FOLDER / key
        return FeatureStore(dataset, folder, uri, self.example.shape[1], self.example.dtype)

    def _dataset(self, preprocessing: Preprocessing, sampler: ResumableBatchSampler) -> ImageDataset:
        return ImageDataset(
            self.index,
            sampler,
            preprocessing,
            seed=self.seed,
            cache_dir=str(self.settings.cache_dir),
            cache=self.cache,
        )

    @staticmethod
    def _is_complete(store: FeatureStore) -> bool:
        published = store.published()
        return len(published) == len(store) or len(published | store.on_disk()) == len(store)

    def _make_room(self, store: FeatureStore) -> None:
        each = self.example.nbytes + self.example.numel() * FLOAT32_BYTES
        needed = each * len(self.index) * store.variants
        cache_dir = self.settings.cache_dir
        if ranks.local_rank() == 0 and (
            problem := make_room(
                cache_dir, {store.folder}, needed, int(self.settings.max_gb * 1e9), "the limit on features"
            )
        ):
            raise ConfigError(f"there is no room for the features: {problem} Choose another folder for the cache.")
        with report_disk_full(store.folder, "keep the backbone's features"):
            private_folder(store.folder.parent)
            private_folder(store.folder)

    @contextlib.contextmanager
    def _alone_on_node(self, store: FeatureStore) -> Iterator[None]:
        with locked(store.folder.parent / store.folder.name):
            yield

    def _compute_missing(self, store: FeatureStore) -> None:
        """Compute chunks until all exist, in the bucket or on this node."""
        total = len(self.index) * store.variants
        progress: Progress | None = None
        with contextlib.ExitStack() as stack:
            while missing := sorted(set(range(len(store))) - store.published() - store.on_disk()):
                if progress is None:
                    log.info(
                        "computing the backbone's features: %d of %d chunks of %s",
                        len(missing),
                        len(store),
                        self.index.part,
                    )
                    progress = Progress("features", "images", total, is_shown=ranks.rank() == 0)
                    stack.enter_context(progress)
                done = total - sum(len(store.samples(chunk)) * store.variants for chunk in missing)
                progress.update(done)
                for computed in self._compute(store, chunks_to_compute(missing, ranks.rank(), ranks.world_size())):
                    done += computed
                    progress.update(min(done, total))
            if progress is not None:
                progress.update(total)

    def _compute(self, store: FeatureStore, chunks: list[int]) -> Iterator[int]:
        preprocessing = store.dataset.preprocessing
        samples = [store.samples(chunk) for chunk in chunks]
        sampler = FeatureBatchSampler(samples, store.variants, self.settings.batch_size)
        loader = BatchLoader(self._dataset(preprocessing, sampler), self._workers())
        with _evaluating(self.net):
            yield from compute_chunks([PartWork(store, chunks, loader)], self._features, accept=_accept)

    def _workers(self) -> int:
        if any(map(storage.is_process_local, self.index.stores)):
            return 0  # another process would find an empty filesystem
        if self.settings.num_workers is not None:
            return self.settings.num_workers
        return max(available_cpus() // ranks.local_world_size(), 1)

    def _features(self, images: Tensor) -> Tensor:
        """Features, float [B, F], at the precision of the settings."""
        device = self.net.mean.device
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
        with torch.no_grad(), autocast:
            return self.net.features(images.to(device, non_blocking=True))

    def _fetch_missing(self, store: FeatureStore) -> bool:
        """Copy chunks between this node and the bucket; returns whether all are here. One process per node does it."""
        here, published = store.on_disk(), store.published()
        if store.uri is not None:
            for chunk in sorted(here - published):
                store.publish(chunk)
        fetched = {chunk for chunk in sorted(published - here) if store.fetch(chunk)}
        return len(here | fetched) == len(store)


def chunks_to_compute(missing: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The missing chunks that a rank computes next: all of its own, else one that another rank has left.

    Args:
        missing: numbers of chunks, in order; at least one.
        rank: of this process.
        world_size: number of processes.
    """
    return [chunk for chunk in missing if chunk % world_size == rank] or [next_part(missing, rank, world_size)]


def _accept(batch: Batch) -> Batch:
    if batch["error"] is not None:
        raise batch["error"]
    for _, _, line in batch["bad"]:
        log.warning("bad sample: %s", line)
    return batch


@contextlib.contextmanager
def _evaluating(net: Classifier) -> Iterator[None]:
    """Keep the backbone in eval mode while the context lasts."""
    training = net.backbone.training
    net.backbone.eval()
    try:
        yield
    finally:
        net.backbone.train(training)


def _assembled(store: FeatureStore, path: Path) -> npt.NDArray[np.float32]:
    """All chunks on this node as one array, float32 [V, N, F], mapped from a file that one process per node writes."""
    shape = (store.variants, len(store.index), store.width)
    values: npt.NDArray[np.float32]
    with contextlib.suppress(FileNotFoundError):
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            if values.shape == shape and values.dtype == np.float32:
                return values
            reason = f"it holds {values.dtype} {values.shape}"
        except (ValueError, EOFError) as error:
            reason = first_line(error)
        log.warning("%s is damaged and is written again: %s", path, reason)
    _assemble(store, path, shape)
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    return values


def _assemble(store: FeatureStore, path: Path, shape: tuple[int, int, int]) -> None:
    """Write the chunks on this node into one file, which appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    try:
        with report_disk_full(path.parent, "keep the backbone's features"):
            # Not mapped into memory: a page that finds no room on the disk would kill the process.
            with unfinished.open("wb") as file:
                header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                begin, (_, samples, width) = file.tell(), shape
                for chunk in range(len(store)):
                    features, valid = store.load(chunk)
                    rows = torch.where(valid[..., None], features.float(), 0.0).permute(1, 0, 2).contiguous()
                    for variant, values in enumerate(rows.numpy()):
                        row = variant * samples + store.samples(chunk).start
                        file.seek(begin + row * width * FLOAT32_BYTES)
                        file.write(values)
                file.flush()
                os.fsync(file.fileno())
            unfinished.chmod(0o600)
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
