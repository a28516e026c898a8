"""Every use of private API of fsspec, gcsfs and s3fs.

Each function gives the reason and the upstream issue. tests/unit/test_fsspec_internals.py notices when one of the names
or signatures changes; the tests of conditional writes and of verified reads notice when their meaning does.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync

_headers: contextvars.ContextVar[list[Mapping[str, str]] | None] = contextvars.ContextVar("_headers", default=None)
"""Receives the headers of GCS responses in the task that reads."""


def gcs_call(fs: AsyncFileSystem, method: str, url: str, *args: Any, **options: Any) -> Any:
    """Send a request to GCS with the filesystem's credentials and retries.

    fsspec has no conditional writes but "create if absent" (https://github.com/fsspec/filesystem_spec/issues/1693).
    """
    return sync(fs.loop, fs._call, method, url, *args, **options)


def gcs_location(fs: AsyncFileSystem) -> str:
    """Base URL of the GCS endpoint; uploads need it, and only download URLs are public (``fs.url``)."""
    location: str = fs._location
    return location


def record_gcs_headers(fs: AsyncFileSystem) -> None:
    """Let :func:`gcs_headers` see the headers of the responses that ``fs`` receives.

    gcsfs verifies nothing when it reads into memory, and hides the headers, in which the checksum is
    (https://github.com/fsspec/gcsfs/issues/363 is about its files).
    """
    call = fs._call
    if getattr(call, "records_headers", False):
        return

    async def recording(method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        response = await call(method, path, *args, **kwargs)
        headers = _headers.get()
        if headers is not None and isinstance(response, tuple):
            headers.append(response[0])
        return response

    recording.records_headers = True  # type: ignore[attr-defined]
    fs._call = recording


@contextlib.contextmanager
def gcs_headers() -> Iterator[list[Mapping[str, str]]]:
    """The headers of each response that GCS sends in this task while the context lasts."""
    headers: list[Mapping[str, str]] = []
    token = _headers.set(headers)
    try:
        yield headers
    finally:
        _headers.reset(token)


async def s3_call(fs: AsyncFileSystem, method: str, **options: Any) -> Any:
    """Call a method of botocore's S3 client with the filesystem's credentials and retries.

    s3fs has no If-Match (https://github.com/fsspec/filesystem_spec/issues/1693), asks for the size of an object before
    it reads it, and hides the ETag.
    """
    return await fs._call_s3(method, **options)


def s3_call_sync(fs: AsyncFileSystem, method: str, **options: Any) -> Any:
    """:func:`s3_call` from a thread without an event loop."""
    return sync(fs.loop, fs._call_s3, method, **options)


def s3_payer(fs: AsyncFileSystem) -> dict[str, str]:
    """The parameter of requests to a requester-pays bucket, as s3fs adds it to its own; empty for others."""
    parameters: dict[str, str] = fs.req_kw
    return parameters


async def cat_file(fs: AsyncFileSystem, path: str, **limits: int) -> bytes:
    """``fs.cat_file`` as a coroutine.

    fsspec documents coroutines with a leading underscore as the way to use its filesystems asynchronously
    (https://filesystem-spec.readthedocs.io/en/latest/async.html).
    """
    data: bytes = await fs._cat_file(path, **limits)
    return data


async def info(fs: AsyncFileSystem, path: str) -> dict[str, Any]:
    """``fs.info`` as a coroutine, as :func:`cat_file`."""
    details: dict[str, Any] = await fs._info(path)
    return details


def raise_for_status(fs: AsyncFileSystem, response: Any, url: str) -> None:
    """Raise as fsspec's HTTP filesystem does: FileNotFoundError for 404, else what aiohttp raises.

    Reads that stop at a limit stream the response, which ``fs.cat_file`` does not.
    """
    fs._raise_not_found_for_status(response, url)
