"""A DataLoader of whole batches whose position can be saved and restored."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from job.data.dataset import Batch, ImageDataset
from job.data.workers import BATCHES_PER_PROCESS, divide, one_core_threads
from job.features.store import FeatureStore

BATCHES_PER_WORKER = 2
"""Batches that are decoded ahead, per thread."""


class BatchLoader(DataLoader[Batch]):
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

    Attributes:
        wait_seconds: how long the training process has waited for batches so far.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        workers: int,
        features: Callable[[], FeatureStore | None] = lambda: None,
    ) -> None:
        self.dataset: ImageDataset
        processes, threads = divide(
            workers,
            dataset.sampler.share * dataset.preprocessing.image_bytes,
            is_transformed=dataset.preprocessing.augment is not None,
        )
        self.threads = 0 if processes else threads
        self.features = features
        self._pool: ThreadPoolExecutor | None = None
        has_gpu = torch.cuda.is_available()
        context = None
        if processes:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["job.data.fork_server"])
        super().__init__(
            dataset,
            sampler=dataset.sampler,  # yields the batch indices by which ImageDataset is indexed
            batch_size=None,
            num_workers=processes,
            multiprocessing_context=context,
            worker_init_fn=functools.partial(_start_worker, threads),
            persistent_workers=processes > 0,
            prefetch_factor=(BATCHES_PER_PROCESS if threads > 1 else 4) if processes else None,
            pin_memory=has_gpu and not self.threads,
        )
        self._pin = has_gpu
        self.batches_taken = 0
        self._resume_at = 0
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # torch iterates over the sampler twice, so that the sampler itself cannot reset its start.
        self.batches_taken = self.dataset.sampler.start_batch = self._resume_at
        self._resume_at = 0
        return self._counted()

    def _batches(self) -> Iterator[Batch]:
        # Decided at the first batch: Lightning makes iterators long before.
        features = self.features()
        if features is not None:
            return (self._pinned(features.batch(indices)) for indices in self.dataset.sampler)
        if self.threads:
            return self._by_threads()
        with _without_main(self.dataset):
            return super().__iter__()

    def _by_threads(self) -> Iterator[Batch]:
        """Batches in order, with enough ahead to keep all threads busy while one is trained on."""
        if self._pool is None:
            self._pool = one_core_threads(self.threads)
        pending: deque[Future[Batch]] = deque()
        try:
            for indices in self.dataset.sampler:
                pending.append(self._pool.submit(lambda indices: self._pinned(self.dataset[indices]), indices))
                if len(pending) > BATCHES_PER_WORKER * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # abandoned in the middle; another iteration may have begun
                future.cancel()

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


def _start_worker(threads: int, worker: int) -> None:
    """Start the threads of a worker process, and end it when its rank is killed.

    torch watches only the fork server, which the workers keep alive.
    """
    if threads > 1:
        info = get_worker_info()
        assert info is not None
        assert isinstance(info.dataset, ImageDataset)
        info.dataset.use_threads(threads)

    def wait() -> None:
        rank = multiprocessing.parent_process()
        assert rank is not None
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, name="die-with-rank", daemon=True).start()
