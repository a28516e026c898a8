"""From a URI to the fsspec filesystem that serves it, with the credentials that the user gave."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar

import aiohttp
import fsspec
from fsspec.core import url_to_fs

from job import redact
from job.storage.errors import translate_errors
from job.storage.stores import Store, store_for

_http_client: ContextVar[Callable[..., Awaitable[aiohttp.ClientSession]] | None] = ContextVar("http", default=None)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of ``uri`` and the path within it.

    Call it in the process that uses it: fsspec's asynchronous filesystems do not survive a fork
    (https://github.com/fsspec/gcsfs/issues/379).
    """
    client = _http_client.get()
    with translate_errors(uri, "open"):
        authorized = redact.authorized(uri)
        fs, path = url_to_fs(authorized, **({"get_client": client} if client and _is_web(uri) else {}))
        return fs, str(path)


def store_of(uri: str) -> tuple[Store, str]:
    """The store of ``uri``, and the path within its filesystem."""
    fs, path = filesystem(uri)
    return store_for(fs), path


@contextlib.contextmanager
def http_client(client: Callable[..., Awaitable[aiohttp.ClientSession]]) -> Iterator[None]:
    """Make the sessions of this context's http(s) filesystems by ``client``, as HTTPFileSystem's ``get_client``."""
    token = _http_client.set(client)
    try:
        yield
    finally:
        _http_client.reset(token)


def _is_web(uri: str) -> bool:
    return uri.lower().startswith(("http://", "https://"))


def protocols() -> list[str]:
    """Names of all protocols that fsspec knows."""
    names: list[str] = fsspec.available_protocols()
    return names


def is_local(uri: str) -> bool:
    """True for a plain path or ``file://`` URI."""
    return store_of(uri)[0].on_disk


def is_process_local(uri: str) -> bool:
    """True where other processes cannot see the data (``memory://``)."""
    return store_of(uri)[0].in_memory
