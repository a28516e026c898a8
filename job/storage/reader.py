"""Read many objects below one root."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fsspec.asyn import sync

from job.errors import StorageError
from job.storage.checksums import ChecksumMismatch
from job.storage.errors import translate_errors, translate_unknown
from job.storage.filesystems import store_of
from job.storage.uris import join

log = logging.getLogger(__name__)


class Reader:
    """Reads objects below one root in the process that made it; it cannot be sent to another one.

    Whole objects are checked against the checksum that their store sends; a mismatch is a
    :class:`~job.storage.checksums.ChecksumMismatch`, a kind of outage, so that callers that retry read again.

    Args:
        largest: bytes of the largest object that is read whole; None: any.

    Attributes:
        is_local: reading costs no request.
        is_async: whether :meth:`fetch` can be awaited to have many requests in flight.
        mismatches: objects so far whose content did not match their checksum, each attempt counted.
    """

    def __init__(self, root: str, largest: int | None = None) -> None:
        self.root = root
        self.largest = largest
        self.mismatches = 0
        self._mismatched: dict[str, bytes] = {}
        self._checks_etags = True
        store, self._root_path = store_of(root)
        self.store = store.for_reading()
        self.is_local = store.on_disk or store.in_memory
        self.is_async = store.is_async

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where :meth:`fetch` must run: the event loop of this process's filesystems."""
        loop: asyncio.AbstractEventLoop = self.store.fs.loop
        return loop

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``start`` on of ``root/key`` (of ``root`` for the empty key), or all of it.

        Raises:
            StorageError: it cannot be read.
        """
        with translate_errors(self._uri(key), "read"), translate_unknown():
            if self.is_async:
                content: bytes = sync(self.loop, self._fetch_verified, key, start, length)
                return content
            return self.store.read(self._path(key), self._uri(key), start, length, self.largest)

    async def fetch(self, key: str, start: int = 0, length: int | None = None, size: int = -1) -> bytes:
        """:meth:`read` as a coroutine; one attempt.

        Args:
            key: of the object.
            start: first byte.
            length: number of bytes; None: all.
            size: bytes of the object when it was listed; -1: unknown.

        Raises:
            ChecksumMismatch: the content does not match its checksum.
        """
        try:
            if length is None:
                return await self._fetch_whole(key, size)
            return await self.store.fetch_range(self._path(key), start, length)
        except Exception:  # contexts around each of millions of requests would cost a tenth of them
            with translate_errors(self._uri(key), "read"), translate_unknown():
                raise

    async def fetch_info(self, key: str) -> dict[str, Any]:
        """The details that the filesystem reports of ``root/key``: ``size`` in bytes, checksums."""
        with translate_errors(self._uri(key), "look up"), translate_unknown():
            return await self.store.fetch_info(self._path(key))

    async def _fetch_verified(self, key: str, start: int, length: int | None) -> bytes:
        """:meth:`fetch`; content that does not match its checksum is requested again."""
        for pause in (0.1, 1.0, 4.0):
            try:
                return await self.fetch(key, start, length)
            except ChecksumMismatch:
                await asyncio.sleep(pause)
        return await self.fetch(key, start, length)

    async def _fetch_whole(self, key: str, size: int) -> bytes:
        uri = self._uri(key)
        content, checksum = await self.store.fetch(self._path(key), uri, size, self.largest)
        if checksum is None or checksum.matches(content):
            self._mismatched.pop(key, None)
            return content
        if not checksum.certain and not self._checks_etags:
            return content
        error = ChecksumMismatch(
            f"{uri}: the content does not match its {checksum.kind.upper()} in the store ({checksum.value})",
            content,
            checksum.certain,
        )
        self.mismatches += 1
        if self._mismatched.get(key) != error.digest:
            self._mismatched[key] = error.digest
            log.warning("%s. It is requested again (mismatches so far: %d)", error, self.mismatches)
            raise error
        # Two transfers do not fail alike.
        if error.certain:
            raise StorageError(
                f"{error}, in two equal downloads: it is damaged in the store. Upload it again."
            ) from error
        self._checks_etags = False
        log.warning("%s, in two equal downloads: ETags below %s are not MD5 checksums; not checked", error, self.root)
        return content

    def _uri(self, key: str) -> str:
        return join(self.root, key) if key else self.root

    def _path(self, key: str) -> str:
        return self.store.child(self.root, self._root_path, key)
