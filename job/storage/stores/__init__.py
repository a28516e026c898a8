"""One class per kind of storage, with its specific reads, listings, writes, conditions and errors."""

from __future__ import annotations

import fsspec

from job.storage.stores.base import Store
from job.storage.stores.google import GoogleCloudStorage
from job.storage.stores.local import LocalDisk
from job.storage.stores.memory import Memory
from job.storage.stores.s3 import S3
from job.storage.stores.web import WebServer

__all__ = ["STORES", "Store", "store_for"]

STORES: tuple[type[Store], ...] = (LocalDisk, WebServer, GoogleCloudStorage, S3, Memory)
"""A new kind of storage is one line here; any other filesystem is served by :class:`Store` itself."""


def store_for(fs: fsspec.AbstractFileSystem) -> Store:
    """The store that serves ``fs``."""
    return next((kind for kind in STORES if kind.serves(fs)), Store)(fs)
