"""Files on any fsspec filesystem: the only module that knows buckets from disks.

Every function takes a URI (``gs://``, ``s3://``, ``http(s)://``, ``memory://``, ``file://``) or a
plain path, and raises :class:`~job.errors.StorageError` with that URI in it, or its kind
:class:`~job.errors.StorageOutage` where the bucket itself is in trouble and a retry may help.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import random
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem

from job.errors import StorageError, StorageOutage

log = logging.getLogger(__name__)

_creating = threading.Lock()
"""The memory filesystem, too, looks first and then writes; a bucket's server decides by itself."""


def use_gcs_emulator(url: str) -> None:
    """Let gs:// URIs mean the GCS server at ``url``, for this process and its children."""
    os.environ["STORAGE_EMULATOR_HOST"] = url
    # gcsfs probes a bucket's type over gRPC, which emulators do not speak: 60 s lost a call.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    # No credentials are asked for; gcsfs would look for some, on a network that may not be there.
    os.environ["FSSPEC_GS_TOKEN"] = "anon"
    fsspec.config.conf.setdefault("gs", {})["token"] = "anon"


if os.environ.get("STORAGE_EMULATOR_HOST"):
    use_gcs_emulator(os.environ["STORAGE_EMULATOR_HOST"])


LISTINGS_IN_FLIGHT = 16


class Entry(NamedTuple):
    """One object under a listed prefix.

    Attributes:
        key: path relative to the prefix, ``/`` between its parts; a directory ends with ``/``.
        size: bytes (0 for a directory, -1 where the store does not tell).
        version: 64 bits that change with the content: of the object's generation, ETag or modification time.
    """

    key: str
    size: int
    version: int = 0

    @property
    def is_dir(self) -> bool:
        """Whether this is a folder, or a bucket's placeholder for one."""
        return self.key.endswith("/")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of ``uri`` and the path within it.

    Call it in the process that uses it: fsspec's asynchronous filesystems do not survive a fork
    (https://github.com/fsspec/gcsfs/issues/379).
    """
    with _explained(uri, "open"):
        fs, path = url_to_fs(uri)
        return fs, str(path)


def is_local(uri: str) -> bool:
    """True for a plain path or ``file://`` URI."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def is_process_local(uri: str) -> bool:
    """True where other processes cannot see the data (``memory://``)."""
    return "memory" in _protocols(filesystem(uri)[0])


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def basename(uri: str) -> str:
    """The last part of a URI, without a query string (``https://host/a.zip?alt=media`` → ``a.zip``)."""
    path = uri.split("?", 1)[0] if uri.startswith(("http://", "https://")) else uri
    return path.rstrip("/").rsplit("/", 1)[-1]


def exists(uri: str) -> bool:
    """Whether an object (or a prefix with something under it) is there."""
    fs, path = filesystem(uri)
    with _explained(uri, "look up"):
        return bool(fs.exists(path))


def info(uri: str) -> dict[str, Any]:
    """What the filesystem knows of one object: ``size`` in bytes, ``type``, checksums."""
    fs, path = filesystem(uri)
    with _explained(uri, "look up"):
        found: dict[str, Any] = fs.info(path)
        return found


def list_files(uri: str) -> list[Entry]:
    """Everything below the prefix ``uri``, sorted by key.

    Raises:
        StorageError: nothing is there, or it may not be listed.
    """
    return sorted((entry for page in list_pages(uri) for entry in page), key=lambda entry: entry.key)


def list_pages(uri: str) -> Iterator[list[Entry]]:
    """Everything below the prefix ``uri``, folder by folder, each sorted; a folder's own files come first.

    Several folders are listed at once, and no more than those are held in memory.

    Raises:
        StorageError: nothing is there, or it may not be listed.
    """
    fs, path = filesystem(uri)
    path = path.rstrip("/")
    with _explained(uri, "list"):
        fs.invalidate_cache()  # a listing from before somebody's upload would be silently stale
    found = 0
    with ThreadPoolExecutor(LISTINGS_IN_FLIGHT) as pool:
        waiting: deque[tuple[str, Future[list[dict[str, Any]]] | None]] = deque([(path, None)])
        try:
            while waiting:
                for place in range(min(LISTINGS_IN_FLIGHT, len(waiting))):
                    folder, listing = waiting[place]
                    waiting[place] = (folder, listing or pool.submit(_list_folder, fs, folder))
                folder, listing = waiting.popleft()
                assert listing is not None
                with _explained(uri, "list"):
                    page, below = _page(path, folder, listing.result())
                waiting.extendleft((name, None) for name in reversed(below))
                found += len(page)
                yield page
        finally:
            pool.shutdown(cancel_futures=True)
    if not found and not (isinstance(fs, LocalFileSystem) and fs.isdir(path)):
        with _explained(uri, "list"):
            raise FileNotFoundError(path)


def _list_folder(fs: fsspec.AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    try:
        listing: list[dict[str, Any]] = fs.ls(folder or fs.root_marker, detail=True)
    finally:
        fs.invalidate_cache(folder)  # else it would keep the listing of the whole bucket
    return listing


def _page(root: str, folder: str, listing: list[dict[str, Any]]) -> tuple[list[Entry], list[str]]:
    """The entries of one folder's listing, and the folders below it."""
    start, page, below = len(root) + 1 if root else 0, [], []
    for details in listing:
        name = details["name"]
        stripped = name.rstrip("/")
        # Consoles make "folders" in buckets as empty objects whose name ends with a slash.
        if stripped == folder:
            if details["type"] != "directory" and name == folder:
                raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
        elif details["type"] == "directory" or name.endswith("/"):
            page.append(Entry(stripped[start:] + "/", 0))
            below.append(stripped)
        else:
            size = details.get("size")
            page.append(Entry(name[start:], -1 if size is None else int(size), version(details)))
    return sorted(page), sorted(below)


def version(details: dict[str, Any]) -> int:
    """64 bits that change with an object's content, from what its store tells (``fs.info``)."""
    for name in ("generation", "ETag", "etag", "md5Hash", "mtime", "LastModified", "Last-Modified", "created"):
        if details.get(name) is not None:
            told = f"{name} {details[name]} {details.get('size')}"
            return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "little")
    return 0


def read_bytes(uri: str) -> bytes:
    """The whole object."""
    fs, path = filesystem(uri)
    with _explained(uri, "read"):
        data: bytes = fs.cat_file(path)
        return data


CONNECTIONS = 256
"""Connections that a process opens for reading; aiohttp's 100 would limit it at 100 ms a request."""


class Reader:
    """Reads objects below one root, for as long as a process works with it; not to be sent to another one.

    Attributes:
        is_local: on this machine, so that reading costs no request.
        is_async: whether :meth:`fetch` is there to have many requests in flight.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._fs, path = filesystem(root)
        if "gs" in _protocols(self._fs):
            self._fs = type(self._fs)(session_kwargs={"connector": _connector(self._fs.loop)})
        self._prefix = path.rstrip("/") + "/" if path else ""
        self._plain = isinstance(self._fs, LocalFileSystem)
        self.is_local = self._plain or "memory" in _protocols(self._fs)
        self.is_async = isinstance(self._fs, AsyncFileSystem)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where :meth:`fetch` must run: the event loop of this process's filesystems."""
        loop: asyncio.AbstractEventLoop = self._fs.loop
        return loop

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``start`` on of ``root/key`` (of ``root`` for the empty key), or all of it.

        Raises:
            StorageError: it cannot be read.
        """
        with _explained(join(self.root, key) if key else self.root, "read"):
            if self._plain:
                # A tenth of the cost of fsspec's own, and a half of pathlib's.
                with open(self._path(key), "rb", buffering=0) as file:  # noqa: PTH123
                    file.seek(start)
                    return file.read(-1 if length is None else length) or b""
            data: bytes = self._fs.cat_file(self._path(key), **_limits(start, length))
            return data

    async def fetch(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """:meth:`read`, without waiting for it."""
        with _explained(join(self.root, key) if key else self.root, "read"):
            data: bytes = await self._fs._cat_file(self._path(key), **_limits(start, length))
            return data

    def _path(self, key: str) -> str:
        return self._prefix + key if key else self._prefix.rstrip("/")


@functools.cache
def _connector(loop: asyncio.AbstractEventLoop) -> aiohttp.TCPConnector:
    async def made() -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=CONNECTIONS)

    connector: aiohttp.TCPConnector = sync(loop, made)
    return connector


def _limits(start: int, length: int | None) -> dict[str, int]:
    return {} if length is None else {"start": start, "end": start + length}


def serves_ranges(uri: str) -> bool:
    """Whether parts of an object can be read: of web servers only from those that say so."""
    fs, path = filesystem(uri)
    if not isinstance(fs, HTTPFileSystem):
        return True

    async def accepted() -> str | None:
        session = await fs.set_session()
        async with session.head(fs.encode_url(path), allow_redirects=True) as response:
            told: str | None = response.headers.get("Accept-Ranges")
            return told

    with _explained(uri, "look up"):
        return bool(sync(fs.loop, accepted) == "bytes")


@contextlib.contextmanager
def open_for_reading(uri: str) -> Iterator[IO[bytes]]:
    """The object as a file whose parts are fetched when they are read, some MB at a time."""
    fs, path = filesystem(uri)
    with _explained(uri, "read"), fs.open(path, "rb", block_size=4 << 20, cache_type="readahead") as file:
        yield file


def glob(pattern: str) -> list[str]:
    """URIs that match a pattern with ``*`` or ``?``, sorted."""
    fs, path = filesystem(pattern)
    with _explained(pattern, "list"):
        fs.invalidate_cache()
        return sorted(fs.unstrip_protocol(name) if "://" in pattern else name for name in fs.glob(path))


def unconditionally() -> None:
    """Allow a write: the default of ``before_commit``."""


def write_bytes(uri: str, data: bytes, before_commit: Callable[[], None] = unconditionally) -> None:
    """Write the object whole or not at all: readers see the old content or the new.

    An object store's PUT is atomic by itself; a disk needs a temporary file and a rename.

    Args:
        uri: of the object.
        data: its content.
        before_commit: called immediately before the request or the rename; raises to prevent it.
    """
    fs, path = filesystem(uri)
    with _explained(uri, "write"):
        if isinstance(fs, LocalFileSystem):
            _write_and_rename(Path(path), io.BytesIO(data), before_commit)
        else:
            before_commit()
            fs.pipe_file(path, data)


def upload(source: Path, uri: str, before_commit: Callable[[], None] = unconditionally) -> None:
    """:func:`write_bytes` of a local file's content, and a check that it arrived.

    Raises:
        StorageOutage: what the store says it has is not what was sent.
    """
    fs, path = filesystem(uri)
    with _explained(uri, "write"):
        if isinstance(fs, LocalFileSystem):
            with source.open("rb") as file:
                _write_and_rename(Path(path), file, before_commit)
        else:
            before_commit()
            fs.put_file(str(source), path)
            require_same(uri, fs.info(path), source)


def require_same(uri: str, details: dict[str, Any], file: Path) -> None:
    """Hold a local copy of ``uri`` against what its store says of it: size and, where known, MD5.

    Raises:
        StorageOutage: they differ: something was lost on the way.
    """
    size, expected, md5 = file.stat().st_size, details.get("size"), details.get("md5Hash")
    if isinstance(expected, int) and size != expected:
        raise StorageOutage(f"{uri}: {expected} bytes in the store, {size} here. Try again.")
    if isinstance(md5, str):
        with file.open("rb") as content:
            found = base64.b64encode(hashlib.file_digest(content, "md5").digest()).decode()
        if found != md5:
            raise StorageOutage(f"{uri}: the content here does not match its MD5 ({found}, stored {md5}). Try again.")


def create(uri: str, data: bytes) -> bool:
    """Write the object if there is none; returns whether this call made it. Of several callers one wins."""
    fs, path = filesystem(uri)
    with _explained(uri, "create"):
        try:
            if isinstance(fs, LocalFileSystem):
                # fsspec looks first and then writes; the kernel does both at once.
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with Path(path).open("xb") as file:
                    file.write(data)
            else:
                with _creating:
                    fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True


def write_many(root: str, contents: dict[str, bytes]) -> None:
    """Write objects ``root/key``, concurrently where the filesystem can."""
    fs, path = filesystem(root)
    with _explained(root, "write"):
        fs.pipe({f"{path.rstrip('/')}/{key}": content for key, content in contents.items()})


def write_text(uri: str, text: str, before_commit: Callable[[], None] = unconditionally) -> None:
    """:func:`write_bytes` of UTF-8."""
    write_bytes(uri, text.encode(), before_commit)


def download(uri: str, target: Path) -> None:
    """Copy one object to the local file ``target``, streaming."""
    fs, path = filesystem(uri)
    with _explained(uri, "download"):
        fs.get_file(path, str(target))


def retry(action: Callable[[], None], seconds: float, waiting: str) -> None:
    """Do ``action``, again and again for ``seconds`` while the bucket is in trouble, with jittered backoff.

    The filesystems themselves retry a request several times first.

    Args:
        waiting: what to say in the log when the first attempt fails.

    Raises:
        StorageOutage: the last failure.
    """
    deadline, pause = time.monotonic() + seconds, 0.5
    while True:
        try:
            return action()
        except StorageOutage as error:
            if pause == 0.5:
                log.warning("%s: %s", waiting, error)
            pause = min(pause * 2, 16.0)
            wait = pause * random.uniform(0.5, 1.0)
            if time.monotonic() + wait > deadline:
                raise
            time.sleep(wait)


def remove(uri: str) -> None:
    """Delete one object; it is no error when it is already gone."""
    fs, path = filesystem(uri)
    with _explained(uri, "delete"), contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_tree(uri: str) -> None:
    """Delete everything below a prefix; it is no error when nothing is there."""
    fs, path = filesystem(uri)
    with _explained(uri, "delete"), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def _write_and_rename(target: Path, content: IO[bytes], before_commit: Callable[[], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        before_commit()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextlib.contextmanager
def _explained(uri: str, action: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise StorageError(
            f"cannot {action} {uri}: no such bucket, object or folder. Check the spelling; for a "
            "bucket, also that it exists in the project of your credentials."
        ) from error
    except (NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(f"cannot {action} {uri}: {error.strerror or error}.") from error
    except ImportError as error:
        raise StorageError(f"cannot {action} {uri}: {error}.") from error
    except ValueError as error:
        raise StorageError(f"cannot {action} {uri}: {error}.") from error
    except Exception as error:
        if _is_denied(error):
            raise StorageError(
                f"cannot {action} {uri}: permission denied ({_first_line(error)}). Give the account the job "
                "runs as the right to do this (on Google Cloud: roles/storage.objectUser on the bucket)."
            ) from error
        if _looks_remote(error):
            raise StorageOutage(f"cannot {action} {uri}: {type(error).__name__}: {_first_line(error)}") from error
        if isinstance(error, OSError):
            raise StorageError(f"cannot {action} {uri}: {error.strerror or _first_line(error)}.") from error
        raise


def _is_denied(error: Exception) -> bool:
    code = getattr(error, "code", None) or getattr(error, "status", None)
    told = isinstance(error, OSError) and str(error).startswith("Forbidden")  # gcsfs, without a code
    return told or isinstance(error, PermissionError) or code in (401, 403, "401", "403")


def _looks_remote(error: Exception) -> bool:
    """Cloud clients raise their own families of exceptions, most of them not OSError."""
    roots = ("aiohttp", "gcsfs", "google", "botocore", "s3fs", "requests", "asyncio", "fsspec")
    known = any(kind.__module__.split(".")[0] in roots for kind in type(error).__mro__)
    return known or isinstance(error, (TimeoutError, ConnectionError))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
