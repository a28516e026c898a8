"""A DataLoader of whole batches that knows where it stands."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from job.data.dataset import Batch, ImageDataset


class BatchLoader(DataLoader[Batch]):
    """Batches of one rank, in the order of a :class:`~job.data.order.BatchOrder`.

    Its state is the number of batches taken in this epoch, which is the same for every rank: a run
    resumes at the very next sample, at any world size and with any number of workers.

    Workers come from a fork server, which has imported torch but has never opened a filesystem:
    fsspec's asynchronous ones hang when forked (https://github.com/fsspec/gcsfs/issues/379).

    Attributes:
        wait_seconds: how long the training process has waited for batches so far.
    """

    def __init__(self, dataset: ImageDataset, workers: int) -> None:
        context = None
        if workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["job.data.fork_server"])
        super().__init__(
            dataset,
            sampler=dataset.order,  # yields plans, which ImageDataset takes as its index
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=context,
            worker_init_fn=_die_with_rank,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        self.order = dataset.order
        self.batches_taken = 0
        self._resume_at = 0
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # torch asks the sampler for its iterator twice, so that it is not the sampler who forgets the start.
        self.batches_taken, self.order.start_batch, self._resume_at = self._resume_at, self._resume_at, 0
        return self._counted(super().__iter__())

    def _counted(self, iterator: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            began = time.monotonic()
            batch = next(iterator, None)
            self.wait_seconds += time.monotonic() - began
            if batch is None:
                return
            self.batches_taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """``{"batch": batches taken in this epoch}``."""
        return {"batch": self.batches_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration, and that one alone, behind the batches of ``state``."""
        self._resume_at = state["batch"]


def _die_with_rank(worker: int) -> None:
    """Let a rank that is killed take its workers along; torch looks at the fork server alone, which they keep alive."""

    def wait() -> None:
        rank = multiprocessing.parent_process()
        assert rank is not None
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, name="die-with-rank", daemon=True).start()
