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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from job.data.dataset import Batch, ImageDataset
from job.features.store import FeatureStore

BATCHES_PER_WORKER = 2
"""Batches that are decoded ahead, per thread."""


class BatchLoader(DataLoader[Batch]):
    """DataLoader of one rank's batches, in the order of a :class:`~job.data.sampler.ResumableBatchSampler`.

    Its state is the number of batches taken in this epoch, which is the same for every rank: a run
    resumes at the very next sample, at any world size and with any number of workers.

    Workers are threads of this process: decoding and resizing release the GIL, so that batches need
    not be handed from process to process (benchmarks/data.py: 1.3 times faster). A user's transform
    draws from torch's global generator, which threads would share: then workers are processes,
    from a fork server which has imported torch but has never opened a filesystem, since fsspec's
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
        processes = workers if dataset.preprocessing.augment is not None else 0
        self.threads = workers - processes
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
            worker_init_fn=_die_with_rank,
            persistent_workers=processes > 0,
            prefetch_factor=4 if processes else None,
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


def one_core_threads(count: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use one core each, as in torch's own loader processes.

    torch keeps one setting per thread, and a global one for new threads: all of these are set before the global one is
    restored.
    """
    default_threads = torch.get_num_threads()

    def one_core() -> None:
        torch.get_num_threads()  # lets torch initialise the thread, which would undo the next line later
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, thread_name_prefix="decode", initializer=one_core)
    all_started = threading.Barrier(count)
    list(pool.map(lambda _: all_started.wait(), range(count)))
    torch.set_num_threads(default_threads)
    return pool


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


def _die_with_rank(worker: int) -> None:
    """End a worker when its rank is killed; torch watches only the fork server, which the workers keep alive."""

    def wait() -> None:
        rank = multiprocessing.parent_process()
        assert rank is not None
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, name="die-with-rank", daemon=True).start()
