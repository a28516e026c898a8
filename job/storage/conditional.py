"""Conditional writes: an object is written or deleted only if it is still the version that was read.

Each :class:`~job.storage.stores.base.Store` has its own way: Google Cloud Storage compares generations, S3 compares
entity tags, a disk has POSIX locks.
"""

from __future__ import annotations

from job.storage.errors import translate_errors
from job.storage.filesystems import store_of
from job.storage.stores.base import Versioned

__all__ = ["Versioned", "read_versioned", "remove_if", "weakness", "write_if"]


def read_versioned(uri: str) -> Versioned | None:
    """Read an object and its version; None if there is no object.

    Raises:
        StorageError: it cannot be read.
    """
    store, path = store_of(uri)
    with translate_errors(uri, "read"):
        return store.read_versioned(path)


def write_if(uri: str, data: bytes, version: str | None) -> str | None:
    """Write ``data`` if the object still has ``version``, or, for None, if there is no object.

    A filesystem repeats a request whose answer was lost, and the repetition is refused since the first one succeeded.
    An object that holds ``data`` therefore counts as written: the content of each call must be unique.

    Returns:
        The new version; None if the object has another version.

    Raises:
        StorageError: it cannot be written.
    """
    store, path = store_of(uri)
    with translate_errors(uri, "write"):
        written = store.write_if(path, data, version)
        if written is None:
            current = store.read_versioned(path)
            if current is not None and current.data == data:
                return current.version
        return written


def remove_if(uri: str, version: str) -> bool:
    """Delete an object if it still has ``version``; returns whether it did.

    Raises:
        StorageError: it cannot be deleted.
    """
    store, path = store_of(uri)
    with translate_errors(uri, "delete"):
        return store.remove_if(path, version)


def weakness(uri: str) -> str | None:
    """Limit of the protection by conditional writes at ``uri``, as a clause for a message; None: there is none."""
    store, path = store_of(uri)
    with translate_errors(uri, "write"):
        return store.conditional_write_weakness(path)
