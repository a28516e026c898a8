"""Workers of a loader: threads of the training process, or processes of several threads each."""

from __future__ import annotations

import logging
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from job.cluster import ranks
from job.errors import ConfigError

log = logging.getLogger(__name__)

MOST_THREADS = 4
"""Threads that share a GIL. Each holds it for a tenth of its time, and the training loop needs it, too."""
SHARED_MEMORY = Path("/dev/shm")
BATCHES_PER_PROCESS = 2
"""Batches that the consumer has asked a process for."""
START_SECONDS = 60.0
LOADERS = 2
"""Loaders of a rank that hold batches at a time: training and validation."""


class Workers(NamedTuple):
    """Workers of one rank.

    Attributes:
        processes: worker processes; 0: the threads are those of the training process.
        threads: per process; 0: batches are loaded in the consuming thread.
    """

    processes: int
    threads: int

    @property
    def places(self) -> int:
        """Batches of a process in shared memory: those asked for, the one being copied, and one that threads begin."""
        return BATCHES_PER_PROCESS + (2 if self.threads > 1 else 1)

    def shared_bytes(self, batch_bytes: int) -> int:
        """Bytes of shared memory that the batches of a loader take, of all ranks of this node.

        Args:
            batch_bytes: bytes of the images of a batch.
        """
        return ranks.local_world_size() * self.processes * self.places * batch_bytes


def divide(count: int, *, is_transformed: bool) -> Workers:
    """Divide the workers of a rank among processes.

    Up to :data:`MOST_THREADS` are threads of the training process, which need no shared memory.

    Args:
        count: number of workers.
        is_transformed: a transform draws from the generators of its process: each worker is a process.
    """
    if is_transformed:
        return Workers(count, 1 if count else 0)
    if count <= MOST_THREADS:
        return Workers(0, count)
    processes = math.ceil(count / MOST_THREADS)
    return Workers(processes, math.ceil(count / processes))


def within_shared_memory(workers: Workers, count: int, batch_bytes: int) -> Workers:
    """``workers``, or ``count`` threads of the training process where shared memory has no room for their batches.

    Args:
        workers: as :func:`divide` returned it.
        count: number of workers.
        batch_bytes: bytes of the images of a batch.
    """
    needed = LOADERS * workers.shared_bytes(batch_bytes)
    if workers.threads > 1 and SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        log.warning(
            "%s has %.0f MB free, and loader processes need %.0f MB: images are decoded by threads of the training "
            "process, which is slower. Mount a larger %s, or lower --data.num_workers.",
            SHARED_MEMORY,
            free / 1e6,
            needed / 1e6,
            SHARED_MEMORY,
        )
        return Workers(0, count)
    return workers


def one_core_threads(count: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use one core each, as in torch's own loader processes.

    torch keeps one setting per thread, and a global one for new threads: all of these are set before the global one is
    restored.

    Raises:
        ConfigError: the system does not allow so many.
    """
    default_threads = torch.get_num_threads()

    def one_core() -> None:
        torch.get_num_threads()  # lets torch initialise the thread, which would undo the next line later
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, thread_name_prefix="decode", initializer=one_core)
    all_started = threading.Barrier(count, timeout=START_SECONDS)
    try:
        list(pool.map(lambda _: all_started.wait(), range(count)))
    except RuntimeError as error:  # the system refuses one of them
        all_started.abort()  # or the others would wait for it
        pool.shutdown(wait=False, cancel_futures=True)
        raise ConfigError(
            f"cannot start {count} threads to decode images ({error or type(error).__name__}): lower "
            "--data.num_workers, or allow this user or container more processes (ulimit -u, pids limit)."
        ) from error
    finally:
        torch.set_num_threads(default_threads)
    return pool
