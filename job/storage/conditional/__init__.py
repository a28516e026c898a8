"""Conditional writes: an object is written or deleted only if it is still the version that was read.

Google Cloud Storage has generations (ifGenerationMatch), S3 has entity tags (If-Match, If-None-Match), a disk has
POSIX locks. fsspec offers "create if absent" only (https://github.com/fsspec/filesystem_spec/issues/1693). This module
therefore sends the request itself through the filesystem's connection: ``_call`` of gcsfs and ``_call_s3`` of s3fs.
tests/integration/test_conditional.py notices when they change.
"""

from __future__ import annotations

from collections.abc import Callable

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from job import storage
from job.storage.conditional.base import Memory, Other, Store, Versioned
from job.storage.conditional.disk import Disk
from job.storage.conditional.google import GoogleCloudStorage
from job.storage.conditional.s3 import S3

__all__ = ["Versioned", "read_versioned", "remove_if", "weakness", "write_if"]


def read_versioned(uri: str) -> Versioned | None:
    """Read an object and its version; None if there is no object.

    Raises:
        StorageError: it cannot be read.
    """
    store = _store(uri)
    with storage.translate_errors(uri, "read"):
        return store.read()


def write_if(uri: str, data: bytes, version: str | None) -> str | None:
    """Write ``data`` if the object still has ``version``, or, for None, if there is no object.

    A filesystem repeats a request whose answer was lost, and the repetition is refused since the first one succeeded.
    An object that holds ``data`` therefore counts as written: the content of each call must be unique.

    Returns:
        The new version; None if the object has another version.

    Raises:
        StorageError: it cannot be written.
    """
    store = _store(uri)
    with storage.translate_errors(uri, "write"):
        written = store.write(data, version)
        if written is None:
            current = store.read()
            if current is not None and current.data == data:
                return current.version
        return written


def remove_if(uri: str, version: str) -> bool:
    """Delete an object if it still has ``version``; returns whether it did.

    Raises:
        StorageError: it cannot be deleted.
    """
    store = _store(uri)
    with storage.translate_errors(uri, "delete"):
        return store.remove(version)


def weakness(uri: str) -> str | None:
    """What conditional writes at ``uri`` do not protect from, as a clause for a message; None: they are complete."""
    store = _store(uri)
    with storage.translate_errors(uri, "write"):
        return store.weakness()


_STORES: dict[str, Callable[[AbstractFileSystem, str], Store]] = {
    "gs": GoogleCloudStorage,
    "s3": S3,
    "memory": Memory,
}


def _store(uri: str) -> Store:
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return Disk(fs, path)
    kind = next((_STORES[name] for name in storage.protocols_of(fs) if name in _STORES), Other)
    return kind(fs, path)
