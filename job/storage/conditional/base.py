"""What all stores with conditional writes have in common, and those that need nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from fsspec import AbstractFileSystem

from job import storage

in_process = threading.Lock()
"""POSIX locks do not exclude the threads of one process from one another, and the memory filesystem has none."""


class Versioned(NamedTuple):
    """Content of an object and the version it was read at."""

    data: bytes
    version: str


class Store(ABC):
    """One object in one kind of storage."""

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self.fs = fs
        self.path = path

    @abstractmethod
    def read(self) -> Versioned | None:
        """Read the object and its version; None if there is none."""

    @abstractmethod
    def write(self, data: bytes, version: str | None) -> str | None:
        """Write it if it has this version; returns the new one, or None."""

    @abstractmethod
    def remove(self, version: str) -> bool:
        """Delete it if it has this version; returns whether it did."""

    def weakness(self) -> str | None:
        """What conditional writes do not protect from here; None: nothing."""
        return None


class Compared(Store):
    """Reads, compares and writes: complete where nobody else writes in between, which subclasses see to."""

    def read(self) -> Versioned | None:
        """Read the object and its version; None if there is none."""
        try:
            data = bytes(self.fs.cat_file(self.path))
        except FileNotFoundError:
            return None
        return Versioned(data, hashlib.sha256(data).hexdigest())

    def write(self, data: bytes, version: str | None) -> str | None:
        """Write it if it has this version; returns the new one, or None."""
        with self.locked():
            current = self.read()
            if (None if current is None else current.version) != version:
                return None
            self.fs.pipe_file(self.path, data)
            return hashlib.sha256(data).hexdigest()

    def remove(self, version: str) -> bool:
        """Delete it if it has this version; returns whether it did."""
        with self.locked():
            current = self.read()
            if current is None or current.version != version:
                return False
            self.delete()
            return True

    def delete(self) -> None:
        """Delete it, whatever version it has; called within :meth:`locked`."""
        self.fs.rm_file(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other writers while the context lasts."""
        with in_process:
            yield


class Memory(Compared):
    """One process sees it."""


class Other(Compared):
    """A filesystem whose conditional writes this module does not know."""

    def weakness(self) -> str | None:
        """What conditional writes do not protect from here; None: nothing."""
        name = storage.protocols_of(self.fs)[0]
        return f"conditional writes are not supported on {name}://, so that two jobs that start at once may both get it"
