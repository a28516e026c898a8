"""The base class of all kinds of storage; by itself it serves any fsspec filesystem."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import fsspec
from fsspec.asyn import AsyncFileSystem

from job.storage.bucket_settings import BucketSettings
from job.storage.checksums import Checksum, bounded_range, require_within
from job.storage.fsspec_internals import cat_file, info
from job.storage.http_status import cause_of_not_found

in_process = threading.Lock()
"""POSIX locks do not exclude the threads of one process from one another, and the memory filesystem has none."""


class Versioned(NamedTuple):
    """Content of an object and the version it was read at."""

    data: bytes
    version: str


class Store:
    """One kind of storage, on the filesystem that fsspec has opened for it.

    A subclass overrides what its storage does better or differently: one file in this folder, and one line in
    :data:`job.storage.stores.STORES`.

    Attributes:
        protocols: fsspec's names of the protocols that the class serves.
        on_disk: objects are files of this machine.
        in_memory: objects are in the memory of this process, which no other process sees.
        libraries: packages whose own exceptions report a failure of the remote store.
        mistakes: names of those exceptions of the packages that a retry does not help against.
    """

    protocols: ClassVar[tuple[str, ...]] = ()
    on_disk: ClassVar[bool] = False
    in_memory: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()
    mistakes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self.fs = fs

    @classmethod
    def serves(cls, fs: fsspec.AbstractFileSystem) -> bool:
        """Whether the class is the one for ``fs``."""
        return not set(cls.protocols).isdisjoint(protocols_of(fs))

    @property
    def is_async(self) -> bool:
        """Whether :meth:`fetch` and :meth:`fetch_range` can be awaited."""
        return isinstance(self.fs, AsyncFileSystem)

    # Names

    def child(self, root: str, path: str, key: str) -> str:
        """The path in the filesystem of the object ``key`` below a root; of the root for the empty key.

        Args:
            root: URI of the root.
            path: its path in the filesystem.
            key: path below it.
        """
        prefix = path.rstrip("/") + "/" if path else ""
        return prefix + key if key else prefix.rstrip("/")

    def is_missing(self, error: BaseException) -> bool:
        """Whether an exception of a lookup means that there is no such object.

        It does not if another exception is behind it: chained filesystems report a failed connection like this.
        """
        return cause_of_not_found(error) is error

    # Listings

    def listing_root(self, path: str) -> str:
        """``path`` as a prefix of the names that :meth:`list_folder` returns."""
        return path.rstrip("/")

    def list_folder(self, folder: str) -> list[dict[str, Any]]:
        """The details of what lies directly in a folder."""
        listing: list[dict[str, Any]] = self.fs.ls(folder or self.fs.root_marker, detail=True)
        return listing

    def has_empty_folder(self, path: str) -> bool:
        """Whether the store knows a folder at ``path`` even if nothing lies in it."""
        return False

    # Reads

    def for_reading(self) -> Store:
        """The store to read many objects from."""
        return self

    def serves_ranges(self, path: str) -> bool:
        """Whether parts of an object can be read."""
        return True

    def read(self, path: str, uri: str, start: int, length: int | None, largest: int | None) -> bytes:
        """``length`` bytes from ``start`` on, or the whole object if it has at most ``largest`` bytes.

        Raises:
            TooLarge: the whole object is larger than ``largest``.
        """
        limits = bounded_range(-1, largest) if length is None else {"start": start, "end": start + length}
        data: bytes = self.fs.cat_file(path, **limits)
        if length is None:
            require_within(len(data), uri, largest)
        return data

    async def fetch_info(self, path: str) -> dict[str, Any]:
        """The details that the filesystem reports of one object."""
        return await info(self.fs, path)

    async def fetch_range(self, path: str, start: int, length: int) -> bytes:
        """``length`` bytes from ``start`` on."""
        return await cat_file(self.fs, path, start=start, end=start + length)

    async def fetch(self, path: str, uri: str, size: int, largest: int | None) -> tuple[bytes, Checksum | None]:
        """The whole object, and the checksum that the store sends with it.

        Args:
            path: of the object.
            uri: for messages.
            size: bytes of the object when it was listed; -1: unknown.
            largest: bytes of the largest object to read; None: any.

        Raises:
            TooLarge: it is larger than ``largest``.
        """
        content = await cat_file(self.fs, path, **bounded_range(size, largest))
        require_within(len(content), uri, largest)
        return content, None

    # Writes

    def write(self, path: str, data: bytes, before_commit: Callable[[], None]) -> None:
        """Write an object whole or not at all; an object store's PUT is atomic by itself."""
        before_commit()
        self.fs.pipe_file(path, data)

    def upload(self, source: Path, path: str, before_commit: Callable[[], None]) -> dict[str, Any] | None:
        """:meth:`write` of a local file's content.

        Returns:
            the details that the store then reports; None where there is nothing to check.
        """
        before_commit()
        self.fs.put_file(str(source), path)
        details: dict[str, Any] = self.fs.info(path)
        return details

    # Conditional writes. Here they compare and then write: complete where :meth:`locked` excludes all other writers.

    def read_versioned(self, path: str) -> Versioned | None:
        """Read an object and its version; None if there is none."""
        try:
            data = bytes(self.fs.cat_file(path))
        except FileNotFoundError:
            return None
        return Versioned(data, hashlib.sha256(data).hexdigest())

    def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        """Write an object if it has this version, or does not exist for None; returns the new version, or None."""
        with self.locked(path):
            if self._version(path) != version:
                return None
            self.fs.pipe_file(path, data)
            return hashlib.sha256(data).hexdigest()

    def remove_if(self, path: str, version: str) -> bool:
        """Delete an object if it has this version; returns whether it did."""
        with self.locked(path):
            if self._version(path) != version:
                return False
            self.remove_locked(path)
            return True

    def remove_locked(self, path: str) -> None:
        """Delete an object, whatever version it has; called within :meth:`locked`."""
        self.fs.rm_file(path)

    @contextlib.contextmanager
    def locked(self, path: str) -> Iterator[None]:
        """Exclude other writers while the context lasts."""
        with in_process:
            yield

    def conditional_write_weakness(self, path: str) -> str | None:
        """Limit of the protection by conditional writes, as a clause for a message; None: there is none."""
        name = protocols_of(self.fs)[0]
        return f"conditional writes are not supported on {name}://, so that two jobs that start at once may both get it"

    # Settings

    def bucket_settings(self, path: str) -> BucketSettings | None:
        """Settings of the bucket that holds ``path``; None where the store does not tell them."""
        return None

    def _version(self, path: str) -> str | None:
        current = self.read_versioned(path)
        return None if current is None else current.version


def protocols_of(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """Names of the protocols that a filesystem serves."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
