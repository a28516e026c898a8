"""Dynamic batching: images of concurrent requests are computed together.

An image is admitted or refused at once, decoded by a pool of threads, and computed by the one thread that owns the
model. A batch begins when the model is free and there is an image. It waits up to ``max_wait_ms`` only for images that
can be expected: those that are being decoded, and as many as the batch before had. So a lone client does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from job.data.workers import one_core_threads
from job.errors import DataError
from job.predict.predictor import Prediction, Predictor
from job.serve.errors import Overloaded, RequestError
from job.serve.images import Image, prepare
from job.serve.metrics import Metrics
from job.serve.settings import Settings

log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Batches that fail in a row until the process ends: a device that has failed once often fails for ever."""
STUCK_SECONDS = 120.0
"""Time of a batch after which the model is considered stuck."""
_CLOSE_SECONDS = 5.0

Result = Prediction | DataError
T = TypeVar("T")


class Pending:
    """An image that was admitted.

    Args:
        image: as it came; None once it is decoded, or its request is given up.
        loop: of the request.

    Attributes:
        pixels: the network's input, once it is decoded.
        future: of its result; a cancelled one is not computed any longer.
    """

    __slots__ = ("future", "image", "pixels")

    def __init__(self, image: Image, loop: asyncio.AbstractEventLoop) -> None:
        self.image: Image | None = image
        self.pixels: Tensor | None = None
        self.future: asyncio.Future[Result] = loop.create_future()


class Batcher:
    """The model and the queue before it.

    Args:
        load: loads the model.
        settings: of the server.
        metrics: of the server.
        on_failure: called in the event loop when the model cannot be loaded, or has failed for good.

    Attributes:
        predictor: the model; None until it is loaded.
        is_ready: whether the model is loaded and has computed a batch of each size.
        failure: why there will be no predictions any longer.
        admitted: images that wait or are computed.
    """

    def __init__(
        self, load: Callable[[], Predictor], settings: Settings, metrics: Metrics, on_failure: Callable[[], None]
    ) -> None:
        self.load = load
        self.limits = settings.limits
        self.metrics = metrics
        self.on_failure = on_failure
        self.predictor: Predictor | None = None
        self.is_ready = False
        self.failure: Exception | None = None
        self.admitted = 0
        self._loop = asyncio.get_running_loop()
        self._decoded: SimpleQueue[Pending | None] = SimpleQueue()
        self._decoders = one_core_threads(settings.num_workers)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._busy_since: float | None = None
        self._last_error: Exception | None = None
        self._is_closing = False

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def close(self) -> bool:
        """End the threads; returns whether the model's thread has ended."""
        self._is_closing = True
        self._decoded.put(None)
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._thread.join(_CLOSE_SECONDS)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the model has not failed, and its batch does not take longer than one can."""
        busy_since = self._busy_since
        return self.failure is None and (busy_since is None or time.monotonic() - busy_since < STUCK_SECONDS)

    async def predict(self, images: Sequence[Image]) -> list[Result]:
        """Classify images.

        Returns:
            for each image its prediction, or the error for an unreadable one.

        Raises:
            Overloaded: the queue is full.
            RequestError: the model is not ready, or has failed.
        """
        if not self.is_ready:
            raise RequestError(503, "the model is not ready yet.")
        if self.admitted + len(images) > self.limits.max_queue:
            raise Overloaded(
                f"the queue is full ({self.admitted} of {self.limits.max_queue} images wait). Try again later."
            )
        pending = [Pending(image, self._loop) for image in images]
        self.admitted += len(pending)
        for each in pending:
            self._decoders.submit(self._decode, each)
        try:
            return await asyncio.gather(*(each.future for each in pending))
        finally:
            for each in pending:
                each.image = None  # of a request that is given up, it no longer counts in --max_pending_mb

    def run_in_thread(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Call a function in a decoding thread, so that the event loop goes on."""
        return self._loop.run_in_executor(self._decoders, function)

    def _decode(self, pending: Pending) -> None:
        """Decode an image, in a thread of the pool."""
        predictor, image = self.predictor, pending.image
        assert predictor is not None
        pending.image = None
        result: Result | Exception | None = None
        if image is not None and not pending.future.cancelled():
            try:
                size, mode = predictor.net.image_size, predictor.resize
                pending.pixels = prepare(image, size, mode, self.limits.max_image_pixels)
            except DataError as error:
                result = error
            except Exception as error:  # a bug, or no memory; the thread must live on
                log.exception("an image could not be prepared:")
                result = error
        if pending.pixels is None:
            self._resolve([(pending, result)])
        else:
            self._decoded.put(pending)

    def _run(self) -> None:
        """Load the model and compute batches, until the server stops or the model fails."""
        try:
            self._load_and_warm()
            failures, previous = 0, 1
            while batch := self._next_batch(previous):
                previous = len(batch)
                failures = 0 if self._compute(batch) else failures + 1
                if failures == MOST_FAILURES and self._last_error is not None:
                    raise self._last_error
        except Exception as error:
            self.failure, self.is_ready = error, False
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self.on_failure)
            while pending := self._decoded.get():  # until the server stops: nobody waits for what cannot come
                self._resolve([(pending, error)])

    def _load_and_warm(self) -> None:
        """Load the model, and compute a batch of each power of two: libraries choose and compile at the first one."""
        began = time.monotonic()
        predictor = self.load()
        self.predictor = predictor
        side = predictor.net.image_size
        for size in _sizes(self.limits.max_batch_size):
            if self._is_closing:
                return
            predictor.predict_batch(torch.zeros(size, 3, side, side, dtype=torch.uint8))
        self.metrics.set_model(predictor)
        self.is_ready = True
        log.info(
            "ready after %.1f s: model %s, %d classes, on %s",
            time.monotonic() - began,
            predictor.fingerprint,
            len(predictor.classes),
            predictor.device,
        )

    def _next_batch(self, previous: int) -> list[Pending]:
        """Wait for images; empty when the server stops.

        Args:
            previous: size of the batch before.
        """
        batch: list[Pending] = []
        deadline = 0.0
        while len(batch) < self.limits.max_batch_size:
            try:
                # Whatever is there is taken; a batch that has begun waits only for images that are to be expected.
                pending = self._decoded.get(block=not batch)
            except Empty:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or len(batch) >= max(self.admitted, previous):
                    break
                try:
                    pending = self._decoded.get(timeout=remaining)
                except Empty:
                    break
            if pending is None:
                self._decoded.put(None)  # for the next call
                break
            if not batch:
                deadline = time.monotonic() + self.limits.max_wait_ms / 1000
            batch.append(pending)
        return batch

    def _compute(self, batch: list[Pending]) -> bool:
        """Compute a batch; returns whether that succeeded."""
        assert self.predictor is not None
        wanted = [each for each in batch if not each.future.cancelled()]
        self._resolve([(each, None) for each in batch if each.future.cancelled()])
        if not wanted:
            return True
        self._busy_since = time.monotonic()
        try:
            pixels = [each.pixels for each in wanted if each.pixels is not None]
            predictions = self.predictor.predict_batch(torch.stack(pixels))
        except Exception as error:
            log.exception("a batch of %d images failed:", len(wanted))
            self._last_error = error
            self._resolve([(each, error) for each in wanted])
            return False
        finally:
            self.metrics.observe_batch(len(wanted), time.monotonic() - self._busy_since)
            self._busy_since = None
        self._resolve(list(zip(wanted, predictions, strict=True)))
        return True

    def _resolve(self, results: list[tuple[Pending, Result | Exception | None]]) -> None:
        """Hand results to their requests, from any thread."""
        if results:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._set_results, results)

    def _set_results(self, results: Iterable[tuple[Pending, Result | Exception | None]]) -> None:
        for pending, result in results:
            self.admitted -= 1
            if pending.future.done():
                continue
            if isinstance(result, (Prediction, DataError)):
                pending.future.set_result(result)
            else:
                pending.future.set_exception(RequestError(500, "the model failed. See the log of the server."))


def _sizes(most: int) -> list[int]:
    """Powers of two up to ``most``, and ``most``."""
    return sorted({*(1 << power for power in range(most.bit_length())), most})
