"""``gs://``: Google Cloud Storage, through gcsfs."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
from collections.abc import Mapping
from urllib.parse import quote

import aiohttp
import fsspec
from fsspec.asyn import sync

from job.storage.bucket_settings import BucketSettings
from job.storage.checksums import Checksum, bounded_range, require_within
from job.storage.fsspec_internals import cat_file, gcs_call, gcs_get, gcs_is_zonal, gcs_location
from job.storage.stores.base import Store, Versioned

CONNECTIONS = 256
"""Connections that a process opens for reading; aiohttp's 100 would limit it at 100 ms per request."""
_BOUNDARY = "job-conditional-write"
_RANGE_NOT_SATISFIABLE = 416


def use_gcs_emulator(url: str) -> None:
    """Let gs:// URIs mean the GCS server at ``url``, for this process and its children."""
    os.environ["STORAGE_EMULATOR_HOST"] = url
    # gcsfs probes a bucket's type over gRPC, which emulators do not speak: 60 s lost per call.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    # The emulator needs no credentials; gcsfs would look for some, on a network that may not be there.
    os.environ["FSSPEC_GS_TOKEN"] = "anon"
    fsspec.config.conf.setdefault("gs", {})["token"] = "anon"


if os.environ.get("STORAGE_EMULATOR_HOST"):
    use_gcs_emulator(os.environ["STORAGE_EMULATOR_HOST"])


class GoogleCloudStorage(Store):
    """Conditions are generations: https://cloud.google.com/storage/docs/request-preconditions.

    A condition that does not hold is FileExistsError in gcsfs.
    """

    protocols = ("gs", "gcs")
    libraries = ("gcsfs", "google", "requests", "urllib3")
    mistakes = ("DefaultCredentialsError", "MalformedError", "MissingSchema", "InvalidSchema")

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        super().__init__(fs)
        self._is_zonal: dict[str, asyncio.Future[bool]] = {}

    def for_reading(self) -> Store:
        """The same bucket with more connections."""
        # A session that ends would close the connections of all others.
        fs = type(self.fs)(session_kwargs={"connector": _connector(self.fs.loop), "connector_owner": False})
        return GoogleCloudStorage(fs)

    async def fetch(self, path: str, uri: str, size: int, largest: int | None) -> tuple[bytes, Checksum | None]:
        """The whole object, and the checksum in the header x-goog-hash."""
        try:
            headers, content = await self._get(path, **bounded_range(size, largest))
        except Exception as error:
            if getattr(error, "code", None) == _RANGE_NOT_SATISFIABLE:  # an empty object has no range
                return b"", None
            raise
        require_within(len(content), uri, largest)
        return content, _header_checksum(headers)

    async def fetch_range(self, path: str, start: int, length: int) -> bytes:
        """``length`` bytes from ``start`` on."""
        return (await self._get(path, start=start, end=start + length))[1]

    async def _get(self, path: str, **limits: int) -> tuple[Mapping[str, str], bytes]:
        """Headers, as far as there are any, and content of an object or a range of it."""
        bucket = self.fs.split_path(path)[0]
        is_zonal = self._is_zonal.get(bucket)
        if is_zonal is None or (is_zonal.done() and is_zonal.exception() is not None):  # not for ever
            is_zonal = self._is_zonal[bucket] = asyncio.ensure_future(gcs_is_zonal(self.fs, bucket))
        # Not to be cancelled with one of the requests that wait for it.
        if is_zonal.result() if is_zonal.done() else await asyncio.shield(is_zonal):
            return {}, await cat_file(self.fs, path, **limits)
        return await gcs_get(self.fs, path, **limits)

    def read_versioned(self, path: str) -> Versioned | None:
        """Read an object and its generation; None if there is none."""
        try:
            headers, content = gcs_call(self.fs, "GET", self.fs.url(path))
        except FileNotFoundError:
            return None
        return Versioned(bytes(content), str(headers["X-Goog-Generation"]))

    def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        """Write an object if it has this generation, or does not exist for None; returns the new one, or None."""
        bucket, key, _ = self.fs.split_path(path)
        parts = (
            ("application/json; charset=UTF-8", json.dumps({"name": key}).encode()),
            ("application/octet-stream", data),
        )
        body = b"".join(
            f"--{_BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n".encode() + part + b"\r\n" for kind, part in parts
        )
        try:
            response = gcs_call(
                self.fs,
                "POST",
                f"{gcs_location(self.fs)}/upload/storage/v1/b/{quote(bucket)}/o",
                uploadType="multipart",
                ifGenerationMatch=version or "0",
                headers={"Content-Type": f'multipart/related; boundary="{_BOUNDARY}"'},
                data=body + f"--{_BOUNDARY}--".encode(),
                json_out=True,
            )
        except FileExistsError:
            return None
        except FileNotFoundError:
            if version is None:
                raise  # the bucket
            return None
        return str(response["generation"])

    def remove_if(self, path: str, version: str) -> bool:
        """Delete an object if it has this generation; returns whether it did."""
        bucket, key, _ = self.fs.split_path(path)
        try:
            gcs_call(self.fs, "DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=version)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def conditional_write_weakness(self, path: str) -> str | None:
        """None: the server compares the generation."""
        return None

    def bucket_settings(self, path: str) -> BucketSettings:
        """Settings by the JSON API: https://cloud.google.com/storage/docs/json_api/v1/buckets#resource."""
        bucket = self.fs.split_path(path)[0]
        # Emulators leave out what they do not have, and so does Google where there is no policy.
        details = gcs_call(self.fs, "GET", "b/{}", bucket, json_out=True)
        seconds = int((details.get("retentionPolicy") or {}).get("retentionPeriod") or 0)
        held = "every new object is put on hold" if details.get("defaultEventBasedHold") else None
        return BucketSettings(
            bucket,
            region=str(details.get("location") or "").lower() or None,
            retention=f"objects cannot be deleted or replaced for {seconds:,} s" if seconds else held,
            soft_delete_seconds=int((details.get("softDeletePolicy") or {}).get("retentionDurationSeconds") or 0),
            versioning=bool((details.get("versioning") or {}).get("enabled")),
            storage_class=details.get("storageClass"),
        )


@functools.cache
def _connector(loop: asyncio.AbstractEventLoop) -> aiohttp.TCPConnector:
    async def make() -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=CONNECTIONS)

    connector: aiohttp.TCPConnector = sync(loop, make)
    return connector


def _header_checksum(headers: Mapping[str, str]) -> Checksum | None:
    """The checksum in response headers; None for content that was stored compressed and came unpacked."""
    if headers.get("Content-Encoding") or headers.get("X-Goog-Stored-Content-Encoding", "identity") != "identity":
        return None
    hashes = dict(re.findall(r"(crc32c|md5)=([A-Za-z0-9+/=]+)", headers.get("X-Goog-Hash", "")))
    kind = next((kind for kind in ("crc32c", "md5") if kind in hashes), None)
    return Checksum(kind, hashes[kind], certain=True) if kind else None
