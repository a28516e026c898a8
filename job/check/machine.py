"""This machine: shared memory, disk space, open files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from job import storage
from job.check.finding import Finding, fail, ok, warn
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.data.workers import divide
from job.features.callback import FeatureSettings
from job.process.cpus import available_cpus
from job.storage.local_cache import cache_problem

SHARED_MEMORY, CACHE_DISK, TEMPORARY_DISK, OPEN_FILES = "shared_memory", "cache_disk", "temporary_disk", "open_files"
SHM = Path("/dev/shm")
NCCL_BYTES = 64 << 20
"""Shared memory of a rank that exchanges with others of its node."""
LEAST_FILES, ENOUGH_FILES = 1024, 4096
"""Open files of a rank: connections to the bucket (256), threads, shards, libraries."""
LEAST_TEMPORARY = 1 << 30
SHM_MEND = (
    "Mount an emptyDir with medium: Memory at /dev/shm (Kubernetes), give docker run a larger --shm-size, or lower "
    "--data.num_workers."
)
FILES_MEND = f"Raise the limit: ulimit -n {ENOUGH_FILES}, or docker run --ulimit nofile={ENOUGH_FILES}."
TEMPORARY_MEND = "Set TMPDIR to a folder on a larger disk."


def shared_memory(data: ImageDataModule) -> Iterator[Finding]:
    """Whether /dev/shm holds what loader processes and ranks exchange through it."""
    if not SHM.is_dir():
        yield ok(SHARED_MEMORY, f"{SHM} does not exist on this platform.")
        return
    free, local = shutil.disk_usage(SHM).free, ranks.local_world_size()
    needed = NCCL_BYTES * local if local > 1 else 0
    workers = data.num_workers if data.num_workers is not None else max(available_cpus() // local, 1)
    batch = max(data.global_batch_size // ranks.world_size(), 1) * 3 * data.image_size**2
    train, val = (
        divide(workers, is_transformed=is_transformed).shared_bytes(batch)
        for is_transformed in (data.augment is not None, False)
    )
    faster = needed + train + val
    if data.augment is not None:  # without shared memory there is no other way
        needed += train
    message = f"{SHM} has {gigabytes(free)} free, and about {gigabytes(faster)} are needed."
    if free < needed:
        yield fail(SHARED_MEMORY, message, SHM_MEND)
    elif free < faster:
        yield warn(SHARED_MEMORY, f"{message} With less, images are decoded in one process, which is slower.", SHM_MEND)
    else:
        yield ok(SHARED_MEMORY, message)


def cache_disk(data: ImageDataModule, folder: Path, features: FeatureSettings) -> Iterator[Finding]:
    """Whether the node's cache can be used, and its disk holds what the options allow it.

    Args:
        data: the images.
        folder: the cache that the options name; another check may replace that of ``data`` at the same time.
        features: what of it they may take.
    """
    if problem := cache_problem(folder):
        yield warn(
            CACHE_DISK,
            f"{folder} cannot be the cache: {problem}. Samples and features are not cached.",
            "Choose a folder of your own by --data.cache_dir.",
        )
        return
    remote = any(not storage.is_local(uri) for uris in data.uris.values() for uri in uris)
    allowed = (data.cache_bytes if remote else 0) + (int(features.max_gb * 1e9) if features.use != "never" else 0)
    free = shutil.disk_usage(folder).free
    message = f"{folder} has {gigabytes(free)} free, of {gigabytes(allowed)} that samples and features may take."
    if free < allowed and remote:
        yield warn(
            CACHE_DISK,
            message,
            "Choose a larger disk by --data.cache_dir, or lower --data.cache_gb and --features.max_gb.",
        )
    else:  # features that do not fit are not cached, which the log of the run says
        yield ok(CACHE_DISK, message)


def temporary_disk(checkpoint_bytes: int = 0) -> Finding:
    """Whether the folder for temporary files holds a checkpoint while it is uploaded, and the next one."""
    folder = tempfile.gettempdir()
    free, needed = shutil.disk_usage(folder).free, 2 * checkpoint_bytes
    message = f"{folder} has {gigabytes(free)} free, and {gigabytes(needed)} are needed for checkpoints on their way."
    if free < needed:
        return fail(TEMPORARY_DISK, message, TEMPORARY_MEND)
    if free < LEAST_TEMPORARY:
        return warn(TEMPORARY_DISK, message, TEMPORARY_MEND)
    return ok(TEMPORARY_DISK, message)


def open_files() -> Iterator[Finding]:
    """Whether this process may open enough files and connections."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= ENOUGH_FILES:
        yield ok(OPEN_FILES, "enough files can be open at a time.")
        return
    message = f"this process may have {limit:,} files open at a time, and {LEAST_FILES:,} to {ENOUGH_FILES:,} are used."
    if limit < LEAST_FILES // 2:
        yield fail(OPEN_FILES, message, FILES_MEND)
    elif limit < LEAST_FILES:
        yield warn(OPEN_FILES, message, FILES_MEND)
    else:
        yield ok(OPEN_FILES, message)


def gigabytes(count: float) -> str:
    """Bytes for a message."""
    return f"{count / 1e9:,.3g} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"
