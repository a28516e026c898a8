"""A DataLoader of whole batches that knows where it stands."""

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

BATCHES_A_WORKER = 2
"""Batches that are decoded ahead, for each thread."""


class BatchLoader(DataLoader[Batch]):
    """Batches of one rank, in the order of a :class:`~job.data.sampler.BatchOrder`.

    Its state is the number of batches taken in this epoch, which is the same for every rank: a run
    resumes at the very next sample, at any world size and with any number of workers.

    Workers are threads of this process: decoding and resizing release the GIL, so that batches need
    not be handed from process to process (benchmarks/data.py: 1.3 times faster). A transform of the
    user's draws from torch's global generator, which threads would share: then workers are processes,
    from a fork server which has imported torch but has never opened a filesystem, since fsspec's
    asynchronous ones hang when forked (https://github.com/fsspec/gcsfs/issues/379).

    Args:
        workers: how many; 0: batches are made when they are asked for.
        features: tells, when a batch is asked for first in an epoch, where features lie that take the place of
            images; None: nowhere.

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
        processes = workers if dataset.view.augment is not None else 0
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
            sampler=dataset.order,  # yields plans, which ImageDataset takes as its index
            batch_size=None,
            num_workers=processes,
            multiprocessing_context=context,
            worker_init_fn=_die_with_rank,
            persistent_workers=processes > 0,
            prefetch_factor=4 if processes else None,
            pin_memory=has_gpu and not self.threads,
        )
        self._pin = has_gpu
        self.order = dataset.order
        self.batches_taken = 0
        self._resume_at = 0
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # torch asks the sampler for its iterator twice, so that it is not the sampler who forgets the start.
        self.batches_taken, self.order.start_batch, self._resume_at = self._resume_at, self._resume_at, 0
        return self._counted()

    def _batches(self) -> Iterator[Batch]:
        # Decided when the first batch is asked for: Lightning makes iterators long before.
        features = self.features()
        if features is not None:
            return (self._pinned(features.batch(plan)) for plan in self.order)
        if self.threads:
            return self._by_threads()
        with _without_main(self.dataset):
            return super().__iter__()

    def _by_threads(self) -> Iterator[Batch]:
        """Batches in order, as many ahead as keep all threads at work while one is trained on."""
        if self._pool is None:
            self._pool = _one_core_threads(self.threads)
        pending: deque[Future[Batch]] = deque()
        try:
            for plan in self.order:
                pending.append(self._pool.submit(lambda plan: self._pinned(self.dataset[plan]), plan))
                if len(pending) > BATCHES_A_WORKER * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # given up in the middle; another iteration may have begun
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
        """Begin the next iteration, and that one alone, behind the batches of ``state``."""
        self._resume_at = state["batch"]


def _one_core_threads(count: int) -> ThreadPoolExecutor:
    """Threads whose torch operations stay on one core each, as in torch's own loader processes.

    torch keeps the number a thread has for its operations, and a global one for threads to come: it is
    set in all of these before the global one is put back.
    """
    everyones = torch.get_num_threads()

    def one_core() -> None:
        torch.get_num_threads()  # lets torch initialise the thread, which would undo the next line later
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, thread_name_prefix="decode", initializer=one_core)
    together = threading.Barrier(count)
    list(pool.map(lambda _: together.wait(), range(count)))
    torch.set_num_threads(everyones)
    return pool


@contextlib.contextmanager
def _without_main(dataset: ImageDataset) -> Iterator[None]:
    """Keep worker processes that start here from importing the main script, which would run again without its guard.

    They need it only for a transform that is defined in it.
    """
    main = sys.modules["__main__"]
    if b"__main__" in pickle.dumps(dataset.view):
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
    """Let a rank that is killed take its workers along; torch looks at the fork server alone, which they keep alive."""

    def wait() -> None:
        rank = multiprocessing.parent_process()
        assert rank is not None
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, name="die-with-rank", daemon=True).start()
