"""Checksums that stores report, and errors of reads that exceed a limit or do not match."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from job.errors import StorageError, StorageOutage

_CHUNK = 1 << 20


class TooLarge(StorageError):
    """An object larger than what the caller accepts."""


class ChecksumMismatch(StorageOutage):
    """Content that does not match its checksum: damaged in transfer, or in the store.

    Attributes:
        content: the content that was received.
        digest: SHA-256 of the content.
        certain: see :class:`Checksum`.
    """

    def __init__(self, message: str, content: bytes, certain: bool) -> None:
        super().__init__(message)
        self.content = content
        self.digest = hashlib.sha256(content).digest()
        self.certain = certain


class Checksum(NamedTuple):
    """A checksum that a store reports.

    Attributes:
        kind: ``crc32c`` or ``md5``.
        value: in base64.
        certain: the store specifies it as a checksum; an ETag, for instance, need not be an MD5.
    """

    kind: str
    value: str
    certain: bool

    def matches(self, content: bytes) -> bool:
        """Whether ``content`` has this checksum."""
        return self._of([content]) == self.value

    def matches_file(self, path: Path) -> bool:
        """Whether the content of the file ``path`` has this checksum."""
        with path.open("rb") as file:
            return self._of(iter(lambda: file.read(_CHUNK), b"")) == self.value

    def _of(self, chunks: Iterable[bytes]) -> str:
        is_crc = self.kind == "crc32c"
        digest: Any = google_crc32c.Checksum() if is_crc else hashlib.md5(usedforsecurity=False)  # type: ignore[no-untyped-call]
        for chunk in chunks:
            digest.update(chunk)
        return base64.b64encode(digest.digest()).decode()


def checksum_of(details: Mapping[str, Any]) -> Checksum | None:
    """The checksum in what ``fs.info`` reports of an object: GCS's CRC-32C or MD5, S3's ETag where it is an MD5."""
    for name, kind in (("crc32c", "crc32c"), ("md5Hash", "md5")):
        if isinstance(details.get(name), str):
            return Checksum(kind, details[name], certain=True)
    return etag_checksum(details.get("ETag"))


def etag_checksum(etag: object) -> Checksum | None:
    """The MD5 in an ETag of 32 hexadecimal digits, as an object has that was stored unencrypted by one PUT."""
    match = re.fullmatch(r'"?([0-9a-f]{32})"?', etag) if isinstance(etag, str) else None
    return Checksum("md5", base64.b64encode(bytes.fromhex(match[1])).decode(), certain=False) if match else None


def bounded_range(size: int, largest: int | None) -> dict[str, int]:
    """A range that limits how much is read of an object of unknown size (-1); it may end behind the object's end."""
    return {} if size >= 0 or largest is None else {"start": 0, "end": largest + 1}


def require_within(size: int, uri: str, largest: int | None) -> None:
    """Raise :class:`TooLarge` for more than ``largest`` bytes."""
    if largest is not None and size > largest:
        raise TooLarge(f"{uri} is larger than {largest:,} bytes")
