"""What the pixels of each image say: a hash of its content, its size, its contrast and a small grey copy."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import Image

from job import storage
from job.cluster import ranks
from job.cluster.shared_work import ProgressBarrier
from job.data.cache import SampleCache
from job.data.decode import decode_pixels
from job.data.fetch import Fetched, Fetcher
from job.data.index.index import Index
from job.errors import DataError
from job.process.cpus import available_cpus
from job.process.progress import Progress

GREY = 16
"""Height and width of the grey copy, in pixels."""
DECODED = 128
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as long as no side falls below so many pixels."""
PORTION = 64
"""Images that are fetched together."""
PORTIONS_AHEAD = 4
PORTIONS_PER_GATHER = 1024
"""Portions of each rank whose records rank 0 gets at once, 20 MB."""

RECORD = np.dtype(
    [
        ("readable", np.bool_),
        ("content", "V16"),
        ("pixels", "V16"),
        ("height", np.uint32),
        ("width", np.uint32),
        ("deviation", np.float32),
        ("grey", np.uint8, (GREY, GREY)),
    ]
)
"""Columns: whether the image can be decoded; hashes of the file and of the decoded pixels; their height and width, a
fraction of the whole ones for a large JPEG; largest standard deviation of a channel, of 255; the grey copy."""

Records = npt.NDArray[np.void]


def inspect(
    index: Index,
    records: Records,
    cache_dir: str,
    cache: SampleCache | None,
    workers: int | None,
    max_image_pixels: int,
) -> dict[int, str]:
    """Make the records of all images of a part; returns why some cannot be read, by sample id; called on all ranks.

    Each rank reads its share, and rank 0 gets everything.

    Args:
        index: of the part.
        records: of its images, [N], all zero; those of other ranks stay so, except on rank 0.
        cache_dir: local folder of copies of archives that cannot be read in parts.
        cache: of samples from buckets.
        workers: number of decoding threads; None: one per CPU core, divided among the ranks of the node.
        max_image_pixels: height times width of the largest image to decode.

    Raises:
        StorageError: images cannot be read at present.
    """
    portions = [np.arange(start, min(start + PORTION, len(index))) for start in range(0, len(index), PORTION)]
    own = portions[ranks.rank() :: ranks.world_size()]
    errors: dict[int, str] = {}
    barrier = ProgressBarrier()
    total = sum(map(len, own))
    with Progress("inspection", "images", total, is_shown=ranks.rank() == 0) as progress:
        reader = _Reader(index, cache_dir, cache, max_image_pixels)
        for samples, found in reader.read(own, _threads(index, workers)):
            for sample, one in zip(samples.tolist(), found, strict=True):
                if isinstance(one, DataError):
                    errors[sample] = str(one)
                else:
                    records[sample] = one
            progress.advance(len(samples))
            barrier.tick()
    barrier.wait()
    if ranks.world_size() == 1:
        return errors
    for start in range(0, math.ceil(len(portions) / ranks.world_size()), PORTIONS_PER_GATHER):
        chosen = np.concatenate([np.empty(0, np.int64), *own[start : start + PORTIONS_PER_GATHER]])
        for places, values in ranks.gather((chosen, records[chosen])):
            records[places] = values
    return {sample: reason for each in ranks.gather(errors) for sample, reason in each.items()}


def record_of(content: bytes, max_image_pixels: int) -> Records:
    """The record of one image, a scalar of :data:`RECORD`.

    Raises:
        DataError: it cannot be decoded.
    """
    pixels = decode_pixels(content, DECODED, max_image_pixels)
    height, width = pixels.shape[:2]
    record = np.zeros((), RECORD)
    record["readable"] = True
    record["content"] = np.void(hashlib.sha256(content).digest()[:16])
    shape = f"{height} {width} ".encode()
    record["pixels"] = np.void(hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes()).digest()[:16])
    record["height"], record["width"] = height, width
    record["deviation"] = float(pixels.reshape(-1, 3).std(0, dtype=np.float32).max())
    # The mean of each cell, which no change of size or of compression moves much.
    record["grey"] = np.asarray(Image.fromarray(pixels).convert("L").resize((GREY, GREY), Image.Resampling.BOX))
    return record


class _Reader:
    """Fetches and decodes images, some portions ahead."""

    def __init__(self, index: Index, cache_dir: str, cache: SampleCache | None, max_image_pixels: int) -> None:
        self._fetcher = Fetcher(index, cache_dir, cache)
        self._max_image_pixels = max_image_pixels

    def read(
        self, portions: list[npt.NDArray[np.int64]], threads: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], list[Records | DataError]]]:
        """(sample ids, record or error of each) for each portion, in order."""
        waiting = deque(portions)
        ahead: deque[tuple[npt.NDArray[np.int64], Future[list[Fetched]]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="inspect") as pool:
            while waiting or ahead:
                while waiting and len(ahead) < PORTIONS_AHEAD:
                    samples = waiting.popleft()
                    ahead.append((samples, self._fetcher.start(samples)))
                samples, future = ahead.popleft()
                yield samples, list(pool.map(self._record, future.result()))

    def _record(self, fetched: Fetched) -> Records | DataError:
        try:
            return record_of(self._fetcher.content(fetched), self._max_image_pixels)
        except DataError as error:
            return error


def _threads(index: Index, workers: int | None) -> int:
    if workers is not None and not any(map(storage.is_process_local, index.stores)):
        return max(workers, 1)
    return max(available_cpus() // ranks.local_world_size(), 1)
