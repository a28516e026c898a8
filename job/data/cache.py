"""A bounded cache of samples on the node's disk, shared by all its processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import struct
import threading
import time
import uuid
import zlib
from pathlib import Path

from job.storage.local_cache import DISK_FULL, locked, private_folder, read_small, write_small

log = logging.getLogger(__name__)

_TRAILER = struct.Struct("<QL")
"""Size and CRC-32 of the content before it: a file that was cut or changed is detected."""
ACCOUNTED_BYTES = 1 << 20
"""Bytes that a process writes before it updates the shared total."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
KEPT_AFTER_EVICTION = 0.9
STALE_SECONDS = 3600
"""Age at which an unfinished file counts as stale."""


_counting = threading.Lock()
"""Excludes the threads of one process; as an attribute it would keep a cache from being pickled."""


class SampleCache:
    """A least-recently-used cache of files by key, bounded in bytes.

    A file appears by rename, whole. The total is kept in a file under a lock, and may exceed ``limit``
    by :data:`ACCOUNTED_BYTES` and a file for each process that writes.

    Args:
        folder: local folder; several caches may not share it, several processes may.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._total = folder / "total"
        self._full = False
        self._unaccounted = 0
        self._token = uuid.uuid4().hex  # containers may share the folder, and have equal PIDs

    def recount(self) -> None:
        """Create the folder, delete stale temporary files, and count the bytes in it.

        Raises:
            OSError: the folder cannot be written.
        """
        private_folder(self.folder)
        with locked(self._total):
            for unfinished in self.folder.glob(f".{self._total.name}-*"):
                unfinished.unlink()
            self._store_total(self._evict(self._entries()))

    def get(self, key: str) -> bytes | None:
        """The content stored under ``key``, or None."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                stored = file.read() or b""
        except OSError:  # missing or unreadable: it is read from the bucket
            return None
        content, trailer = stored[: -_TRAILER.size], stored[-_TRAILER.size :]
        if trailer != _trailer(content):
            log.warning("%s is damaged and is fetched again", path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # access times are off on many disks
        return content

    def put(self, key: str, content: bytes) -> None:
        """Store ``content``; when the disk is full or unwritable, warn once and store nothing."""
        if self._full:
            return
        path = self._path(key)
        temporary = f"{os.path.dirname(path)}/.{self._token}-{os.getpid()}-{threading.get_ident()}"
        try:
            try:
                file = os.open(temporary, _NEW, 0o600)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                file = os.open(temporary, _NEW, 0o600)
            try:
                written = os.writev(file, (content, _trailer(content)))
            finally:
                os.close(file)
            if written < len(content) + _TRAILER.size:
                raise OSError(errno.ENOSPC, "No space left on device")
            os.rename(temporary, path)
            with _counting:
                self._unaccounted += written
                if self._unaccounted >= ACCOUNTED_BYTES:
                    self._account()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Store nothing from now on; the reason is logged once."""
        if self._first_failure():
            reason = "is full" if error.errno in DISK_FULL else f"cannot be written ({error.strerror})"
            log.warning(
                "%s %s: from here on images are read without a cache. Choose another folder by --data.cache_dir, "
                "or a smaller --data.cache_gb.",
                self.folder,
                reason,
            )

    def _first_failure(self) -> bool:
        with _counting:
            was_full, self._full = self._full, True
        return not was_full

    def _account(self) -> None:
        with locked(self._total):
            total = self._read_total() + self._unaccounted
            self._unaccounted = 0
            self._store_total(self._evict(self._entries()) if total > self.limit else total)

    def _path(self, key: str) -> str:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return f"{self.folder}/{name[:2]}/{name[2:]}"

    def _entries(self) -> list[tuple[float, int, str]]:
        """(last use, bytes, path) of all files; deletes stale unfinished ones."""
        entries = []
        for folder in (each for each in os.scandir(self.folder) if each.is_dir(follow_symlinks=False)):
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):  # another process evicts, too
                    details = entry.stat(follow_symlinks=False)
                    if not entry.name.startswith("."):
                        entries.append((details.st_mtime, details.st_size, entry.path))
                    elif time.time() - details.st_mtime > STALE_SECONDS:
                        Path(entry.path).unlink()
        return entries

    def _evict(self, entries: list[tuple[float, int, str]]) -> int:
        """Remove the least recently used until there is room; returns the bytes that stay."""
        total = sum(size for _, size, _ in entries)
        if total <= self.limit:
            return total
        for _, size, path in sorted(entries):
            if total <= self.limit * KEPT_AFTER_EVICTION:
                break
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            total -= size
        return total

    def _read_total(self) -> int:
        """The total in the file, or a count where the file holds no plausible number."""
        stored = read_small(self._total)
        if stored is not None and stored.isdigit() and len(stored) <= 15:
            return int(stored)
        return sum(size for _, size, _ in self._entries())

    def _store_total(self, total: int) -> None:
        write_small(self._total, str(total).encode())


def _trailer(content: bytes) -> bytes:
    return _TRAILER.pack(len(content), zlib.crc32(content))
