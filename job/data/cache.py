"""A bounded cache of samples on the node's disk, shared by all its processes.

Samples are appended to segments, many per write, by a thread of its own; no process waits for the disk. A record begins
with the digest of its key, its size and its CRC-32C; the :class:`~job.data.cache_table.Table` says where it lies. A
record that does not match is a cache miss, so that nothing needs to be synchronised: neither a killed process nor a
damaged disk can give a wrong sample.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import struct
import threading
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from job.data.cache_table import Place, Table
from job.errors import DISK_FULL
from job.process.file_lock import lock_exclusively
from job.storage.local_cache import locked, open_regular, private_folder

log = logging.getLogger(__name__)

_RECORD = struct.Struct("<16sLL")
"""Digest of the key, bytes and CRC-32C of the content that follows."""
BLOCK_BYTES = 1 << 20
"""Samples are written when they are so many bytes together …"""
BLOCK_SAMPLES = 500
"""… or so many: writev(2) takes 1,024 buffers, two per sample …"""
FLUSH_SECONDS = 0.5
"""… or after this time."""
FLUSH_LIMIT_SECONDS = 10.0
PENDING_BYTES = 64 << 20
"""Samples that wait for a slow disk, per process. More are not cached, so that no epoch is slower than the disk."""
LARGEST_SEGMENT = 256 << 20
FEWEST_SEGMENTS = 64
"""Segments of a full cache: what is evicted at once is a small part of it."""
OPEN_SEGMENTS = 256
"""Segments that a process keeps open for reading."""
KEPT_AFTER_EVICTION = 0.95
IDLE_SECONDS = 600
"""A segment from which nothing was read for so long may make room for others.

A shuffled epoch reads from all segments all the time. To evict one of them for other samples of the same data would
lose hits: where half of the data fits, least-recently-used caches hit 15 % of the time, and one that keeps what it has
50 %.
"""
TOUCH_SECONDS = 60
"""Precision of the time of the last use."""
NO_ROOM_SECONDS = 60
"""Pause before a process that found no room looks again."""
_SEGMENT_NAME = re.compile(r"([0-9a-f]{8})\.segment")
_OLD_FOLDER = re.compile(r"[0-9a-f]{2}")
_OLD_FILE = re.compile(r"[0-9a-f]{30}|\.[0-9a-f]{32}-\d+-\d+")
"""Earlier versions kept one file per sample: 00/0123…, and total for their bytes."""


class _Segment(NamedTuple):
    """A file of records.

    Attributes:
        used: time of the last use.
        size: bytes.
        number: in its name and in the table.
        path: of the file.
    """

    used: float
    size: int
    number: int
    path: Path


class _Reading:
    """A segment that this process reads from; the file is closed when no thread reads it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = FileIO(open_regular(path, os.O_RDONLY))
        self.touched = 0.0
        self.is_damaged = False

    def read(self, place: Place) -> bytes:
        """The bytes at a place; fewer where the segment ends before."""
        now = time.monotonic()
        if now - self.touched > TOUCH_SECONDS or not self.touched:
            self.touched = now
            with contextlib.suppress(OSError):
                os.utime(self.file.fileno())  # access times are off on many disks
        return os.pread(self.file.fileno(), place.size, place.offset)


class SampleCache:
    """A cache of samples by key, bounded in bytes.

    When it is full, segments that were not used for :data:`IDLE_SECONDS` are deleted, the least recently used first;
    those in use stay.

    Args:
        folder: local folder; several caches may not share it, several processes may.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._full = False
        self._make_unshared()

    def _make_unshared(self) -> None:
        self._table = Table(self.folder / "table")
        self._reading: dict[int, _Reading] = {}
        self._changed = threading.Condition()
        self._pending: dict[bytes, bytes] = {}
        self._pending_bytes = 0
        self._flushing = 0
        self._writer: threading.Thread | None = None
        self._writing: FileIO | None = None
        self._writing_number = 0
        self._no_room_until = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Threads, locks and files belong to the process that made them.
        return {"folder": self.folder, "limit": self.limit, "_full": self._full}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_unshared()

    def recount(self) -> None:
        """Create the folder, delete stale files, and count the bytes in it: a look at each segment, not at samples.

        Raises:
            OSError: the folder cannot be written.
        """
        private_folder(self.folder)
        with locked(self._table.path):
            for unfinished in self.folder.glob(f".{self._table.path.name}-*"):
                unfinished.unlink()
            self._open_table()
            self._table.set_total(self._evict(0, idle_seconds=0))
        if (self.folder / "total").exists():
            threading.Thread(target=_remove_old_files, args=(self.folder,), name="remove-old", daemon=True).start()

    def get(self, key: str) -> bytes | None:
        """The content stored under ``key``, or None."""
        digest = _digest(key)
        if (pending := self._pending.get(digest)) is not None:
            return pending
        place = self._table.find(_fingerprint(digest))
        if place is None or place.offset + place.size > self.limit:
            return None
        try:
            segment = self._opened(place.segment)
            stored = segment.read(place)
        except OSError:  # evicted or unreadable: it is read from the bucket
            self._reading.pop(place.segment, None)
            return None
        content = stored[_RECORD.size :]
        if len(stored) == place.size and stored.startswith(_header(digest, content)):
            return content
        self._reading.pop(place.segment, None)
        if not segment.is_damaged and os.fstat(segment.file.fileno()).st_size:  # evicted segments are empty
            segment.is_damaged = True
            log.warning("%s is damaged at byte %d: the image is fetched again", segment.path, place.offset)
        return None

    def has(self, key: str) -> bool:
        """Whether ``key`` is likely to be stored; its content may turn out to be damaged or evicted."""
        digest = _digest(key)
        return digest in self._pending or self._table.find(_fingerprint(digest)) is not None

    @property
    def accepts(self) -> bool:
        """Whether what is put now is likely to be stored: the disk keeps up, and there is room."""
        return not self._full and 2 * self._pending_bytes < PENDING_BYTES and time.monotonic() >= self._no_room_until

    def put(self, key: str, content: bytes) -> None:
        """Store ``content`` soon, in another thread.

        When the disk is full or unwritable, one warning is logged and nothing more is stored; when it is slow, some
        samples are not stored.
        """
        if self._full or 2 * len(content) > self.limit:
            return
        digest = _digest(key)
        with self._changed:
            if self._full or digest in self._pending or self._pending_bytes > PENDING_BYTES:
                return
            self._pending[digest] = content
            self._pending_bytes += len(content)
            if self._writer is None:
                # Not a daemon: the interpreter waits for it, at most FLUSH_SECONDS and one block.
                self._writer = threading.Thread(target=self._write_pending, name="write-cache")
                try:
                    self._writer.start()
                except RuntimeError:  # the interpreter is ending, or the container may have no more threads
                    self._writer = None
                    self._pending.clear()
                    self._pending_bytes = 0
                    self._changed.notify_all()
            elif self._is_block():
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until what was put is on disk, or given up: at most ``FLUSH_LIMIT_SECONDS``."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending, FLUSH_LIMIT_SECONDS)
            self._flushing -= 1

    def give_up(self, error: OSError) -> None:
        """Store nothing from now on; the reason is logged once."""
        with self._changed:
            was_full, self._full = self._full, True
        if not was_full:
            reason = "is full" if error.errno in DISK_FULL else f"cannot be written ({error.strerror or error})"
            log.warning(
                "%s %s: from here on images are read without a cache. Choose another folder by --data.cache_dir, "
                "or a smaller --data.cache_gb.",
                self.folder,
                reason,
            )
        with self._changed:
            self._pending.clear()
            self._pending_bytes = 0
            self._changed.notify_all()

    # Reading

    def _opened(self, number: int) -> _Reading:
        segment = self._reading.get(number)
        if segment is None:
            segment = _Reading(self._path(number))
            if len(self._reading) >= OPEN_SEGMENTS:
                self._reading.clear()
            self._reading[number] = segment
        return segment

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08x}.segment"

    # Writing, in the writer's thread

    def _is_block(self) -> bool:
        return self._pending_bytes >= BLOCK_BYTES or len(self._pending) >= BLOCK_SAMPLES

    def _write_pending(self) -> None:
        """Write blocks until nothing is put any more."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_block() or self._flushing, FLUSH_SECONDS)
                block = dict(zip(self._pending, self._first_pending(), strict=False))
                if not block:
                    self._writer = None
                    return
            try:
                self._write(block)
            except OSError as error:
                self.give_up(error)
            except Exception as error:  # a lack of memory, say, is no reason to hold what others put for ever
                self.give_up(OSError(f"{type(error).__name__}: {error}"))
            with self._changed:
                for digest in block:
                    self._pending_bytes -= len(self._pending.pop(digest, b""))
                self._changed.notify_all()

    def _first_pending(self) -> Iterator[bytes]:
        size = 0
        for number, content in enumerate(self._pending.values()):
            if size >= BLOCK_BYTES or number == BLOCK_SAMPLES:
                return
            size += len(content)
            yield content

    def _write(self, block: dict[bytes, bytes]) -> None:
        """Append records to this process's segment, and enter them into the table."""
        if time.monotonic() < self._no_room_until:
            return
        buffers = [buffer for digest, content in block.items() for buffer in (_header(digest, content), content)]
        size = sum(map(len, buffers))
        with locked(self._table.path):
            self._open_table()
            total = self._table.total() + size
            if total > self.limit:
                total = self._evict(size, IDLE_SECONDS)
            if total > self.limit:
                self._no_room_until = time.monotonic() + NO_ROOM_SECONDS
                return
            # First of all: what a process that is killed writes next is counted.
            self._table.set_total(total)
            file, number = self._segment_to_write(size)
            end = os.fstat(file.fileno()).st_size
            if os.writev(file.fileno(), buffers) < size:
                os.ftruncate(file.fileno(), end)
                raise OSError(errno.ENOSPC, "No space left on device")
            places = []
            for digest, content in block.items():
                places.append((_fingerprint(digest), Place(number, end, _RECORD.size + len(content))))
                end += _RECORD.size + len(content)
            before = self._table.size()
            self._table.add(places, lambda: (segment.number for segment in self._segments()))
            if (grown := self._table.size() - before) > 0:
                self._table.set_total(total + grown)

    def _segment_to_write(self, size: int) -> tuple[FileIO, int]:
        """A segment with room for ``size`` bytes that no other process writes to; an unfinished one if there is one."""
        most = min(self.limit // FEWEST_SEGMENTS, LARGEST_SEGMENT)
        if self._writing is not None:
            status = os.fstat(self._writing.fileno())
            if status.st_nlink and status.st_size + size <= most:
                return self._writing, self._writing_number
            self._writing.close()
            self._writing = None
        for segment in self._segments():
            if 2 * segment.size <= most and segment.size + size <= most:
                with contextlib.suppress(BlockingIOError):
                    return self._write_to(segment.number, os.O_RDWR)
        while True:
            with contextlib.suppress(FileExistsError):
                return self._write_to(secrets.randbits(32), os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def _write_to(self, number: int, flags: int) -> tuple[FileIO, int]:
        file = FileIO(open_regular(self._path(number), flags | os.O_APPEND), "r+")
        try:
            lock_exclusively(file.fileno(), wait=False)
        except BaseException:
            file.close()
            raise
        self._writing, self._writing_number = file, number
        return file, number

    # Room, under the lock

    def _open_table(self) -> None:
        if self._table.open():
            for segment in self._segments():
                _delete(segment)
            self._table.set_total(self._table.size())

    def _segments(self) -> list[_Segment]:
        segments = []
        for entry in os.scandir(self.folder):
            if (name := _SEGMENT_NAME.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                segments.append(_Segment(status.st_mtime, status.st_size, int(name[1], 16), Path(entry.path)))
        return segments

    def _evict(self, more: int, idle_seconds: float) -> int:
        """Make room, if necessary: delete segments that are not in use, the least recently used first.

        Args:
            more: bytes that are about to be written.
            idle_seconds: time since the last use after which a segment is not in use.

        Returns:
            bytes of the cache, counted anew, and ``more``.
        """
        segments = self._segments()
        total = self._table.size() + sum(segment.size for segment in segments) + more
        if total <= self.limit:
            return total
        for segment in sorted(segments):
            if total <= KEPT_AFTER_EVICTION * self.limit or time.time() - segment.used < idle_seconds:
                break
            _delete(segment)
            total -= segment.size
        return total


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _fingerprint(digest: bytes) -> int:
    return int.from_bytes(digest[:8]) or 1  # 0 marks an empty slot


def _header(digest: bytes, content: bytes) -> bytes:
    return _RECORD.pack(digest, len(content), google_crc32c.value(content))


def _delete(segment: _Segment) -> None:
    """Delete a segment; its blocks are free at once, whoever has it open."""
    with contextlib.suppress(FileNotFoundError):
        file = open_regular(segment.path, os.O_WRONLY)
        try:
            os.ftruncate(file, 0)
        finally:
            os.close(file)
        segment.path.unlink()


def _remove_old_files(folder: Path) -> None:
    """Delete the files of earlier versions, and nothing else."""
    with contextlib.suppress(OSError):
        for part in os.scandir(folder):
            if _OLD_FOLDER.fullmatch(part.name) and part.is_dir(follow_symlinks=False):
                for file in os.scandir(part.path):
                    if _OLD_FILE.fullmatch(file.name) and not file.is_dir(follow_symlinks=False):
                        os.unlink(file.path)
                with contextlib.suppress(OSError):  # it has other files
                    os.rmdir(part.path)
        for name in ("total", "total.lock"):
            (folder / name).unlink(missing_ok=True)
