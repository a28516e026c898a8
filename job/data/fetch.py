"""Fetch samples: many requests in flight, retried, hedged and cached."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from job import storage
from job.data.cache import SampleCache
from job.data.index.bounded import LARGEST_MEMBER
from job.data.index.index import Index, Sample
from job.data.index.local_copy import materialise
from job.data.index.sources import format_of
from job.data.neighbours import Neighbours
from job.errors import DataError, StorageError, StorageOutage
from job.process.jitter import jittered
from job.storage.checksums import TooLarge

REQUESTS = storage.CONNECTIONS
"""Requests that a process has in flight."""
GAP_BYTES = 64 << 10
"""A gap between two ranges that is cheaper to read than to send a second request."""
REQUEST_BYTES = 8 << 20
"""Ranges are joined up to this size."""
ATTEMPT_SECONDS = 30.0
"""A request that takes longer is cancelled and sent again."""
RETRY_SECONDS = 120.0
"""Time after which a range that cannot be fetched is an error."""
HEDGE_AFTER = 3.0
"""Hedged request: sent when the first takes this many times the 95th percentile of latencies …"""
HEDGE_LEAST_SECONDS = 0.25
"""… and at least this long; for less than :data:`HEDGE_SHARE` of all requests, so as not to slow down a slow bucket."""
HEDGE_SHARE = 0.05
LATENCIES = 50
"""Requests per estimate of the 95th percentile."""
BATCHES_AT_ONCE = 32


class Range(NamedTuple):
    """One request.

    Attributes:
        source: number of the source.
        key: object below it; empty for the source itself (an archive).
        offset: first byte.
        size: bytes; -1: the whole object.
        samples: those that lie in it.
    """

    source: int
    key: str
    offset: int
    size: int
    samples: tuple[int, ...]


class Fetched(NamedTuple):
    """A sample as it was read; :meth:`Fetcher.content` unpacks it.

    Prefetched samples stay packed, so that their memory is what the index says, whatever they expand to.

    Attributes:
        sample: its place.
        raw: its bytes, or the error for which it is not read.
        is_stored: it need not be put into the cache.
    """

    sample: Sample
    raw: bytes | DataError
    is_stored: bool = True

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return len(self.raw) if isinstance(self.raw, bytes) else 0


class Fetcher:
    """Reads samples of an index ahead of their use.

    Args:
        cache_dir: local folder of copies of archives that cannot be read in parts.
        cache: of samples from buckets; None: no cache.
    """

    def __init__(self, index: Index, cache_dir: str, cache: SampleCache | None = None) -> None:
        self.index = index
        self.cache = cache
        self.cache_dir = cache_dir
        self._neighbours = Neighbours(index, cache)
        self._readers: dict[int, storage.Reader] = {}
        self._pool = ThreadPoolExecutor(BATCHES_AT_ONCE, thread_name_prefix="fetch")
        self._slots: asyncio.Semaphore | None = None
        self._seconds: list[float] = []
        self._patience = ATTEMPT_SECONDS / 2  # until there is an estimate
        self._requests = 0
        self._hedged = 0

    def start(self, samples: npt.NDArray[np.int64]) -> Future[list[Fetched]]:
        """Start to read; the future returns each sample as it is stored in its source.

        A sample that is an object of its own and cannot be read, for another reason than an outage, is a
        :class:`~job.errors.DataError` in its place. The future raises :class:`~job.errors.StorageError` for an outage,
        and for an archive that cannot be read.
        """
        return self._pool.submit(self._read, samples.tolist())

    def content(self, fetched: Fetched) -> bytes:
        """The content of a sample; one that comes from a bucket is put into the cache.

        Raises:
            DataError: the sample is too large, or damaged in its archive.
        """
        sample, raw = fetched.sample, fetched.raw
        if isinstance(raw, DataError):
            raise raw
        content = format_of(self.index.sources[sample.source]).unpack(raw, sample.version)
        if self.cache and not fetched.is_stored:
            self.cache.put(self._cache_key(sample), raw)
        return content

    def _read(self, samples: list[int]) -> list[Fetched]:
        places = dict(zip(samples, self.index.rows(samples), strict=True))
        fetched: dict[int, Fetched] = {}
        far: dict[int, Sample] = {}
        for number, sample in places.items():
            reader = self._reader(sample.source)
            if sample.size > LARGEST_MEMBER:
                fetched[number] = Fetched(sample, _too_large(sample.size))
            elif reader.is_local:
                fetched[number] = Fetched(sample, self._read_here(reader, sample))
            elif (cached := self._cached(sample)) is not None:
                fetched[number] = Fetched(sample, cached)
            else:
                far[number] = sample
        if far:
            fetched |= self._read_far(far)
        return [fetched[number] for number in samples]

    def _read_far(self, far: dict[int, Sample]) -> dict[int, Fetched]:
        """Samples of buckets that are not in the cache; the neighbours of those in archives are put into it."""
        members = [number for number, sample in far.items() if sample.offset >= 0]
        with self._neighbours.claimed(members if self.cache and self.cache.accepts else []) as claim:
            # A batch that has just fetched the same groups may have ended between the first look and the claim.
            fetched = self._all_cached({number: far[number] for number in claim.samples & far.keys()})
            own = {n: sample for n, sample in far.items() if n not in claim.elsewhere and n not in fetched}
            sources = {far[number].source for number in members}
            others = sorted(claim.samples - far.keys())
            neighbours = {
                number: sample
                for number, sample in zip(others, self.index.rows(others), strict=True)
                if sample.source in sources and self._is_fetchable_neighbour(sample)
            }
            for number, raw in (self._fetch_all(own, neighbours) if own else {}).items():
                if number in neighbours:
                    self._keep_neighbour(neighbours[number], raw)
                else:
                    fetched[number] = self._kept(own[number], raw)
        if claim.elsewhere:  # after the own ones, so that no two batches wait for one another
            self._neighbours.wait(claim.elsewhere)
            fetched |= self._all_cached({number: far[number] for number in claim.elsewhere})
            late = {number: far[number] for number in claim.elsewhere if number not in fetched}
            for number, raw in (self._fetch_all(late, {}) if late else {}).items():
                fetched[number] = self._kept(late[number], raw)
        return fetched

    def _cached(self, sample: Sample) -> bytes | None:
        """The bytes of a sample that is in the cache, else None."""
        raw = self.cache.get(self._cache_key(sample)) if self.cache else None
        return raw if raw is not None and sample.size in (-1, len(raw)) else None

    def _all_cached(self, samples: dict[int, Sample]) -> dict[int, Fetched]:
        """Those of some samples that are in the cache."""
        contents = {number: self._cached(sample) for number, sample in samples.items()}
        return {n: Fetched(samples[n], content) for n, content in contents.items() if content is not None}

    def _kept(self, sample: Sample, raw: bytes | DataError) -> Fetched:
        """A sample that was just read, which the cache keeps if it is intact."""
        raw = self._checked(sample, raw)
        return Fetched(sample, raw, self._store(sample, raw))

    def _is_fetchable_neighbour(self, sample: Sample) -> bool:
        return (
            0 <= sample.size <= LARGEST_MEMBER
            and sample.offset >= 0
            and self.cache is not None
            and not self.cache.has(self._cache_key(sample))
        )

    def _keep_neighbour(self, sample: Sample, raw: bytes | DataError) -> None:
        """Put a neighbour into the cache; a damaged one is an error when it is used."""
        with contextlib.suppress(DataError):
            if isinstance(raw, bytes) and len(raw) == sample.size and self.cache is not None:
                format_of(self.index.sources[sample.source]).unpack(raw, sample.version)
                self.cache.put(self._cache_key(sample), raw)

    def _read_here(self, reader: storage.Reader, sample: Sample) -> bytes | DataError:
        try:
            raw = reader.read(sample.key) if sample.offset < 0 else reader.read("", sample.offset, sample.size)
        except StorageError as error:
            return self._bad_sample(error, sample.source, sample.key, sample.offset)
        return self._checked(sample, raw)

    def _fetch_all(self, own: dict[int, Sample], neighbours: dict[int, Sample]) -> dict[int, bytes | DataError]:
        """The bytes of samples in buckets, by number; of neighbours as far as they share a request with them."""
        places = own | neighbours
        ranges = [one for one in joined(places) if not own.keys().isdisjoint(one.samples)]
        responses: dict[Range, bytes | DataError] = {
            one: self._read_waiting(one) for one in ranges if not self._reader(one.source).is_async
        }
        if remote := [one for one in ranges if one not in responses]:

            async def gathered() -> list[bytes | DataError]:
                return await asyncio.gather(*(self._fetch(one) for one in remote))

            answers = asyncio.run_coroutine_threadsafe(gathered(), self._reader(remote[0].source).loop)
            responses |= zip(remote, answers.result(), strict=True)
        results: dict[int, bytes | DataError] = {}
        for one, content in responses.items():
            for number in one.samples:
                sample = places[number]
                start = sample.offset - one.offset
                if sample.offset >= 0 and isinstance(content, bytes):
                    results[number] = content[start : start + sample.size]
                else:
                    results[number] = content
        return results

    def _read_waiting(self, one: Range) -> bytes | DataError:
        try:
            return self._reader(one.source).read(one.key, max(one.offset, 0), None if one.offset < 0 else one.size)
        except StorageError as error:
            return self._bad_sample(error, one.source, one.key, one.offset)

    async def _fetch(self, one: Range) -> bytes | DataError:
        """Fetch one range; retry with jittered backoff while the bucket has an outage."""
        if self._slots is None:
            self._slots = asyncio.Semaphore(REQUESTS)
        deadline, pause, lengths = time.monotonic() + RETRY_SECONDS, 0.25, []
        async with self._slots:
            while True:
                try:
                    content = await self._hedged_request(one)
                    if one.size < 0 or len(content) == one.size:
                        return content
                    lengths.append(len(content))
                    if len(lengths) >= 3 and len(set(lengths[-3:])) == 1:
                        # Not a truncated response but a changed object: three equal lengths are no accident.
                        return self._changed(one.source, one.offset, lengths[-1], one.size)
                    raise StorageOutage(f"cannot read {self._uri(one)}: {len(content)} of {one.size} bytes came")
                except StorageOutage:
                    if time.monotonic() + pause > deadline:
                        raise
                except StorageError as error:
                    return self._bad_sample(error, one.source, one.key, one.offset)
                await asyncio.sleep(jittered(pause))
                pause = min(pause * 2, 16.0)

    async def _hedged_request(self, one: Range) -> bytes:
        """One attempt; a slow request is hedged by a second one, and the first response wins."""
        deadline = time.monotonic() + ATTEMPT_SECONDS
        tasks = {asyncio.ensure_future(self._request(one))}
        patience = self._patience
        failure: BaseException | None = None
        try:
            while tasks:
                remaining = deadline - time.monotonic()
                done, tasks = await asyncio.wait(
                    tasks, timeout=min(remaining, patience), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    if (error := task.exception()) is None:
                        return task.result()
                    failure = error
                if not done and remaining <= patience:
                    break
                if not done and self._hedged <= HEDGE_SHARE * self._requests:
                    self._hedged += 1
                    tasks.add(asyncio.ensure_future(self._request(one)))
                    patience = ATTEMPT_SECONDS
        finally:
            for task in tasks:
                task.cancel()
        raise failure or StorageOutage(f"cannot read {self._uri(one)}: no answer within {ATTEMPT_SECONDS:.0f} s")

    async def _request(self, one: Range) -> bytes:
        self._requests += 1
        began = time.monotonic()
        start, length = max(one.offset, 0), None if one.offset < 0 else one.size
        content = await self._reader(one.source).fetch(one.key, start, length, one.size)
        self._seconds.append(time.monotonic() - began)
        if len(self._seconds) == LATENCIES:
            slowest = float(np.percentile(self._seconds, 95))
            self._patience = max(HEDGE_AFTER * slowest, HEDGE_LEAST_SECONDS)
            self._seconds.clear()
        return content

    def _store(self, sample: Sample, raw: bytes | DataError) -> bool:
        """Put a sample from a bucket into the cache, unless it must be unpacked first to be verified."""
        if format_of(self.index.sources[sample.source]).is_packed:
            return False
        if self.cache and isinstance(raw, bytes):
            self.cache.put(self._cache_key(sample), raw)
        return True

    def _checked(self, sample: Sample, raw: bytes | DataError) -> bytes | DataError:
        if isinstance(raw, bytes) and sample.size >= 0 and len(raw) != sample.size:
            return self._changed(sample.source, sample.offset, len(raw), sample.size)
        return raw

    def _bad_sample(self, error: StorageError, source: int, key: str, offset: int) -> DataError:
        """The error for one object that cannot be read, in words that follow its URI.

        Raises:
            StorageError: the same error where it is an outage, or concerns an archive of many samples.
        """
        if isinstance(error, TooLarge):
            return _too_large()
        if isinstance(error, StorageOutage) or offset >= 0:
            raise error
        if isinstance(error, storage.NotFound):
            return DataError("does not exist")
        uri = storage.join(self.index.sources[source].uri, key)
        return DataError(f"cannot be read: {str(error).removeprefix(f'cannot read {uri}: ')}")

    def _changed(self, source: int, offset: int, size: int, expected: int) -> DataError:
        """The error for one object that has changed since it was listed; in an archive all offsets are wrong.

        Raises:
            StorageError: it is an archive.
        """
        if offset < 0:
            return DataError(f"has changed since it was listed: {size:,} bytes, {expected:,} then")
        raise StorageError(
            f"{self.index.sources[source].uri} gives {size:,} bytes, {expected:,} when it was listed: the data "
            "changed under the run. Put it back, or start a new run_dir (and make a saved index again by "
            "python -m job index)."
        )

    def _reader(self, source: int) -> storage.Reader:
        if source not in self._readers:
            access = self.index.access
            with access.guarded():  # the reader keeps the filesystem that is opened here
                root = materialise(self.index.sources[source], self.cache_dir, access)
                self._readers[source] = storage.Reader(root, LARGEST_MEMBER)
        return self._readers[source]

    def _uri(self, one: Range) -> str:
        root = self.index.sources[one.source].uri
        return storage.join(root, one.key) if one.key else root

    def _cache_key(self, sample: Sample) -> str:
        version = str(sample.version or self.index.created)
        source = self.index.sources[sample.source]
        # Members of a zip are cached packed; earlier versions cached them unpacked.
        place = f"{sample.offset} {sample.size}" + (" packed" if format_of(source).is_packed else "")
        return "\0".join((source.uri, sample.key, place, version))


def joined(samples: dict[int, Sample]) -> list[Range]:
    """The requests for some samples; ranges of one archive that lie close together become one."""
    ranges: list[Range] = []
    for number, sample in sorted(samples.items(), key=lambda item: (item[1].source, item[1].offset)):
        last = ranges[-1] if ranges else None
        if sample.offset < 0:
            ranges.append(Range(sample.source, sample.key, -1, sample.size, (number,)))
        elif (
            last is not None
            and last.source == sample.source
            and last.offset >= 0
            and sample.offset - (last.offset + last.size) <= GAP_BYTES
            and sample.offset + sample.size - last.offset <= REQUEST_BYTES
        ):
            end = max(last.offset + last.size, sample.offset + sample.size)
            ranges[-1] = last._replace(size=end - last.offset, samples=(*last.samples, number))
        else:
            ranges.append(Range(sample.source, "", sample.offset, sample.size, (number,)))
    return ranges


def _too_large(size: int | None = None) -> DataError:
    described = "" if size is None else f" ({size:,} bytes)"
    return DataError(f"is refused: larger than {LARGEST_MEMBER:,} bytes{described}")
