"""The table of the sample cache: one file that all processes of a node search and extend."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from job.storage.local_cache import open_regular

_HEADER = struct.Struct("<8sLLQQ")
_CHECKSUM = struct.Struct("<L")
_MAGIC, _VERSION = b"JOBCACHE", 1
_HEADER_BYTES = 64
_SLOT = struct.Struct("<QLLQ")
_SLOTS = np.dtype([("fingerprint", "<u8"), ("segment", "<u4"), ("size", "<u4"), ("offset", "<u8")])
_FEWEST_BITS, _MOST_BITS = 14, 32
_NO_TABLE = (errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EISDIR)
"""Nothing lies at the path, or no regular file."""
_WINDOW = 64
"""Slots from its first possible one on in which an entry may lie; half-full tables fill such a window once in 10^5."""


class Place(NamedTuple):
    """A record in a segment.

    Attributes:
        segment: number of the segment.
        offset: first byte of the record.
        size: bytes of the record.
    """

    segment: int
    offset: int
    size: int


class _Header(NamedTuple):
    """The beginning of the file.

    Attributes:
        bits: the table has ``2**bits`` first slots.
        entries: slots in use.
        total: bytes of the cache, this file included.
    """

    bits: int
    entries: int
    total: int


class _Opened(NamedTuple):
    """A table that was opened.

    Attributes:
        file: closed when the last thread that reads it is done.
        bits: the table has ``2**bits`` first slots.
        status: tells whether :attr:`Table.path` is still this file.
    """

    file: FileIO
    bits: int
    status: os.stat_result


class Table:
    """A hash table with linear probing, from fingerprints of 64 bits to places of records.

    It is read by pread(2) without a lock, and written by pwrite(2) under one. An entry is a hint: a reader verifies the
    record that it points to, so that stale, half-written and damaged entries cost one request each. The file is not
    mapped into memory, since a truncated map would end the process with SIGBUS.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: _Opened | None = None
        self._locked: _Opened | None = None  # of the writer: a thread that reads may open an earlier table meanwhile

    def find(self, fingerprint: int) -> Place | None:
        """The place stored under a fingerprint, or None; reads without a lock."""
        opened = self._opened
        if opened is not None and (place := _find(opened, fingerprint)) is not None:
            return place
        try:
            # A table that has grown is another file. This is one system call per miss.
            if opened is not None and os.path.samestat(self.path.lstat(), opened.status):
                return None
            opened = self._open()
        except OSError:
            return None
        if opened is None:
            return None
        self._opened = opened
        return _find(opened, fingerprint)

    def open(self) -> bool:
        """Open the table to change it; a damaged or missing one is replaced by an empty one. Called under the lock.

        Returns:
            whether it was replaced, so that no record is in it any more.

        Raises:
            OSError: it cannot be read or written.
        """
        if self._locked is not None and _is_at(self.path, self._locked.status):
            opened = self._locked if _read_header(self._locked.file) is not None else None
        else:
            try:
                opened = self._open()
            except OSError as error:
                if error.errno not in _NO_TABLE:  # a lack of descriptors, say, is no reason to lose what is cached
                    raise
                opened = None
        if opened is not None:
            self._locked = self._opened = opened
            return False
        self._replace(np.empty(0, _SLOTS), 0)
        return True

    def total(self) -> int:
        """Bytes of the cache; called under the lock."""
        return self._header().total

    def set_total(self, total: int) -> None:
        """Store the bytes of the cache; called under the lock."""
        self._store_header(self._header()._replace(total=total))

    def add(self, places: Iterable[tuple[int, Place]], segments: Callable[[], Iterable[int]]) -> None:
        """Store places under their fingerprints; called under the lock.

        Args:
            places: pairs of fingerprint and place.
            segments: numbers of the segments that exist; entries of others are dropped when the table grows.
        """
        places = list(places)
        header = self._header()
        if 2 * (header.entries + len(places)) > 1 << header.bits:
            slots = np.fromfile(self._file(), _SLOTS, offset=_HEADER_BYTES)
            slots = slots[(slots["fingerprint"] != 0) & np.isin(slots["segment"], np.fromiter(segments(), np.uint32))]
            self._replace(slots, header.total, len(places))
            header = self._header()
        file, added = self._file().fileno(), 0
        for fingerprint, place in places:
            start = _position(fingerprint >> (64 - header.bits))
            number, is_new = _free_slot(os.pread(file, _WINDOW * _SLOT.size, start), fingerprint)
            os.pwrite(
                file, _SLOT.pack(fingerprint, place.segment, place.size, place.offset), start + number * _SLOT.size
            )
            added += is_new
        self._store_header(header._replace(entries=header.entries + added))

    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file().fileno()).st_size

    def _file(self) -> FileIO:
        assert self._locked is not None, "open() comes first"
        return self._locked.file

    def _header(self) -> _Header:
        header = _read_header(self._file())
        if header is None:
            raise OSError(f"{self.path} is damaged")
        return header

    def _store_header(self, header: _Header) -> None:
        os.pwrite(self._file().fileno(), _packed_header(header), 0)

    def _open(self) -> _Opened | None:
        """Open the table that now lies at :attr:`path`; None: it is damaged.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        file = FileIO(open_regular(self.path, os.O_RDWR), "r+")
        header = _read_header(file)
        return None if header is None else _Opened(file, header.bits, os.fstat(file.fileno()))

    def _replace(self, slots: npt.NDArray[np.void], total: int, more: int = 0) -> None:
        """Write a new table with these entries and room for others, and rename it to :attr:`path`."""
        bits = min(max((3 * (len(slots) + more)).bit_length(), _FEWEST_BITS), _MOST_BITS)
        slots = np.sort(slots, order="fingerprint")
        first = (slots["fingerprint"] >> np.uint64(64 - bits)).astype(np.int64)
        # In the order of fingerprints each entry takes the next free slot from its first one on.
        steps = np.arange(len(slots))
        position = np.maximum.accumulate(first - steps) + steps
        fits = position - first < _WINDOW
        table = np.zeros((1 << bits) + _WINDOW, _SLOTS)
        table[position[fits]] = slots[fits]
        header = _Header(bits, int(fits.sum()), total)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_packed_header(header).ljust(_HEADER_BYTES, b"\0"))
                file.write(table.data)  # in full, so that no later entry meets a full disk
            Path(temporary).replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
        opened = self._open()
        if opened is None:
            raise OSError(f"{self.path} cannot be read back")
        self._locked = self._opened = opened


def _is_at(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), status)
    except OSError:
        return False


def _position(number: int) -> int:
    return _HEADER_BYTES + number * _SLOT.size


def _find(opened: _Opened, fingerprint: int) -> Place | None:
    try:
        window = os.pread(opened.file.fileno(), _WINDOW * _SLOT.size, _position(fingerprint >> (64 - opened.bits)))
    except OSError:
        return None
    for start in range(0, len(window) - _SLOT.size + 1, _SLOT.size):
        stored, segment, size, offset = _SLOT.unpack_from(window, start)
        if stored == fingerprint:
            return Place(segment, offset, size)
        if not stored:
            break
    return None


def _free_slot(window: bytes, fingerprint: int) -> tuple[int, bool]:
    """The slot of a window for an entry, and whether it was empty; in a full window the first entry is replaced."""
    for number, (stored, *_) in enumerate(_SLOT.iter_unpack(window)):
        if stored in (0, fingerprint):
            return number, not stored
    return 0, False


def _packed_header(header: _Header) -> bytes:
    packed = _HEADER.pack(_MAGIC, _VERSION, *header)
    return packed + _CHECKSUM.pack(zlib.crc32(packed))


def _read_header(file: FileIO) -> _Header | None:
    """The header, or None for a file that is damaged or of another version."""
    stored = os.pread(file.fileno(), _HEADER.size + _CHECKSUM.size, 0)
    if len(stored) < _HEADER.size + _CHECKSUM.size:
        return None
    packed = stored[: _HEADER.size]
    magic, version, *values = _HEADER.unpack(packed)
    header = _Header(*values)
    is_whole = (magic, version, stored[_HEADER.size :]) == (_MAGIC, _VERSION, _CHECKSUM.pack(zlib.crc32(packed)))
    slots = (1 << min(header.bits, _MOST_BITS)) + _WINDOW
    return header if is_whole and os.fstat(file.fileno()).st_size == _position(slots) else None
