"""Every use of private API of fsspec, gcsfs and s3fs.

Each function gives the reason and the upstream issue. tests/unit/test_fsspec_internals.py notices when one of the names
or signatures changes; the tests of conditional writes and of verified reads notice when their meaning does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync

from job.process.jitter import jittered


def gcs_call(fs: AsyncFileSystem, method: str, url: str, *args: Any, **options: Any) -> Any:
    """Send a request to GCS with the filesystem's credentials and retries.

    fsspec has no conditional writes but "create if absent" (https://github.com/fsspec/filesystem_spec/issues/1693).
    """
    return sync(fs.loop, fs._call, method, url, *args, **options)


def gcs_location(fs: AsyncFileSystem) -> str:
    """Base URL of the GCS endpoint; uploads need it, and only download URLs are public (``fs.url``)."""
    location: str = fs._location
    return location


async def gcs_get(fs: AsyncFileSystem, path: str, **limits: int) -> tuple[Mapping[str, str], bytes]:
    """The headers and the content of a response of GCS, with the filesystem's credentials and retries.

    gcsfs verifies nothing when it reads into memory, and hides the headers, in which the checksum is
    (https://github.com/fsspec/gcsfs/issues/363 is about its files). The first attempt leaves out the decorator that
    repeats a request: it binds the arguments anew each time, which costs as much as a third of the request itself.

    Args:
        fs: of a bucket that :func:`gcs_is_zonal` denies.
        path: of the object.
        limits: ``start`` and ``end`` of a range.
    """
    url = fs.url(path)
    headers = {"Range": await fs._process_limits(path, **limits)} if limits else {}
    try:
        _, received, _, content = await type(fs)._request.__wrapped__(fs, "GET", url, headers=headers)
    except Exception as error:
        from gcsfs.retry import is_retriable

        if not is_retriable(error):
            raise
        await asyncio.sleep(jittered(2))  # between 1 and 2 s, as gcsfs before its second attempt
        received, content = await fs._call("GET", url, headers=headers)
    return received, content


async def gcs_is_zonal(fs: AsyncFileSystem, bucket: str) -> bool:
    """Whether gcsfs reads the bucket over gRPC, which sends no headers, and checks the content by itself.

    ``_cat_file`` of ``ExtendedGcsFileSystem`` asks this for each object. Where the account may not see the layout of
    the bucket, gcsfs does not keep the answer, so that each object would cost a second request.
    """
    return hasattr(fs, "_is_zonal_bucket") and bool(await fs._is_zonal_bucket(bucket))


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
