"""Contract of job.storage.fsspec_internals with the private API of fsspec, gcsfs and s3fs."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.http import HTTPFileSystem
from gcsfs.core import GCSFileSystem
from gcsfs.extended_gcsfs import ExtendedGcsFileSystem
from gcsfs.retry import HttpError, is_retriable
from s3fs import S3FileSystem

import job
from job.storage.stores.google import GoogleCloudStorage


@pytest.mark.parametrize(
    ("method", "parameters", "is_coroutine"),
    [
        (GCSFileSystem._call, ["self", "method", "path", "args", "json_out", "info_out", "kwargs"], True),
        (
            GCSFileSystem._request.__wrapped__,
            ["self", "method", "path", "args", "headers", "json", "data", "cache_type", "cache_source", "kwargs"],
            True,
        ),
        (GCSFileSystem._process_limits, ["self", "url", "start", "end"], True),
        (ExtendedGcsFileSystem._is_zonal_bucket, ["self", "bucket"], True),
        (GCSFileSystem._cat_file, ["self", "path", "start", "end", "kwargs"], True),
        (S3FileSystem._call_s3, ["self", "method", "akwarglist", "kwargs"], True),
        (AsyncFileSystem._cat_file, ["self", "path", "start", "end", "kwargs"], True),
        (HTTPFileSystem._raise_not_found_for_status, ["self", "response", "url"], False),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_the_signature_is_the_one_that_is_called(
    method: Callable[..., Any], parameters: list[str], is_coroutine: bool
) -> None:
    assert list(inspect.signature(method).parameters) == parameters
    assert inspect.iscoroutinefunction(method) == is_coroutine


def test_gcsfs_knows_its_endpoint() -> None:
    assert isinstance(inspect.getattr_static(GCSFileSystem, "_location"), property)


def test_the_private_api_is_used_in_one_module_only() -> None:
    names = "call|call_s3|cat_file|is_zonal_bucket|location|process_limits|raise_not_found_for_status|request"
    private = re.compile(rf"\b(?!self\b|cls\b)\w+\._({names})\b")
    root = Path(job.__file__).parent
    users = {str(path.relative_to(root)) for path in root.rglob("*.py") if private.search(path.read_text())}
    assert users == {"storage/fsspec_internals.py"}


def test_gcsfs_says_which_failures_to_retry() -> None:
    assert is_retriable(HttpError({"code": 503}))
    assert not is_retriable(HttpError({"code": 400}))


class _Bucket(AsyncFileSystem):
    """A bucket that knows its type, as ``ExtendedGcsFileSystem`` does; zonal ones answer over gRPC."""

    cachable = False

    def __init__(self, zonal: bool) -> None:
        super().__init__()
        self.zonal = zonal
        self.calls: list[str] = []

    async def _is_zonal_bucket(self, bucket: str) -> bool:
        self.calls.append(f"type of {bucket}")
        await asyncio.sleep(0.01)
        return self.zonal

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.calls.append(f"gRPC {path}")
        return b"zonal"[start:end]

    async def _request(
        self, method: str, path: str, *, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], None, bytes]:
        self.calls.append(f"{method} {path} {headers.get('Range', '')}".rstrip())
        return 200, {}, None, b"regular"

    _request.__wrapped__ = _request  # type: ignore[attr-defined]

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def url(self, path: str) -> str:
        return f"http://{path}"


def test_a_type_that_was_not_answered_is_asked_for_again() -> None:
    class Failing(_Bucket):
        async def _is_zonal_bucket(self, bucket: str) -> bool:
            answer = await super()._is_zonal_bucket(bucket)
            if len(self.calls) == 1:
                raise OSError("connection lost")
            return answer

    fs = Failing(zonal=True)
    store = GoogleCloudStorage(fs)
    with pytest.raises(OSError, match="connection lost"):
        sync(fs.loop, store.fetch, "b/1", "gs://b", 5, 100)
    assert sync(fs.loop, store.fetch, "b/1", "gs://b", 5, 100) == (b"zonal", None)


@pytest.mark.parametrize("zonal", [True, False])
def test_zonal_buckets_are_read_over_grpc(zonal: bool) -> None:
    """The type of the bucket is asked for once, not once per object."""
    fs = _Bucket(zonal)
    store = GoogleCloudStorage(fs)

    async def read() -> list[Any]:
        whole = (store.fetch(f"b/{number}", "gs://b", 5, 100) for number in range(3))
        return await asyncio.gather(*whole, store.fetch_range("b/3", 1, 3))

    contents = sync(fs.loop, read)
    if zonal:
        assert contents == [(b"zonal", None)] * 3 + [b"ona"]
        assert fs.calls == ["type of b", *(f"gRPC b/{number}" for number in range(4))]
    else:
        assert contents == [(b"regular", None)] * 3 + [b"regular"]
        assert fs.calls == ["type of b", *(f"GET http://b/{n}" for n in range(3)), "GET http://b/3 bytes=1-3"]
