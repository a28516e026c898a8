"""Limits on what a malformed archive can make a reader allocate, read or write."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from job.errors import DataError
from job.storage import basename

READS_AT_THE_END = 100
"""Reads beyond the end of an archive after which its reader counts as caught in a loop."""
LARGEST_RATIO = 250
"""Unpacked bytes per packed byte; deflate reaches 1,032 on zeros, scans and drawings a few dozen."""
SMALL_ARCHIVE = 1 << 30
"""Bytes that may be unpacked whatever the ratio."""
FREE_DISK = 1 << 30
"""Bytes of disk that unpacking leaves free."""
LARGEST_MEMBER = 1 << 28
"""Bytes of the largest image file that is read, and that a compressed one may expand to."""
XZ_MEMORY = 1 << 28
"""Bytes of memory to unpack .xz files; ``xz -9`` needs 65 MB."""
_CHUNK = 1 << 20
_CODECS = {
    "gzip": ("gz", "tgz"),
    "bz2": ("bz2", "bz", "tbz2", "tbz", "tb2"),
    "xz": ("xz", "txz"),
    "zstd": ("zst", "zstd", "tzst"),
}


class BoundedFile:
    """A view of a file that refuses reads larger than ``largest`` bytes, and seeks before the beginning.

    zipfile and tarfile allocate whatever a header claims, and some loops of tarfile do not end at the end of a file.

    Attributes:
        failure: an exception of the file itself, a bucket's for instance: it does not mean a damaged archive.
    """

    def __init__(self, file: IO[bytes], largest: int) -> None:
        self._file = file
        self._largest = largest
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._reads_at_the_end = 0
        self.failure: Exception | None = None

    def read(self, size: int | None = -1) -> bytes:
        """Up to ``size`` bytes.

        Raises:
            ValueError: more than allowed, or read again and again beyond the end.
        """
        remaining = max(self._size - self._file.tell(), 0)
        size = remaining if size is None or size < 0 else min(size, remaining)
        if size > self._largest:
            raise ValueError(f"a header claims {size:,} bytes, more than {self._largest:,}")
        if not remaining:
            self._reads_at_the_end += 1
            if self._reads_at_the_end > READS_AT_THE_END:
                raise ValueError("it is cut short")
        try:
            return self._file.read(size)
        except Exception as error:
            self.failure = error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to ``offset``.

        Raises:
            ValueError: that is before the beginning.
        """
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("a header points outside of the archive")
        return self._file.seek(start + offset)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def seekable(self) -> bool:
        """True."""
        return True


def compression_of(name: str) -> str | None:
    """The codec of a file by its name (``a.tar.gz``, ``a.tgz``, ``list.csv.zst``): gzip, bz2, xz or zstd."""
    suffix = name.lower().rpartition(".")[2]
    return next((codec for codec, suffixes in _CODECS.items() if suffix in suffixes), None)


@contextlib.contextmanager
def decompressed(file: IO[bytes], codec: str, uri: str) -> Iterator[IO[bytes]]:
    """A stream of the decompressed content of ``file``, in bounded memory.

    Args:
        file: the packed bytes.
        codec: see :func:`compression_of`.
        uri: where the file came from, for messages.

    Raises:
        DataError: it is damaged.
    """
    try:
        if codec == "zstd":
            with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec) as stream:
                yield cast("IO[bytes]", stream)
        else:
            openers: dict[str, Callable[[IO[bytes]], Any]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": _XzFile}
            with openers[codec](file) as stream:
                yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(uri, error) from error
    except OSError as error:  # bz2 and pyarrow have no classes of their own
        if type(error) is not OSError or error.errno is not None:
            raise
        raise _damaged(uri, error) from error


def unpack(uri: str, packed: Path, target: Path) -> None:
    """Unpack a compressed file, as a stream, within :data:`LARGEST_RATIO` and the free disk.

    Args:
        uri: where the file came from, which also tells how it is compressed.

    Raises:
        DataError: it is damaged, or a decompression bomb.
        OSError: the disk is full, or would be.
    """
    codec = compression_of(basename(uri))
    assert codec is not None
    with packed.open("rb") as file, target.open("wb") as unpacked:
        writer = BoundedWriter(uri, unpacked, target.parent, packed.stat().st_size)
        with decompressed(file, codec, uri) as stream:
            while chunk := stream.read(_CHUNK):
                writer.write(chunk)


class BoundedWriter:
    """Writes the decompressed content of an archive, within :data:`LARGEST_RATIO` and the free disk.

    Args:
        uri: of the archive, for messages.
        file: written to.
        folder: of the file.
        packed_bytes: size of the archive.
    """

    def __init__(self, uri: str, file: IO[bytes], folder: Path, packed_bytes: int) -> None:
        self._uri = uri
        self._file = file
        self._folder = folder
        self._limit = max(SMALL_ARCHIVE, packed_bytes * LARGEST_RATIO)
        self._unchecked = _CHUNK
        self.written = 0

    def write(self, chunk: bytes) -> None:
        """Append ``chunk``.

        Raises:
            DataError: the archive is a decompression bomb.
            OSError: the disk is full, or would be.
        """
        self.written += len(chunk)
        if self.written > self._limit:
            raise DataError(
                f"{self._uri} is refused as a decompression bomb: it unpacks to more than {self._limit:,} bytes, "
                f"{LARGEST_RATIO} times its size. Upload it unpacked."
            )
        self._unchecked += len(chunk)
        if self._unchecked >= _CHUNK:
            self._unchecked = 0
            if shutil.disk_usage(self._folder).free < FREE_DISK:
                raise OSError(errno.ENOSPC, f"less than {FREE_DISK >> 30} GiB would be left on the disk")
        self._file.write(chunk)


class _XzFile(io.RawIOBase):
    """lzma.open with a limit of memory: a header may claim a dictionary of 4 GB."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder: lzma.LZMADecompressor | None = None
        self._rest = b""

    def read(self, size: int | None = -1) -> bytes:
        limit = _CHUNK if size is None or size < 0 else size
        while True:
            if self._decoder is None:
                self._rest = self._rest.lstrip(b"\0") or self._file.read(_CHUNK).lstrip(b"\0")  # padding of streams
                if not self._rest:
                    return b""
                self._decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            packed = self._rest
            if not packed and self._decoder.needs_input:
                packed = self._file.read(_CHUNK)
                if not packed:
                    raise EOFError("it is cut short")
            self._rest = b""
            content = self._decoder.decompress(packed, limit)
            if self._decoder.eof:
                self._rest, self._decoder = self._decoder.unused_data, None
            if content:
                return content


def _damaged(uri: str, error: Exception) -> DataError:
    return DataError(f"{uri} is not a readable archive: {error}. Upload it again.")
