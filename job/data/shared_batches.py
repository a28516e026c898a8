"""Batches that the processes of a loader hand over in shared memory, which is allocated once.

torch's own loader maps a new block of shared memory per tensor of each batch, and passes it by a connection of its own.
That costs a tenth of the time of decoding, for the pages of new blocks above all. Here each process has a few places
for the images of a batch, which it fills in turn, and small tensors are sent as they are.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from job.data.dataset import Batch, ImageDataset
from job.data.sampler import BatchIndices
from job.data.workers import Workers
from job.errors import ConfigError

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class SharedBatch:
    """A batch whose images lie in shared memory.

    Attributes:
        memory: number of the :class:`SharedImages`.
        worker: number of the process.
        place: number of its place.
        values: the other entries of the :class:`~job.data.dataset.Batch`, with arrays in place of tensors.
    """

    memory: int
    worker: int
    place: int
    values: dict[str, Any]

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; torch's loader calls this in a thread of its own."""
        return self.copied(pin=True)

    def copied(self, *, pin: bool = False) -> Batch:
        """A copy in memory of this process, page-locked if ``pin``."""
        shared = _MEMORIES[self.memory].place(self.worker, self.place)
        image = torch.empty(shared.shape, dtype=torch.uint8, pin_memory=pin, memory_format=torch.channels_last)
        values: dict[str, Any] = {"image": image.copy_(shared)}
        for name, value in self.values.items():
            is_tensor = isinstance(value, np.ndarray)
            values[name] = torch.from_numpy(value) if is_tensor else value
            if pin and is_tensor:
                values[name] = values[name].pin_memory()
        return cast("Batch", values)


class SharedImages:
    """Shared memory for the images of batches: some places for each process.

    Args:
        workers: the processes.
        count: images of a batch.
        image_size: height and width, in pixels.
    """

    def __init__(self, workers: Workers, count: int, image_size: int) -> None:
        self.workers = workers
        self.shape = (workers.processes, workers.places, count, image_size, image_size, 3)
        self.number = next(_NUMBERS)
        _MEMORIES[self.number] = self

    @cached_property
    def _memory(self) -> Tensor:
        try:
            memory = torch.empty(self.shape, dtype=torch.uint8)
            memory.share_memory_()  # type: ignore[no-untyped-call]
            return memory
        except RuntimeError as error:
            raise ConfigError(
                f"cannot allocate {np.prod(self.shape) / 1e6:,.0f} MB of shared memory for loader processes ({error}): "
                "mount a larger /dev/shm, or lower --data.num_workers or --data.global_batch_size."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        self._memory  # noqa: B018  # before the first process has a copy
        return self.__dict__

    def free(self) -> None:
        """Free the memory of this process; it is allocated again when it is needed."""
        self.__dict__.pop("_memory", None)

    def place(self, worker: int, place: int) -> Tensor:
        """Images of a batch, uint8 [B, 3, S, S], channels last in memory."""
        return self._memory[worker, place].permute(0, 3, 1, 2)


_MEMORIES: WeakValueDictionary[int, SharedImages] = WeakValueDictionary()
"""Those of this process, by number: what comes out of a queue finds its memory here."""


class SharedDataset(Dataset[SharedBatch]):
    """An :class:`~job.data.dataset.ImageDataset` in the processes of a loader.

    A process of several threads begins its next batch while the last images of the current one are decoded, so that no
    thread waits for them.

    Batch n + :attr:`~job.data.workers.Workers.places` of a process lies where batch n did. The consumer has copied
    batch n by then, in torch's thread for page-locked memory or before it asks for the next one: torch sends a process
    the number of another batch only when the consumer takes one.

    Args:
        images: the dataset.
        shared: where its batches are put.
    """

    def __init__(self, images: ImageDataset, shared: SharedImages) -> None:
        self.images = images
        self.shared = shared
        self._batches: ThreadPoolExecutor | None = None
        self._count = 0
        self._in_place: dict[int, Future[SharedBatch]] = {}
        self._following: tuple[int, int] | None = None
        self._started: Future[SharedBatch] | None = None

    def start_threads(self) -> None:
        """Start the threads of this process."""
        workers = self.shared.workers
        if workers.threads > 1:
            self.images.use_threads(workers.threads)
            self._batches = ThreadPoolExecutor(2, thread_name_prefix="batch")

    def __getitem__(self, indices: BatchIndices) -> SharedBatch:
        worker = get_worker_info()
        assert worker is not None, "outside of a loader process"
        if self._batches is None:
            return self._load(indices, worker.id, self._next_place())
        if self._started is not None and self._following == (indices.epoch, indices.batch):
            current = self._started
        else:
            current = self._begin(self._batches, indices, worker.id)
        self._started, following = None, indices.batch + worker.num_workers
        if following < len(self.images.sampler):
            batch = self.images.sampler.batch(indices.epoch, following)
            self._following, self._started = (batch.epoch, batch.batch), self._begin(self._batches, batch, worker.id)
        return current.result()

    def _begin(self, batches: ThreadPoolExecutor, indices: BatchIndices, worker: int) -> Future[SharedBatch]:
        place = self._next_place()
        if place in self._in_place:  # a batch of an iteration that was abandoned may still be decoded there
            wait([self._in_place[place]])
        self._in_place[place] = batches.submit(self._load, indices, worker, place)
        return self._in_place[place]

    def _next_place(self) -> int:
        self._count += 1
        return self._count % self.shared.workers.places

    def _load(self, indices: BatchIndices, worker: int, place: int) -> SharedBatch:
        batch = self.images.load(indices, self.shared.place(worker, place))
        values = {
            name: value.numpy() if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name != "image"
        }
        return SharedBatch(self.shared.number, worker, place, values)
