"""Limits on what a malformed archive can make a reader allocate, read or write."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import zlib
from pathlib import Path
from typing import IO

from job.errors import DataError

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
_CHUNK = 1 << 20


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
        left = max(self._size - self._file.tell(), 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > self._largest:
            raise ValueError(f"a header claims {size:,} bytes, more than {self._largest:,}")
        if not left:
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


def unpack_gzip(uri: str, packed: Path, target: Path) -> None:
    """Unpack a gzip file, as a stream, within :data:`LARGEST_RATIO` and the free disk.

    Args:
        uri: where the file came from, for messages.

    Raises:
        DataError: it is damaged, or a decompression bomb.
        OSError: the disk is full, or would be.
    """
    limit = max(SMALL_ARCHIVE, packed.stat().st_size * LARGEST_RATIO)
    written = 0
    try:
        with gzip.open(packed) as stream, target.open("wb") as file:
            while chunk := stream.read(_CHUNK):
                written += len(chunk)
                if written > limit:
                    raise DataError(
                        f"{uri} is refused as a decompression bomb: it unpacks to more than {limit:,} bytes, "
                        f"{LARGEST_RATIO} times its size. Upload it as a .tar."
                    )
                if shutil.disk_usage(target.parent).free < FREE_DISK:
                    raise OSError(errno.ENOSPC, f"less than {FREE_DISK >> 30} GiB would be left on the disk")
                file.write(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{uri} is not a readable archive: {error}. Upload it again.") from error
