"""Predictions of URIs that come one per line, for pipes: in their order, as soon as they can be read."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TextIO

import torch
from torch import Tensor

from job import redact, storage
from job.data.bad_samples import BadSampleLimit
from job.data.index.access import Access, is_local_uri, refusal
from job.data.index.bounded import LARGEST_MEMBER
from job.data.index.sources.base import LONGEST_KEY
from job.data.index.sources.table import split_uri
from job.data.workers import one_core_threads
from job.errors import DataError, JobError, StorageOutage, first_line
from job.predict.output import ImageModel, Row, json_line
from job.process import logs

LEAST_THREADS = 16
"""Threads that fetch and decode, at least: most of the time they wait for a bucket."""
WAIT_SECONDS = 0.1
"""Time that the first image of a batch waits for others."""
SHOWN = 200
"""Characters of a line that is too long for a URI, in its row."""
PAUSES = (0.5, 2.0)
"""Seconds after which a line is tried again whose bucket or server has an outage."""
READERS = 64
"""Buckets and servers that are kept open."""
_Image = Row | tuple[str, Tensor]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines of a stream without their ends, empty ones left out; of one that is too long, its beginning.

    No more of a line than :data:`~job.data.index.sources.base.LONGEST_KEY` bytes is held in memory.
    """
    is_first = True
    while chunk := stream.readline(LONGEST_KEY + 2):
        line = chunk
        while not chunk.endswith(b"\n") and (chunk := stream.readline(LONGEST_KEY)):
            line = line[: LONGEST_KEY + 2]
            line += chunk[: LONGEST_KEY + 2 - len(line)]
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if is_first:
            line, is_first = line.removeprefix(_BYTE_ORDER_MARK), False
        if line:
            yield line


def answer_lines(
    predictor: ImageModel,
    stdin: IO[bytes],
    stdout: TextIO,
    access: Access,
    batch_size: int,
    num_workers: int,
    *,
    limit: BadSampleLimit,
    top_k: int | None = None,
    results: str = "predictions",
) -> None:
    """Write a JSON line for each line that comes, until there are no more or nobody reads the output.

    Args:
        predictor: the network.
        stdin: URIs or paths, one per line.
        stdout: flushed after each batch.
        access: see :func:`predict_lines`.
        batch_size: images of the largest batch.
        num_workers: threads that decode.
        limit: of unreadable images.
        top_k: number of most probable classes whose probabilities are written; None: all.
        results: plural of what is computed, for the log.

    Raises:
        DataError: more images are unreadable; all lines are answered.
    """
    images = unreadable = 0
    for rows in predict_lines(predictor, read_lines(stdin), access, batch_size, num_workers):
        images += len(rows)
        unreadable += sum(row.error is not None for row in rows)
        try:
            # ASCII: names from elsewhere have no control characters there.
            stdout.writelines(json_line(row.as_json(predictor, top_k), ascii=True) for row in rows)
            stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # for what its buffer still holds
            logs.report(f"standard output was closed after {images:,} lines.", logging.WARNING)
            return
    logs.report(f"{images - unreadable:,} {results} of {images:,} lines", logging.INFO)
    if unreadable > (allowed := limit.allowed(images)):
        raise DataError(
            f"{unreadable:,} line(s) name no readable image, {allowed:,} allowed: see the rows with an error, or allow "
            "some by --max_bad_samples."
        )


def predict_lines(
    predictor: ImageModel, lines: Iterable[bytes], access: Access, batch_size: int, num_workers: int
) -> Iterator[list[Row]]:
    """Classify the images that lines name, in their order.

    Lines may name what a local table may: local files, objects of object stores, and public web servers. A batch is
    computed when it is full, or :data:`WAIT_SECONDS` after its first line. At most two batches are read ahead.

    Args:
        predictor: the network.
        lines: a URI or path each; they may block.
        access: what lines may name besides.
        batch_size: images of the largest batch.
        num_workers: threads that decode.

    Yields:
        rows, one per line; a line that names no image, or one that cannot be read, has an error.
    """
    images = _Images(predictor, access)
    ahead: queue.Queue[Future[_Image] | BaseException | None] = queue.Queue(2 * batch_size)
    pool = one_core_threads(max(num_workers, LEAST_THREADS))

    def submit_all() -> None:
        try:
            for line in lines:
                ahead.put(pool.submit(images.row, line))
            ahead.put(None)
        except BaseException as error:  # raised in the consuming thread
            ahead.put(error)

    # A daemon: it may wait for a line that never comes.
    threading.Thread(target=submit_all, name="read-lines", daemon=True).start()
    try:
        for batch in _batches(ahead, batch_size):
            yield _predict(predictor, [future.result() for future in batch])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(
    ahead: queue.Queue[Future[_Image] | BaseException | None], batch_size: int
) -> Iterator[list[Future[_Image]]]:
    """Items as they come, in batches that are full or whose first item has waited."""
    batch: list[Future[_Image]] = []
    deadline = 0.0
    while True:
        try:
            item = ahead.get(timeout=max(deadline - time.monotonic(), 0) if batch else None)
        except queue.Empty:
            yield batch
            batch = []
            continue
        if isinstance(item, Future):
            if not batch:
                deadline = time.monotonic() + WAIT_SECONDS
            batch.append(item)
        if batch and (not isinstance(item, Future) or len(batch) == batch_size):
            yield batch
            batch = []
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return


def _predict(predictor: ImageModel, images: list[_Image]) -> list[Row]:
    pixels = [image[1] for image in images if not isinstance(image, Row)]
    predictions = iter(predictor.predict_batch(torch.stack(pixels)) if pixels else [])
    return [image if isinstance(image, Row) else Row(image[0], next(predictions)) for image in images]


class _Images:
    """Fetches and decodes the images that lines name, in many threads.

    Args:
        predictor: whose preprocessing is used.
        access: what lines may name besides local files, object stores and public web servers.
    """

    def __init__(self, predictor: ImageModel, access: Access) -> None:
        self.access = access
        self.preprocessing = predictor.preprocessing
        self._folder = str(Path.cwd())
        self._reader = functools.lru_cache(READERS)(self._open)

    def row(self, line: bytes) -> _Image:
        """The URI, without credentials, and the pixels uint8 [3, S, S]; or a row with an error."""
        shown = line[: LONGEST_KEY if len(line) <= LONGEST_KEY else SHOWN].decode(errors="backslashreplace")
        try:
            uri = _checked(line)
            shown = redact.identity(uri)
            return shown, self.preprocessing.decoded(self._read(uri))
        except storage.NotFound:
            return Row(shown, error="does not exist")
        except JobError as error:
            text = redact.redact(first_line(error)).removeprefix(f"cannot read {shown}: ").removeprefix(f"{shown} ")
            return Row(shown, error=text)

    def _read(self, uri: str) -> bytes:
        is_local = is_local_uri(uri)
        if not is_local and (reason := self.access.problem(uri, local=False)):
            raise DataError(refusal(reason))
        root, key = split_uri(uri, self._folder)
        for pause in PAUSES:
            with contextlib.suppress(StorageOutage):
                return self._reader(root).read(key)
            time.sleep(pause)
        return self._reader(root).read(key)

    def _open(self, root: str) -> storage.Reader:
        with self.access.guarded():  # the reader keeps the filesystem that is opened here
            return storage.Reader(root, LARGEST_MEMBER)


def _checked(line: bytes) -> str:
    """The URI in a line.

    Raises:
        DataError: it is none.
    """
    if len(line) > LONGEST_KEY:
        raise DataError(f"is no URI: it has more than {LONGEST_KEY:,} bytes")
    if b"\0" in line:
        raise DataError("is no URI: it holds a zero byte")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError("is no URI: it is not UTF-8") from error
