"""A DataLoader of whole batches whose position can be saved and restored."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from job.data.dataset import Batch, ImageDataset
from job.data.sampler import SuccessiveEpochs
from job.data.shared_batches import SharedBatch, SharedDataset, SharedImages
from job.data.workers import BATCHES_PER_PROCESS, divide, one_core_threads, within_shared_memory
from job.features.store import FeatureStore
from job.torch_internals import has_processes

BATCHES_PER_WORKER = 2
"""Batches that are decoded ahead, per thread."""


class BatchLoader(DataLoader[Any]):
    """DataLoader of one rank's batches, in the order of a :class:`~job.data.sampler.ResumableBatchSampler`.

    Its state is the number of batches taken in this epoch, which is the same for every rank: a run
    resumes at the very next sample, at any world size and with any number of workers.

    A few workers are threads of this process: decoding and resizing release the GIL, so that batches need
    not be handed from process to process (benchmarks/data.py: 1.3 times faster). More would wait for the GIL: then
    they are threads of several processes, which decode each batch together (see :mod:`job.data.workers`). A user's
    transform draws from torch's global generator, which threads would share: then each worker is a process. Processes
    come from a fork server which has imported torch but has never opened a filesystem, since fsspec's
    asynchronous ones hang when forked (https://github.com/fsspec/gcsfs/issues/379).

    Args:
        dataset: of whole batches.
        workers: number of workers; 0: batches are loaded in the consuming thread.
        features: returns the cached features that replace images, or None; called once per epoch, at its first batch.
        follows: whether an epoch of this number follows the one before it: then its first batches are read while the
            one before ends. Default: none does.

    Attributes:
        images: the dataset; :attr:`dataset` is what processes load from.
        wait_seconds: how long the training process has waited for batches so far.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        workers: int,
        features: Callable[[], FeatureStore | None] = lambda: None,
        follows: Callable[[int], bool] = lambda epoch: False,
    ) -> None:
        self.images = dataset
        count, image_size = dataset.sampler.share, dataset.preprocessing.image_size
        divided = divide(workers, is_transformed=dataset.preprocessing.augment is not None)
        divided = within_shared_memory(divided, workers, count * dataset.preprocessing.image_bytes)
        processes = divided.processes
        self.threads = 0 if processes else divided.threads
        self.features = features
        self.follows = follows
        self._pool: ThreadPoolExecutor | None = None
        has_gpu, context = torch.cuda.is_available(), None
        if processes:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["job.data.fork_server"])
        self._shared = SharedImages(divided, count, image_size) if processes else None
        super().__init__(
            dataset if self._shared is None else SharedDataset(dataset, self._shared),
            sampler=SuccessiveEpochs(dataset.sampler, follows),
            batch_size=None,
            num_workers=processes,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            persistent_workers=processes > 0,
            prefetch_factor=BATCHES_PER_PROCESS if processes else None,
            pin_memory=has_gpu and processes > 0,
        )
        self._pin = has_gpu
        self.batches_taken = 0
        self._resume_at = 0
        self._ahead: tuple[int, Generator[Batch]] | None = None
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # torch iterates over the sampler twice, so that the sampler itself cannot reset its start.
        self.batches_taken = self.images.sampler.start_batch = self._resume_at
        self._resume_at = 0
        return self._counted()

    def _batches(self) -> Iterator[Batch]:
        sampler = self.images.sampler
        # Decided at the first batch: Lightning makes iterators long before.
        features = self.features()
        if features is not None:
            self.end_reading_ahead()
            return (self._pinned(features.batch(indices)) for indices in sampler)
        if not self.threads and self._shared is None:
            return (self._pinned(self.images[indices]) for indices in sampler)
        return self._of_epoch(sampler.epoch, sampler.start_batch)

    def _of_epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches of one epoch; the first ones of an epoch that follows it are read while it ends."""
        if self._ahead is not None and not (self._ahead[0] == epoch and start == 0 and self._is_running()):
            self.end_reading_ahead()
        (_, batches), self._ahead = self._ahead or (epoch, None), None
        try:
            for number in range(start, len(self.images.sampler)):
                batch = next(batches, None) if batches is not None else None
                if batch is None:  # nothing is open, or it did not know of this epoch
                    self.images.sampler.start_batch = number
                    batches = self._opened()
                    batch = next(batches)
                if number + 1 == len(self.images.sampler) and self.follows(epoch + 1):
                    # Before the batch is handed over: nobody asks for one behind the last.
                    self._ahead, batches = (epoch + 1, batches), None  # type: ignore[assignment]
                yield batch
        finally:
            if batches is not None:
                batches.close()

    def end_reading_ahead(self) -> None:
        """Read no more of an epoch that was to follow."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None

    def close(self) -> None:
        """End what is read ahead, and free the shared memory of processes that have ended."""
        self.end_reading_ahead()
        if self._shared is not None and not self._is_running():
            self._shared.free()

    def _is_running(self) -> bool:
        return self._shared is None or has_processes(self)

    def _opened(self) -> Generator[Batch]:
        """Batches from the sampler's epoch and start on, through all epochs that follow each other."""
        return self._by_threads() if self._shared is None else self._by_processes()

    def _by_threads(self) -> Generator[Batch]:
        """Batches in order, with enough ahead to keep all threads busy while one is trained on."""
        if self._pool is None:
            self._pool = one_core_threads(self.threads)
        pending: deque[Future[Batch]] = deque()
        try:
            for indices in self.sampler:
                pending.append(self._pool.submit(lambda indices: self._pinned(self.images[indices]), indices))
                if len(pending) > BATCHES_PER_WORKER * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # abandoned in the middle; another iteration may have begun
                future.cancel()

    def _by_processes(self) -> Generator[Batch]:
        """Batches of the processes in order, copied from shared memory."""
        with _without_main(self.images):
            batches = super().__iter__()
        for batch in batches:
            yield batch.copied() if isinstance(batch, SharedBatch) else batch  # page-locked already

    def _counted(self) -> Iterator[Batch]:
        iterator: Iterator[Batch] | None = None
        while True:
            began = time.monotonic()
            if iterator is None:
                iterator = self._batches()
            batch = next(iterator, None)
            self.wait_seconds += time.monotonic() - began
            if batch is None:
                return
            self.batches_taken += 1
            yield batch

    def _pinned(self, batch: Batch) -> Batch:
        """``batch`` in page-locked memory where there is a GPU to copy it to."""
        if self._pin:
            for name, value in batch.items():
                if isinstance(value, Tensor):
                    batch[name] = value.pin_memory()  # type: ignore[literal-required]
        return batch

    def state_dict(self) -> dict[str, int]:
        """``{"batch": batches taken in this epoch}``."""
        return {"batch": self.batches_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration, and only that one, after the batches of ``state``."""
        self._resume_at = state["batch"]


@contextlib.contextmanager
def _without_main(dataset: ImageDataset) -> Iterator[None]:
    """Keep worker processes from importing the main script, which would run again if it has no ``__main__`` guard.

    They need it only for a transform that is defined in it.
    """
    main = sys.modules["__main__"]
    if b"__main__" in pickle.dumps(dataset.preprocessing):
        yield
        return
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _start_worker(worker: int) -> None:
    """Start the threads of a worker process, and end it when its rank is killed.

    torch watches only the fork server, which the workers keep alive.
    """
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, SharedDataset)
    info.dataset.start_threads()

    def watch() -> None:
        rank = multiprocessing.parent_process()
        assert rank is not None
        rank.join()
        os._exit(1)

    threading.Thread(target=watch, name="die-with-rank", daemon=True).start()
