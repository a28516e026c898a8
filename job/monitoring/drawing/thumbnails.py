"""Thumbnails of a part's images, for TensorBoard and the report."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import TimeoutError as FutureTimeoutError

import numpy as np
from PIL import Image

from job.data.datamodule import ImageDataModule
from job.data.dataset import Preprocessing
from job.data.fetch import Fetched, Fetcher
from job.errors import StorageError
from job.monitoring.drawing.canvas import jpeg

log = logging.getLogger(__name__)

SIZE = 160
"""Height and width, in pixels."""
BYTES_PER_PIXEL = 0.32
"""Limit on a thumbnail's JPEG: 8 KB at 160 x 160 pixels."""
MOST_KEPT = 512
"""Thumbnails in memory."""
FETCH_SECONDS = 10.0
"""How long samples are waited for."""
PAUSE_SECONDS = 60.0
"""After an outage of the bucket no sample is fetched for so long: whoever wants a thumbnail must not wait again."""


class Thumbnails:
    """JPEG thumbnails of samples, resized as in evaluation; safe between threads.

    The images come through the data module's cache and limits. Nothing is raised for a sample that cannot be read.

    Args:
        data: the images, after ``setup``.
        part: train, val, test, …
        size: height and width, in pixels. The model's own input may be too small for a person to recognise.
    """

    def __init__(self, data: ImageDataModule, part: str, size: int = SIZE) -> None:
        self.size = size
        self.most_bytes = int(BYTES_PER_PIXEL * size * size)
        self._index = data.parts[part]
        self._fetcher = Fetcher(self._index, str(data.cache_dir), data.cache)
        self._preprocessing = Preprocessing(size, data.resize, max_image_pixels=data.max_image_pixels)
        self._kept: OrderedDict[int, bytes | None] = OrderedDict()
        self._paused_until = 0.0
        self._lock = threading.Lock()

    def jpeg(self, sample: int) -> bytes | None:
        """The thumbnail of one sample; None for one that cannot be read.

        Args:
            sample: sample id in the index of the part.
        """
        return self.jpegs([sample])[sample]

    def jpegs(self, samples: Iterable[int]) -> dict[int, bytes | None]:
        """The thumbnails of several samples by sample id, fetched together; None for those that cannot be read."""
        with self._lock:
            wanted = list(dict.fromkeys(int(sample) for sample in samples))
            absent = [sample for sample in wanted if sample not in self._kept and 0 <= sample < len(self._index)]
            for sample, fetched in self._fetched(absent).items():
                self._kept[sample] = self._encoded(fetched)
            jpegs = {sample: self._kept.get(sample) for sample in wanted}
            for sample in wanted:
                if sample in self._kept:
                    self._kept.move_to_end(sample)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return jpegs

    def _fetched(self, samples: list[int]) -> dict[int, Fetched]:
        """Samples as they are stored; none during an outage."""
        if not samples or time.monotonic() < self._paused_until:
            return {}
        try:
            future = self._fetcher.start(np.asarray(samples, np.int64))
            return dict(zip(samples, future.result(FETCH_SECONDS), strict=True))
        except (FutureTimeoutError, StorageError) as error:
            log.info("images for TensorBoard and the report cannot be fetched: %s", error or "no answer")
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            return {}

    def _encoded(self, fetched: Fetched) -> bytes | None:
        try:
            image = self._preprocessing.decoded(self._fetcher.content(fetched))
        except Exception as error:  # a decoder may raise anything; the run itself has counted the sample as unreadable
            log.debug("no thumbnail: %s", error)
            return None
        return jpeg(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), self.most_bytes)


class ValidationThumbnails:
    """The thumbnails of the validation part, of which all users fetch each once; safe between threads."""

    def __init__(self) -> None:
        self._thumbnails: Thumbnails | None = None
        self._lock = threading.Lock()

    def jpegs(self, data: ImageDataModule, samples: Iterable[int]) -> dict[int, bytes | None]:
        """:meth:`Thumbnails.jpegs`, of the data module's validation part; the same data module at each call."""
        with self._lock:
            if self._thumbnails is None:
                self._thumbnails = Thumbnails(data, "val")
        return self._thumbnails.jpegs(samples)
