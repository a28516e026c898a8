"""``http://`` and ``https://``: web servers."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem

from job import redact
from job.storage.checksums import Checksum, require_within
from job.storage.fsspec_internals import raise_for_status
from job.storage.http_status import DENIED, cause_of_not_found, http_status
from job.storage.stores.base import Store
from job.storage.uris import join

_CHUNK = 1 << 20


class WebServer(Store):
    """URIs are paths here, and may have credentials in their query, which follows the path."""

    protocols = ("http", "https")
    libraries = ("aiohttp",)
    mistakes = ("InvalidURL", "ClientConnectorCertificateError", "SSLCertVerificationError")

    @classmethod
    def serves(cls, fs: fsspec.AbstractFileSystem) -> bool:
        """Whether the class is the one for ``fs``."""
        return isinstance(fs, HTTPFileSystem)

    def child(self, root: str, path: str, key: str) -> str:
        """The URL of the object ``key`` below ``root``, with its credentials."""
        return redact.authorized(join(root, key) if key else root)

    def is_missing(self, error: BaseException) -> bool:
        """Whether the file is missing; public buckets do not tell it from one that may not be read."""
        cause = cause_of_not_found(error)
        return cause is error or http_status(cause) in DENIED

    def listing_root(self, path: str) -> str:
        """The URL without credentials, as :meth:`list_folder` returns them."""
        return redact.identity(path).rstrip("/")

    def list_folder(self, folder: str) -> list[dict[str, Any]]:
        """The links on a page, without the credentials that fsspec copies into their addresses."""
        url = redact.authorized(folder)
        listing: list[dict[str, Any]] = self.fs.ls(url, detail=True)
        for details in listing:
            name = details["name"]
            if name.startswith(f"{url.rstrip('/')}/"):
                name = f"{folder.rstrip('/')}/{name[len(url.rstrip('/')) + 1 :]}"
            details["name"] = redact.identity(name)
        return listing

    def serves_ranges(self, path: str) -> bool:
        """Whether the server declares that it does."""

        async def accept_ranges() -> str | None:
            session = await self.fs.set_session()
            async with session.head(self.fs.encode_url(path), allow_redirects=True) as response:
                header: str | None = response.headers.get("Accept-Ranges")
                return header

        return bool(sync(self.fs.loop, accept_ranges) == "bytes")

    async def fetch(self, path: str, uri: str, size: int, largest: int | None) -> tuple[bytes, Checksum | None]:
        """The whole object; a response that grows beyond ``largest`` is given up."""
        session = await self.fs.set_session()
        async with session.get(self.fs.encode_url(path), **self.fs.kwargs) as response:
            raise_for_status(self.fs, response, path)
            content = bytearray()
            async for chunk in response.content.iter_chunked(_CHUNK):
                content += chunk
                require_within(max(len(content), response.content_length or 0), uri, largest)
            return bytes(content), None
