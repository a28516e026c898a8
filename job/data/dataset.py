"""Batches from batch plans: fetch ahead, decode, augment; uint8 on the way out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2

from job.data.augment import ResizeMode, own_generators, resize, seeded
from job.data.cache import SampleCache
from job.data.decode import decode
from job.data.fetch import Fetched, Fetcher
from job.data.index.index import Index
from job.data.sampler import BatchOrder, BatchPlan, sample_seed
from job.errors import ConfigError, DataError, JobError, first_line

SAMPLES_AHEAD = 512
BYTES_AHEAD = 64 << 20
"""What a loader process fetches beyond the batch it decodes: enough for 100 ms a request, and bounded."""
BYTES_AT_ONCE = 256 << 20
"""A larger batch is fetched in portions of this size, one while another is decoded."""
ASSUMED_BYTES = 1 << 20
"""Size of a sample whose size is not listed, until some have been read."""
LARGEST_RESIZED = 1 << 26
"""Pixels of the largest image between resizing the shorter side and cropping."""


class Batch(TypedDict):
    """One rank's share of a global batch of B samples.

    Keys:
        image: uint8 [B, 3, S, S], RGB, channels last in memory: as decoders give them and convolutions like them.
        features: float [B, F], in place of ``image`` where the frozen backbone's output is known already.
        label: int64 [B]; -1 where there is none.
        mask: bool [B]; False for a padded or unreadable sample, which must count for nothing.
        sample: int64 [B], sample ids.
        global_size: samples of the whole global batch, the divisor of its mean loss.
        bad: one line for each unreadable sample: its URI and the cause.
        error: what kept the whole batch from being read, to be raised by who takes it. A worker reports
            it as data, since an exception would reach the user wrapped in the worker's traceback.
    """

    image: NotRequired[Tensor]
    features: NotRequired[Tensor]
    label: Tensor
    mask: Tensor
    sample: Tensor
    global_size: int
    bad: list[str]
    error: JobError | None


@dataclass(frozen=True)
class View:
    """How a sample's pixels are made.

    Attributes:
        image_size: height and width, in pixels.
        resize: how to get there.
        augment: replaces resizing and flipping: from uint8 [3, H, W] to uint8 [3, image_size, image_size].
        augment_views: pictures of a sample that ``augment`` draws; None: a new one each epoch.
        flip: mirror every other sample.
    """

    image_size: int
    resize: ResizeMode = "squash"
    augment: v2.Transform | None = None
    augment_views: int | None = None
    flip: bool = False

    @property
    def count(self) -> int | None:
        """How many pictures of a sample there are; None: no end of them."""
        return self.augment_views if self.augment is not None else 2 if self.flip else 1

    def number(self, seed: int, epoch: int, sample: int) -> int:
        """Which picture of ``sample`` is shown in ``epoch``: below :attr:`count`, or any 63-bit number."""
        drawn = sample_seed(seed, epoch, sample)
        return drawn if self.count is None else drawn % self.count

    def decoded(self, content: bytes) -> Tensor:
        """uint8 [3, H, W]: what all pictures of a sample have in common.

        Raises:
            DataError: the content is no readable image.
        """
        if self.augment is not None:
            return decode(content)
        image = decode(content, self.image_size)
        shorter, longer = sorted(image.shape[1:])
        if self.resize == "crop" and self.image_size**2 * longer > LARGEST_RESIZED * shorter:
            raise DataError(f"is refused: {image.shape[2]} x {image.shape[1]} pixels are too narrow for resize=crop")
        try:
            return resize(image, self.image_size, self.resize)
        except RuntimeError as error:  # torch's for memory that cannot be had
            raise DataError(f"cannot be resized: {first_line(error)}") from error

    def pixels(self, image: Tensor, number: int, seed: int) -> Tensor:
        """uint8 [3, image_size, image_size]: picture ``number`` of what :meth:`decoded` gave.

        Args:
            seed: what ``augment`` draws from.

        Raises:
            ConfigError: ``augment`` returns something else.
        """
        if self.augment is None:
            return image.flip(-1) if self.flip and number else image
        # Some transforms may work in place, and another picture of this image may be wanted.
        try:
            out = seeded(self.augment, image if self.count is None else image.clone(), seed)
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


@dataclass(frozen=True)
class _Ahead:
    """The first portion of a batch, which is fetched ahead.

    Attributes:
        future: what it gives.
        expected: bytes, by the index.
        rest: the batch's other portions.
    """

    future: Future[list[Fetched]]
    expected: int
    rest: list[npt.NDArray[np.int64]]

    def size(self) -> int:
        """Bytes in memory, now or soon."""
        if self.future.done() and not self.future.cancelled() and self.future.exception() is None:
            return sum(each.size for each in self.future.result())
        return self.expected


class ImageDataset(Dataset[Batch]):
    """Reads what a :class:`~job.data.sampler.BatchPlan` names.

    The augmentation of a sample depends on (seed, epoch, sample id) alone. While a batch is decoded,
    those that the same process will be asked for next are already being fetched: which these are
    follows from ``order``, and a wrong guess costs time alone.

    Args:
        order: where plans come from.
        view: how pixels are made.
        seed: seed of the augmentation.
        cache_dir: local folder of copies of archives that cannot be read in parts.
        cache: where samples from buckets are kept on this node.
    """

    def __init__(
        self,
        index: Index,
        order: BatchOrder,
        view: View,
        *,
        seed: int = 0,
        cache_dir: str = "",
        cache: SampleCache | None = None,
    ) -> None:
        self.index = index
        self.order = order
        self.view = view
        self.seed = seed
        self.cache_dir = cache_dir
        self.cache = cache
        self._lock = threading.Lock()
        self._fetcher: Fetcher | None = None
        self._mean_bytes = 0.0
        self._ahead: dict[tuple[int, int], _Ahead] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Filesystems and threads belong to the process that made them.
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_fetcher", "_ahead")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _fetcher=None, _ahead={})

    def __getitem__(self, plan: BatchPlan) -> Batch:
        size = self.view.image_size
        batch = Batch(
            image=torch.zeros(len(plan.samples), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
            label=torch.from_numpy(self.index.labels_of(plan.samples)),
            mask=torch.from_numpy(plan.valid.copy()),
            sample=torch.from_numpy(plan.samples),
            global_size=plan.global_size,
            bad=[],
            error=None,
        )
        try:
            with own_generators() if self.view.augment is not None else contextlib.nullcontext():
                self._read_into(batch, plan)
        except JobError as error:
            batch["error"] = error
        return batch

    def number(self, plan: BatchPlan, row: int) -> int:
        """Which view of a plan's sample is wanted."""
        if plan.views is not None:
            return int(plan.views[row])
        return self.view.number(self.seed, plan.epoch, int(plan.samples[row]))

    def _read_into(self, batch: Batch, plan: BatchPlan) -> None:
        known, image = -1, torch.empty(0)
        for row, (sample, fetched) in enumerate(zip(plan.samples.tolist(), self._fetched(plan), strict=True)):
            try:
                if sample != known:  # the views of a sample are neighbours
                    known, image = -1, self.view.decoded(self._opened_fetcher().content(fetched))
                    known = sample
                number = self.number(plan, row)
                seed = sample_seed(self.seed, number, sample)
                batch["image"][row] = self.view.pixels(image, number, seed)
            except DataError as error:
                if batch["mask"][row]:
                    batch["bad"].append(f"{self.index.uri(sample)} {error}")
                batch["mask"][row] = False

    def _fetched(self, plan: BatchPlan) -> Iterator[Fetched]:
        """This plan's samples in order, those of following plans under way behind them."""
        under_way, rest = self._start(plan)
        for portion in [*rest, None]:
            current = under_way
            if portion is not None:
                under_way = self._opened_fetcher().start(portion)
            contents = current.result()
            self._mean_bytes = sum(each.size for each in contents) / max(len(contents), 1)
            yield from contents

    def _portions(self, samples: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """``samples`` in portions of about :data:`BYTES_AT_ONCE`; most batches are one."""
        numbers = np.cumsum(self._sizes(samples)) // BYTES_AT_ONCE
        return np.split(samples, np.flatnonzero(np.diff(numbers)) + 1)

    def _sizes(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bytes to fetch for each sample; for those without a listed size, as many as samples had lately."""
        sizes = self.index.sizes_of(samples)
        return np.where(sizes < 0, int(self._mean_bytes) or ASSUMED_BYTES, sizes)

    def _opened_fetcher(self) -> Fetcher:
        with self._lock:
            if self._fetcher is None:
                self._fetcher = Fetcher(self.index, self.cache_dir, self.cache)
            return self._fetcher

    def _start(self, plan: BatchPlan) -> tuple[Future[list[Fetched]], list[npt.NDArray[np.int64]]]:
        """Fetch the first portion of ``plan``, unless it is under way, and those of following plans.

        Returns:
            what gives the first portion, and the other portions.
        """
        fetcher = self._opened_fetcher()
        worker = get_worker_info()
        stride = worker.num_workers if worker is not None else 1
        depth = SAMPLES_AHEAD // max(len(plan.samples), 1) + 1
        following = range(plan.batch + stride, min(plan.batch + stride * depth + 1, len(self.order)), stride)
        with self._lock:
            if any(epoch != plan.epoch for epoch, _ in self._ahead):  # guesses for an epoch that was given up
                for ahead in self._ahead.values():
                    ahead.future.cancel()
                self._ahead = {}
            wanted = self._ahead.pop((plan.epoch, plan.batch), None)
            if wanted is None:
                first, *rest = self._portions(plan.samples)
                wanted = _Ahead(fetcher.start(first), 0, rest)
            held = sum(ahead.size() for ahead in self._ahead.values())
            for number in following:
                if (plan.epoch, number) in self._ahead:
                    continue
                first, *rest = self._portions(self.order.plan(plan.epoch, number).samples)
                size = int(self._sizes(first).sum())
                if held and held + size > BYTES_AHEAD:
                    break
                self._ahead[plan.epoch, number] = _Ahead(fetcher.start(first), size, rest)
                held += size
        return wanted.future, wanted.rest
