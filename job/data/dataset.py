"""The dataset: fetches ahead, decodes and augments the samples of a batch; images stay uint8."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2

from job.data.augment import ResizeMode, own_generators, resize, resize_into, seeded
from job.data.bad_samples import BadSample
from job.data.cache import SampleCache
from job.data.decode import decode, decode_pixels
from job.data.fetch import Fetched, Fetcher
from job.data.index.index import Index
from job.data.pixels import MAX_IMAGE_PIXELS
from job.data.sampler import BatchIndices, ResumableBatchSampler, sample_seed
from job.data.workers import one_core_threads
from job.errors import ConfigError, DataError, JobError, first_line

SAMPLES_AHEAD = 512
BYTES_AHEAD = 64 << 20
"""Prefetch of a loader beyond the batch that it decodes: enough for 100 ms per request, and bounded."""
BYTES_AT_ONCE = 256 << 20
"""A larger batch is fetched in portions of this size: one while the previous one is decoded."""
CHUNKS_PER_THREAD = 4
"""Parts of a batch that threads decode together, so that all end at about the same time."""
TAKEN = 16
"""Batches last taken, which threads may take in another order than the sampler's."""
ASSUMED_BYTES = 1 << 20
"""Size of a sample whose size is not in the index, until some have been read."""


class Batch(TypedDict):
    """One rank's share of a global batch of B samples.

    Keys:
        image: uint8 [B, 3, S, S], RGB, channels last in memory, as decoders return and convolutions prefer it.
        features: float [B, F], cached backbone features in place of ``image``.
        label: int64 [B]; -1 where there is none, or where samples have any number of labels.
        labels: uint8 [B, C], multi-hot, where samples have any number of labels.
        mask: bool [B]; False for a padded or unreadable sample, which is masked out.
        sample: int64 [B], sample ids.
        global_size: samples of the whole global batch, the divisor of its mean loss.
        bad: the unreadable samples.
        error: failure to read the whole batch, for the consumer to raise. A worker returns it as data, since an
            exception would reach the user wrapped in the worker's traceback.
    """

    image: NotRequired[Tensor]
    features: NotRequired[Tensor]
    label: Tensor
    labels: NotRequired[Tensor]
    mask: Tensor
    sample: Tensor
    global_size: int
    bad: list[BadSample]
    error: JobError | None


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a sample's pixels: decode, resize, augment.

    A sample has variants: the same pixels flipped, or augmented by other random draws.

    Attributes:
        image_size: height and width, in pixels.
        resize: how an image is resized to it.
        augment: replaces resizing and flipping: from uint8 [3, H, W] to uint8 [3, image_size, image_size].
        augment_views: variants per sample that ``augment`` draws; None: a new one each epoch.
        flip: random horizontal flip.
        max_image_pixels: pixels of the largest image to decode.
    """

    image_size: int
    resize: ResizeMode = "squash"
    augment: v2.Transform | None = None
    augment_views: int | None = None
    flip: bool = False
    max_image_pixels: int = MAX_IMAGE_PIXELS

    @property
    def variants(self) -> int | None:
        """Number of variants per sample; None: unlimited."""
        return self.augment_views if self.augment is not None else 2 if self.flip else 1

    @property
    def image_bytes(self) -> int:
        """Bytes of an image in a batch."""
        return 3 * self.image_size**2

    @property
    def cache_key(self) -> str:
        """Text that is the same for the same pixels, in all releases: cached features are found by its hash."""
        names = ["image_size", "resize", "augment", "augment_views", "flip"]
        if self.max_image_pixels != MAX_IMAGE_PIXELS:  # it decides which images are unreadable
            names.append("max_image_pixels")
        return f"View({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def variant(self, seed: int, epoch: int, sample: int, repeat: int = 0) -> int:
        """The variant of ``sample`` in ``epoch``: a number below :attr:`variants`, or any 63-bit number.

        Args:
            seed: of the run.
            epoch: number of the epoch.
            sample: sample id.
            repeat: how often the sample came before, where it comes several times in an epoch.
        """
        number = sample_seed(seed, epoch, sample, repeat)
        return number if self.variants is None else number % self.variants

    def decoded(self, content: bytes) -> Tensor:
        """uint8 [3, H, W]: the image before augmentation, common to all variants.

        Raises:
            DataError: the content is no readable image.
        """
        if self.augment is not None:
            return decode(content, max_image_pixels=self.max_image_pixels)
        image = decode(content, self.image_size, self.max_image_pixels)
        try:
            return resize(image, self.image_size, self.resize)
        except RuntimeError as error:  # raised by torch when it runs out of memory
            raise DataError(f"cannot be resized: {first_line(error)}") from error

    def decode_into(self, out: Tensor, content: bytes, variant: int) -> None:
        """:meth:`decoded` and :meth:`pixels` into an image of a batch; only without ``augment``.

        Args:
            out: uint8 [1, 3, image_size, image_size], channels last in memory.
            content: the file.
            variant: its number.

        Raises:
            DataError: the content is no readable image.
        """
        pixels = decode_pixels(content, self.image_size, self.max_image_pixels)
        try:
            resize_into(out, pixels, self.resize, flip=self.flip and variant > 0)
        except RuntimeError as error:  # raised by torch when it runs out of memory
            raise DataError(f"cannot be resized: {first_line(error)}") from error

    def pixels(self, image: Tensor, variant: int, seed: int) -> Tensor:
        """uint8 [3, image_size, image_size]: a variant of the image that :meth:`decoded` returned.

        Args:
            image: the decoded image.
            variant: its number.
            seed: seeds the generators that ``augment`` draws from.

        Raises:
            ConfigError: ``augment`` returns something else.
        """
        if self.augment is None:
            return image.flip(-1) if self.flip and variant else image
        try:
            # A transform may work in place, and this image may follow again: another variant, or a repetition.
            out = seeded(self.augment, image.clone(), seed)
        except Exception as error:
            raise ConfigError(
                f"--data.augment raised {type(error).__name__} on an image of {image.shape[2]} x {image.shape[1]} "
                f"pixels: {error}. Resize it first, or choose another transform."
            ) from error
        expected = (3, self.image_size, self.image_size)
        if out.shape != expected or out.dtype != torch.uint8:
            raise ConfigError(
                f"--data.augment returned {out.dtype} {tuple(out.shape)} where uint8 {expected} is needed: end it "
                "with a resize or crop to --data.image_size, and leave normalisation to the model."
            )
        return out


@dataclass
class _Ahead:
    """The first portion of a batch, which is fetched ahead.

    Attributes:
        future: its samples.
        expected: bytes according to the index, and once they have been read, as they are.
        rest: the batch's other portions.
        is_counted: bytes have been counted after reading.
    """

    future: Future[list[Fetched]]
    expected: int
    rest: list[npt.NDArray[np.int64]]
    is_counted: bool = False

    def size(self) -> int:
        """Bytes in memory, now or soon."""
        if not self.is_counted and self.future.done():
            if not self.future.cancelled() and self.future.exception() is None:
                self.expected = sum(each.size for each in self.future.result())
            self.is_counted = True
        return self.expected


class ImageDataset(Dataset[Batch]):
    """Map-style dataset of whole batches, indexed by :class:`~job.data.sampler.BatchIndices`.

    The augmentation of a sample depends on (seed, epoch, sample id) alone. While a batch is decoded, the batches
    that this process is expected to need next, according to ``sampler``, are fetched; a wrong guess only costs time.

    Args:
        index: the samples.
        sampler: the batches.
        preprocessing: of the pixels.
        seed: seed of the augmentation.
        cache_dir: local folder of copies of archives that cannot be read in parts.
        cache: of samples from buckets, on this node.
    """

    def __init__(
        self,
        index: Index,
        sampler: ResumableBatchSampler,
        preprocessing: Preprocessing,
        *,
        seed: int = 0,
        cache_dir: str = "",
        cache: SampleCache | None = None,
    ) -> None:
        self.index = index
        self.sampler = sampler
        self.preprocessing = preprocessing
        self.seed = seed
        self.cache_dir = cache_dir
        self.cache = cache
        self._lock = threading.Lock()
        self._fetcher: Fetcher | None = None
        self._mean_bytes = 0.0
        self._ahead: dict[tuple[int, int], _Ahead] = {}
        self._taken: deque[tuple[int, int]] = deque(maxlen=TAKEN)
        self._threads: ThreadPoolExecutor | None = None
        self._chunks = 1

    def __getstate__(self) -> dict[str, Any]:
        # Filesystems and threads belong to the process that made them.
        own = ("_lock", "_fetcher", "_ahead", "_threads")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _fetcher=None, _ahead={}, _threads=None)

    def use_threads(self, count: int) -> None:
        """Decode the samples of each batch in several threads of this process; without ``augment`` only."""
        self._threads = one_core_threads(count)
        self._chunks = CHUNKS_PER_THREAD * count

    def __getitem__(self, indices: BatchIndices) -> Batch:
        size = self.preprocessing.image_size
        image = torch.empty(len(indices.samples), size, size, 3, dtype=torch.uint8)
        return self.load(indices, image.permute(0, 3, 1, 2))

    def load(self, indices: BatchIndices, image: Tensor) -> Batch:
        """A batch whose images are written into ``image``, uint8 [B, 3, S, S], channels last in memory."""
        batch = Batch(
            image=image,
            label=torch.from_numpy(self.index.labels_of(indices.samples)),
            mask=torch.from_numpy(indices.valid.copy()),
            sample=torch.from_numpy(indices.samples),
            global_size=indices.global_size,
            bad=[],
            error=None,
        )
        if self.index.has_several_labels:
            batch["labels"] = torch.from_numpy(self.index.multi_hot_of(indices.samples))
        try:
            with own_generators() if self.preprocessing.augment is not None else contextlib.nullcontext():
                self._read_into(batch, indices)
        except JobError as error:
            batch["error"] = error
            image.zero_()
        return batch

    def variant(self, indices: BatchIndices, row: int) -> int:
        """The variant of the sample in a row of a batch."""
        if indices.variants is not None:
            return int(indices.variants[row])
        repeat = 0 if indices.repeats is None else int(indices.repeats[row])
        return self.preprocessing.variant(self.seed, indices.epoch, int(indices.samples[row]), repeat)

    def _read_into(self, batch: Batch, indices: BatchIndices) -> None:
        fetched = self._fetched(indices)
        if self._threads is None:
            batch["bad"] += self._read_rows(batch, indices, 0, fetched)
            return
        parts: list[Future[list[BadSample]]] = []
        try:
            for first, last in itertools.pairwise(_bounds(indices.samples, self._chunks)):
                samples = list(itertools.islice(fetched, last - first))
                parts.append(self._threads.submit(self._read_rows, batch, indices, first, samples))
        finally:
            wait(parts)  # they write into the batch, also if another one fails
        for part in parts:
            batch["bad"] += part.result()

    def _read_rows(
        self, batch: Batch, indices: BatchIndices, start: int, fetched: Iterable[Fetched]
    ) -> list[BadSample]:
        """Decode into the rows from ``start`` on; return the unreadable samples."""
        preprocessing, fetcher, bad = self.preprocessing, self._opened_fetcher(), []
        rows = torch.split(batch["image"], 1)
        first, image = -1, torch.empty(0)
        for row, one in enumerate(fetched, start):
            sample = int(indices.samples[row])
            try:
                variant = self.variant(indices, row)
                # The variants of a sample are neighbours.
                is_first = first < 0 or sample != indices.samples[first]
                if is_first:
                    first = -1
                    content = fetcher.content(one)
                if preprocessing.augment is None:
                    if is_first:
                        preprocessing.decode_into(rows[row], content, variant)
                    else:
                        flip = preprocessing.flip and (variant > 0) != (self.variant(indices, first) > 0)
                        rows[row].copy_(rows[first].flip(3) if flip else rows[first])
                else:
                    if is_first:
                        image = preprocessing.decoded(content)
                    rows[row][0] = preprocessing.pixels(image, variant, sample_seed(self.seed, variant, sample))
                if is_first:
                    first = row
            except DataError as error:
                if batch["mask"][row]:
                    bad.append(BadSample(self.index.part, sample, f"{self.index.uri(sample)} {error}"))
                batch["mask"][row] = False
                rows[row].zero_()
        return bad

    def _fetched(self, indices: BatchIndices) -> Iterator[Fetched]:
        """The samples of a batch in order, while those of the following batches are being fetched."""
        under_way, rest = self._start(indices)
        for portion in [*rest, None]:
            current = under_way
            if portion is not None:
                under_way = self._opened_fetcher().start(portion)
            fetched = current.result()
            self._mean_bytes = sum(each.size for each in fetched) / max(len(fetched), 1)
            yield from fetched

    def _portions(self, samples: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """``samples`` in portions of about :data:`BYTES_AT_ONCE`; most batches are one."""
        numbers = np.cumsum(self._sizes(samples)) // BYTES_AT_ONCE
        return np.split(samples, np.flatnonzero(np.diff(numbers)) + 1)

    def _sizes(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bytes to fetch for each sample; those of unknown size count as the mean of the last batch."""
        sizes = self.index.sizes_of(samples)
        return np.where(sizes < 0, int(self._mean_bytes) or ASSUMED_BYTES, sizes)

    def _opened_fetcher(self) -> Fetcher:
        with self._lock:
            if self._fetcher is None:
                self._fetcher = Fetcher(self.index, self.cache_dir, self.cache)
            return self._fetcher

    def _position(self, epoch: int, batch: int) -> int:
        """Number of a batch through all epochs."""
        return epoch * len(self.sampler) + batch

    def _start(self, indices: BatchIndices) -> tuple[Future[list[Fetched]], list[npt.NDArray[np.int64]]]:
        """Start to fetch the first portion of a batch, unless that has started, and those of the following batches.

        Returns:
            the first portion, and the sample ids of the others.
        """
        fetcher = self._opened_fetcher()
        worker = get_worker_info()
        stride = worker.num_workers if worker is not None else 1
        depth = SAMPLES_AHEAD // max(len(indices.samples), 1) + 1
        following = range(indices.batch + stride, min(indices.batch + stride * depth + 1, len(self.sampler)), stride)
        with self._lock:
            # Threads take batches in another order, also where an epoch follows another; those of an iteration that
            # was abandoned lie farther away.
            here, most = self._position(indices.epoch, indices.batch), stride * (depth + TAKEN)
            for key in [key for key in self._ahead if abs(self._position(*key) - here) > most]:
                self._ahead.pop(key).future.cancel()
            if (indices.epoch, indices.batch) in self._taken:  # the epoch is read again
                self._taken.clear()
            self._taken.append((indices.epoch, indices.batch))
            portion = self._ahead.pop((indices.epoch, indices.batch), None)
            if portion is None:
                first, *rest = self._portions(indices.samples)
                portion = _Ahead(fetcher.start(first), 0, rest)
            bytes_ahead = sum(ahead.size() for ahead in self._ahead.values())
            for number in following:
                if (indices.epoch, number) in self._ahead or (indices.epoch, number) in self._taken:
                    continue
                first, *rest = self._portions(self.sampler.batch(indices.epoch, number).samples)
                size = int(self._sizes(first).sum())
                if bytes_ahead and bytes_ahead + size > BYTES_AHEAD:
                    break
                self._ahead[indices.epoch, number] = _Ahead(fetcher.start(first), size, rest)
                bytes_ahead += size
        return portion.future, portion.rest


def _bounds(samples: npt.NDArray[np.int64], parts: int) -> list[int]:
    """Bounds of about ``parts`` equal parts of a batch; neighbours of one sample stay together."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(samples)) + 1])
    chosen = np.searchsorted(starts, np.linspace(0, len(samples), parts, endpoint=False))
    return [*np.unique(starts[chosen[chosen < len(starts)]]).tolist(), len(samples)]
