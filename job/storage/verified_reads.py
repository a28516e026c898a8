"""Reads of whole objects, checked against the checksum that the store sends with them, without a further request.

gcsfs verifies nothing when it reads into memory (https://github.com/fsspec/gcsfs/issues/363 is about its files);
s3fs asks for an object's size first. Both hide the headers of the answer, so that this module, and no other, uses
``GCSFileSystem._call`` and ``S3FileSystem._call_s3``.
"""

from __future__ import annotations

import base64
import contextvars
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.http import HTTPFileSystem

from job.errors import StorageError, StorageOutage

_CHUNK = 1 << 20
_RANGE_NOT_SATISFIABLE = 416

_answers: contextvars.ContextVar[list[Mapping[str, str]] | None] = contextvars.ContextVar("_answers", default=None)
"""Where the headers of GCS answers go, in the task that asks for them."""


class TooLarge(StorageError):
    """An object larger than what the caller accepts."""


class ChecksumMismatch(StorageOutage):
    """Content that does not match its checksum: damaged on the way, or in the store.

    Attributes:
        digest: SHA-256 of the content that came.
        certain: the checksum is one by its specification; an ETag, for instance, need not be an MD5.
        content: what came.
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
        certain: see :class:`ChecksumMismatch`.
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

    def _of(self, chunks: Any) -> str:
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
    return _etag_checksum(details.get("ETag"))


def _etag_checksum(etag: object) -> Checksum | None:
    """An ETag of 32 hexadecimal digits is the MD5 of what one unencrypted PUT has sent."""
    found = re.fullmatch(r'"?([0-9a-f]{32})"?', etag) if isinstance(etag, str) else None
    return Checksum("md5", base64.b64encode(bytes.fromhex(found[1])).decode(), certain=False) if found else None


def _header_checksum(headers: Mapping[str, str]) -> Checksum | None:
    """The checksum in the headers of a GCS answer; None for content that was stored compressed and came unpacked."""
    if headers.get("Content-Encoding") or headers.get("X-Goog-Stored-Content-Encoding", "identity") != "identity":
        return None
    hashes = dict(re.findall(r"(crc32c|md5)=([A-Za-z0-9+/=]+)", headers.get("X-Goog-Hash", "")))
    kind = next((kind for kind in ("crc32c", "md5") if kind in hashes), None)
    return Checksum(kind, hashes[kind], certain=True) if kind else None


def observe(fs: Any) -> None:
    """Let :func:`read_whole` see the headers that a ``GCSFileSystem`` receives."""
    call = fs._call
    if getattr(call, "is_observed", False):
        return

    async def observed(method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        answer = await call(method, path, *args, **kwargs)
        answers = _answers.get()
        if answers is not None and isinstance(answer, tuple):
            answers.append(answer[0])
        return answer

    observed.is_observed = True  # type: ignore[attr-defined]
    fs._call = observed


async def read_whole(fs: AsyncFileSystem, path: str, uri: str, size: int, largest: int | None) -> bytes:
    """The whole object, checked where its store sends a checksum.

    Args:
        fs: for ``gs://``, one that :func:`observe` has seen.
        uri: for messages.
        size: of the object when it was listed; -1: unknown.
        largest: bytes of the largest object to read; None: any.

    Raises:
        TooLarge: it is larger than ``largest``.
        ChecksumMismatch: the content is not what the store says it is.
    """
    if isinstance(fs, HTTPFileSystem):
        return await _read_http(fs, path, uri, largest)
    if hasattr(fs, "_call_s3"):
        content, checksum = await _read_s3(fs, path, uri, largest)
    elif hasattr(fs._call if hasattr(fs, "_call") else None, "is_observed"):
        content, checksum = await _read_gcs(fs, path, uri, size, largest)
    else:
        content, checksum = await fs._cat_file(path, **bounds(size, largest)), None
        require_within(content, uri, largest)
    if checksum is not None and not checksum.matches(content):
        raise ChecksumMismatch(
            f"{uri}: the content does not match its {checksum.kind.upper()} in the store ({checksum.value})",
            content,
            checksum.certain,
        )
    return content


def bounds(size: int, largest: int | None) -> dict[str, int]:
    """A range that bounds what is read of an object of unknown size; its end may lie behind the object's."""
    return {} if size >= 0 or largest is None else {"start": 0, "end": largest + 1}


def require_within(content: bytes, uri: str, largest: int | None) -> None:
    """Raise :class:`TooLarge` for more than ``largest`` bytes."""
    if largest is not None and len(content) > largest:
        raise TooLarge(f"{uri} is larger than {largest:,} bytes")


async def _read_gcs(fs: Any, path: str, uri: str, size: int, largest: int | None) -> tuple[bytes, Checksum | None]:
    answers: list[Mapping[str, str]] = []
    token = _answers.set(answers)
    try:
        content: bytes = await fs._cat_file(path, **bounds(size, largest))
    except Exception as error:
        if getattr(error, "code", None) == _RANGE_NOT_SATISFIABLE:  # no byte of an empty object can be asked for
            return b"", None
        raise
    finally:
        _answers.reset(token)
    require_within(content, uri, largest)
    # A zonal bucket answers over gRPC, which checks by itself; several answers are parts.
    return content, _header_checksum(answers[0]) if len(answers) == 1 else None


async def _read_s3(fs: Any, path: str, uri: str, largest: int | None) -> tuple[bytes, Checksum | None]:
    bucket, key, version = fs.split_path(path)
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **({"VersionId": version} if version else {}))
    body = answer["Body"]
    try:
        if largest is not None and answer["ContentLength"] > largest:
            raise TooLarge(f"{uri} is larger than {largest:,} bytes")
        content: bytes = await body.read()
    finally:
        body.close()
    own_key = answer.get("SSECustomerAlgorithm") or str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    return content, None if own_key else _etag_checksum(answer.get("ETag"))


async def _read_http(fs: Any, path: str, uri: str, largest: int | None) -> bytes:
    session = await fs.set_session()
    async with session.get(fs.encode_url(path), **fs.kwargs) as response:
        fs._raise_not_found_for_status(response, path)
        content = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            content += chunk
            if largest is not None and max(len(content), response.content_length or 0) > largest:
                raise TooLarge(f"{uri} is larger than {largest:,} bytes")
        return bytes(content)
