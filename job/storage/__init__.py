"""Files on any fsspec filesystem: the only module that knows buckets from disks.

Every function takes a URI (``gs://``, ``s3://``, ``http(s)://``, ``memory://``, ``file://``) or a
plain path, and raises :class:`~job.errors.StorageError` with that URI in it, or its kind
:class:`~job.errors.StorageOutage` where the bucket itself is in trouble and a retry may help.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import random
import shutil
import stat
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, NamedTuple

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem

from job import redact
from job.errors import DataError, JobError, StorageError, StorageOutage, first_line
from job.storage.errors import Kind, classify
from job.storage.verified_reads import (
    ChecksumMismatch,
    TooLarge,
    bounds,
    checksum_of,
    observe,
    read_whole,
    require_within,
)

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
_http_client: ContextVar[Callable[..., Awaitable[aiohttp.ClientSession]] | None] = ContextVar("http", default=None)


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
    client = _http_client.get()
    with translate_errors(uri, "open"):
        authorized = redact.authorized(uri)
        fs, path = url_to_fs(authorized, **({"get_client": client} if client and _is_web(uri) else {}))
        return fs, str(path)


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
    found: list[str] = fsspec.available_protocols()
    return found


def is_local(uri: str) -> bool:
    """True for a plain path or ``file://`` URI."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def is_process_local(uri: str) -> bool:
    """True where other processes cannot see the data (``memory://``)."""
    return "memory" in protocols_of(filesystem(uri)[0])


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it; the query of a web server's URI stays at the end."""
    path, query = redact.split_query(uri)
    return "/".join([path.rstrip("/"), *(part.strip("/") for part in parts)]) + query


def split(uri: str) -> tuple[str, str]:
    """The URI of the folder of ``uri``, and the name in it; a query goes with the folder."""
    path, query = redact.split_query(uri)
    folder, _, name = path.rpartition("/")
    return (folder or ("/" if path.startswith("/") else ".")) + query, name


def beside(uri: str, suffix: str) -> str:
    """``uri`` with ``suffix`` at the end of its name."""
    path, query = redact.split_query(uri)
    return path + suffix + query


def basename(uri: str) -> str:
    """The last part of a URI, without a query string (``https://host/a.zip?alt=media`` → ``a.zip``)."""
    return redact.split_query(uri)[0].rstrip("/").rsplit("/", 1)[-1]


def exists(uri: str) -> bool:
    """Whether an object (or a prefix with something under it) is there.

    Raises:
        StorageError: the store does not say. A web server that denies access counts as one that has no such file, since
            public buckets do not tell the two apart.
    """
    fs, path = filesystem(uri)
    with translate_errors(uri, "look up"):
        try:
            fs.info(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error.__cause__, JobError):
                raise error.__cause__ from None
            cause = _cause(error)
            if cause is error or (isinstance(fs, HTTPFileSystem) and classify(cause) is Kind.DENIED):
                return False
            raise
        return True


def info(uri: str) -> dict[str, Any]:
    """What the filesystem knows of one object: ``size`` in bytes, ``type``, checksums."""
    fs, path = filesystem(uri)
    with translate_errors(uri, "look up"):
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
    path = (redact.identity(path) if isinstance(fs, HTTPFileSystem) else path).rstrip("/")
    with translate_errors(uri, "list"):
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
                with translate_errors(uri, "list"):
                    page, below = _page(path, folder, listing.result())
                waiting.extendleft((name, None) for name in reversed(below))
                found += len(page)
                yield page
        finally:
            pool.shutdown(cancel_futures=True)
    if not found and not (isinstance(fs, LocalFileSystem) and fs.isdir(path)):
        with translate_errors(uri, "list"):
            raise FileNotFoundError(path)


def _list_folder(fs: fsspec.AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    try:
        if isinstance(fs, HTTPFileSystem):
            return _list_web_folder(fs, folder)
        listing: list[dict[str, Any]] = fs.ls(folder or fs.root_marker, detail=True)
    finally:
        fs.invalidate_cache(folder)  # else it would keep the listing of the whole bucket
    return listing


def _list_web_folder(fs: HTTPFileSystem, folder: str) -> list[dict[str, Any]]:
    """The links on a page, without the credentials that fsspec copies into their addresses."""
    url = redact.authorized(folder)
    listing: list[dict[str, Any]] = fs.ls(url, detail=True)
    for details in listing:
        name = details["name"]
        if name.startswith(f"{url.rstrip('/')}/"):
            name = f"{folder.rstrip('/')}/{name[len(url.rstrip('/')) + 1 :]}"
        details["name"] = redact.identity(name)
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
    with translate_errors(uri, "read"):
        data: bytes = fs.cat_file(path)
        return data


def read_bounded(uri: str, limit: int) -> bytes:
    """The whole object, where it has at most ``limit`` bytes; a larger one is not read.

    Raises:
        DataError: it is larger.
    """
    fs, path = filesystem(uri)
    with translate_errors(uri, "read"):
        details = fs.info(path)
        if details.get("type") == "other":
            raise DataError(f"{uri} is not a regular file.")
        size = details.get("size")
        if isinstance(size, int) and not isinstance(fs, LocalFileSystem):
            data: bytes = fs.cat_file(path) if size <= limit else b""
        else:
            with fs.open(path, "rb") as file:
                data = file.read(limit + 1)
            size = size if isinstance(size, int) else len(data)
    if max(size, len(data)) > limit:
        raise DataError(f"{uri} has {size:,} bytes, more than the {limit:,} that such a file may have.")
    return data


def info_below(root: str, key: str) -> dict[str, Any]:
    """:func:`info` of the object ``key`` below ``root``, whatever characters the key has."""
    fs, path = filesystem(root)
    with translate_errors(join(root, key), "look up"):
        found: dict[str, Any] = fs.info(f"{path.rstrip('/')}/{key}" if path else key)
        return found


CONNECTIONS = 256
"""Connections that a process opens for reading; aiohttp's 100 would limit it at 100 ms a request."""


class Reader:
    """Reads objects below one root, for as long as a process works with it; not to be sent to another one.

    Whole objects are checked against the checksum that their store sends; a mismatch is a
    :class:`~job.storage.verified_reads.ChecksumMismatch`, a kind of outage, so that who retries reads again.

    Args:
        largest: bytes of the largest object that is read whole; None: any.

    Attributes:
        is_local: on this machine, so that reading costs no request.
        is_async: whether :meth:`fetch` is there to have many requests in flight.
        mismatches: objects so far whose content did not match their checksum, each attempt counted.
    """

    def __init__(self, root: str, largest: int | None = None) -> None:
        self.root = root
        self.largest = largest
        self.mismatches = 0
        self._refused: dict[str, bytes] = {}
        self._checks_etags = True
        self._fs, path = filesystem(root)
        if "gs" in protocols_of(self._fs):
            self._fs = type(self._fs)(session_kwargs={"connector": _connector(self._fs.loop)})
            observe(self._fs)
        self._is_web = isinstance(self._fs, HTTPFileSystem)
        self._prefix = path.rstrip("/") + "/" if path else ""
        self._plain = isinstance(self._fs, LocalFileSystem)
        self.is_local = self._plain or "memory" in protocols_of(self._fs)
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
        with translate_errors(self._uri(key), "read"), _final():
            if self._plain:
                return self._read_file(key, start, length)
            if self.is_async:
                content: bytes = sync(self._fs.loop, self._fetch_again, key, start, length)
                return content
            if length is not None:
                data: bytes = self._fs.cat_file(self._path(key), **_limits(start, length))
                return data
            data = self._fs.cat_file(self._path(key), **bounds(-1, self.largest))
            require_within(data, self._uri(key), self.largest)
            return data

    async def fetch(self, key: str, start: int = 0, length: int | None = None, size: int = -1) -> bytes:
        """:meth:`read`, without waiting for it.

        Args:
            size: bytes of the object when it was listed; -1: unknown.
        """
        with translate_errors(self._uri(key), "read"), _final():
            if length is None:
                return await self._fetch_whole(key, size)
            data: bytes = await self._fs._cat_file(self._path(key), **_limits(start, length))
            return data

    async def _fetch_again(self, key: str, start: int, length: int | None) -> bytes:
        """:meth:`fetch`; content that does not match its checksum is requested again."""
        for pause in (0.1, 1.0, 4.0):
            try:
                return await self.fetch(key, start, length)
            except ChecksumMismatch:
                await asyncio.sleep(pause)
        return await self.fetch(key, start, length)

    async def _fetch_whole(self, key: str, size: int) -> bytes:
        uri = self._uri(key)
        try:
            content = await read_whole(self._fs, self._path(key), uri, size, self.largest)
        except ChecksumMismatch as error:
            if not error.certain and not self._checks_etags:
                return error.content
            self.mismatches += 1
            if self._refused.get(key) != error.digest:
                self._refused[key] = error.digest
                log.warning("%s. It is requested again (mismatches so far: %d)", error, self.mismatches)
                raise
            # Two transfers do not fail alike.
            if error.certain:
                raise StorageError(f"{error}, twice alike: it is damaged in the store. Upload it again.") from error
            self._checks_etags = False
            log.warning("%s, twice alike: ETags below %s are no MD5 sums and are not checked", error, self.root)
            return error.content
        self._refused.pop(key, None)
        return content

    def _read_file(self, key: str, start: int, length: int | None) -> bytes:
        """A tenth of the cost of fsspec's own, and a half of pathlib's."""
        # O_NONBLOCK: to open a named pipe would wait for its writer.
        descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, "it is no regular file")
            size = max(status.st_size - start, 0) if length is None else length
            if length is None and self.largest is not None and size > self.largest:
                raise TooLarge(f"{self._uri(key)} is larger than {self.largest:,} bytes")
            content = os.pread(descriptor, size, start)
            while len(content) < size and (more := os.pread(descriptor, size - len(content), start + len(content))):
                content += more
            return content
        finally:
            os.close(descriptor)

    def _uri(self, key: str) -> str:
        return join(self.root, key) if key else self.root

    def _path(self, key: str) -> str:
        if self._is_web:  # credentials follow the path
            return redact.authorized(join(self.root, key) if key else self.root)
        return self._prefix + key if key else self._prefix.rstrip("/")


@contextlib.contextmanager
def _final() -> Iterator[None]:
    """Let an exception of a kind that :func:`translate_errors` does not know end in a message, too."""
    try:
        yield
    except (JobError, OSError, ImportError, ValueError):
        raise
    except Exception as error:
        if classify(error) in (Kind.DENIED, Kind.OUTAGE):
            raise
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error


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

    with translate_errors(uri, "look up"):
        return bool(sync(fs.loop, accepted) == "bytes")


@contextlib.contextmanager
def open_for_reading(uri: str) -> Iterator[IO[bytes]]:
    """The object as a file whose parts are fetched when they are read, some MB at a time."""
    fs, path = filesystem(uri)
    with translate_errors(uri, "read"), fs.open(path, "rb", block_size=4 << 20, cache_type="readahead") as file:
        yield file


def glob(pattern: str) -> list[str]:
    """URIs that match a pattern with ``*`` or ``?``, sorted."""
    fs, path = filesystem(pattern)
    with translate_errors(pattern, "list"):
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
    with translate_errors(uri, "write"):
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
    with translate_errors(uri, "write"):
        if isinstance(fs, LocalFileSystem):
            with source.open("rb") as file:
                _write_and_rename(Path(path), file, before_commit)
        else:
            before_commit()
            fs.put_file(str(source), path)
            require_same(uri, fs.info(path), source)


def require_same(uri: str, details: dict[str, Any], file: Path) -> None:
    """Hold a local copy of ``uri`` against what its store reports of it: size and, where known, checksum.

    Raises:
        StorageOutage: they differ: something was lost on the way.
    """
    size, expected, checksum = file.stat().st_size, details.get("size"), checksum_of(details)
    if isinstance(expected, int) and size != expected:
        raise StorageOutage(f"{uri}: {expected} bytes in the store, {size} here. Try again.")
    if checksum is not None and checksum.certain and not checksum.matches_file(file):
        raise StorageOutage(
            f"{uri}: the content here does not match its {checksum.kind.upper()} in the store ({checksum.value}). "
            "Try again."
        )


def create(uri: str, data: bytes) -> bool:
    """Write the object if there is none; returns whether this call made it. Of several callers one wins."""
    fs, path = filesystem(uri)
    with translate_errors(uri, "create"):
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
    with translate_errors(root, "write"):
        fs.pipe({f"{path.rstrip('/')}/{key}": content for key, content in contents.items()})


def write_text(uri: str, text: str, before_commit: Callable[[], None] = unconditionally) -> None:
    """:func:`write_bytes` of UTF-8."""
    write_bytes(uri, text.encode(errors="backslashreplace"), before_commit)


def download(uri: str, target: Path) -> None:
    """Copy one object to the local file ``target``, streaming."""
    fs, path = filesystem(uri)
    with translate_errors(uri, "download"):
        fs.get_file(path, str(target))


def download_verified(uri: str, target: Path) -> None:
    """:func:`download`, and a check of size and checksum; a copy that differs is downloaded a second time.

    Raises:
        StorageOutage: both copies differ from what the store reports.
    """
    details = info(uri)
    expected = details.get("size")
    if isinstance(expected, int) and expected > shutil.disk_usage(target.parent).free:
        raise OSError(errno.ENOSPC, f"{expected:,} bytes are needed")
    checksum = checksum_of(details)
    digests = []
    for attempt in range(2):
        download(uri, target)
        try:
            require_same(uri, details, target)
        except StorageOutage as error:
            if attempt:
                raise
            log.warning("%s It is downloaded again", error)
            continue
        if checksum is None or checksum.certain or checksum.matches_file(target):
            return
        with target.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
        if not attempt:
            log.warning("%s: the content does not match its ETag in the store; it is downloaded again", uri)
    if len(set(digests)) > 1:
        raise StorageOutage(f"{uri}: two downloads differ from each other and from the ETag in the store. Try again.")
    log.warning("%s: two downloads are alike: its ETag is no MD5 sum and is not checked", uri)


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
    with translate_errors(uri, "delete"), contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def remove_tree(uri: str) -> None:
    """Delete everything below a prefix; it is no error when nothing is there."""
    fs, path = filesystem(uri)
    with translate_errors(uri, "delete"), contextlib.suppress(FileNotFoundError):
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


def protocols_of(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """Names of the protocols that a filesystem serves."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextlib.contextmanager
def translate_errors(uri: str, action: str) -> Iterator[None]:
    """Translate what a filesystem raises to a :class:`~job.errors.StorageError` that names the URI.

    Args:
        action: what was tried, such as "read", for the message.
    """
    try:
        yield
    except JobError:
        raise
    except FileNotFoundError as error:
        if isinstance(error.__cause__, JobError):  # fsspec's http filesystem hides what its client raises
            raise error.__cause__ from None
        if (cause := _cause(error)) is not error:
            raise _remote_error(uri, action, cause) from cause
        raise StorageError(
            f"cannot {action} {uri}: no such bucket, object or folder. Check the spelling; for a "
            "bucket, also that it exists in the project of your credentials."
        ) from error
    except (NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(f"cannot {action} {uri}: {error.strerror or error}.") from error
    except ImportError as error:
        raise StorageError(f"cannot {action} {uri}: {error}.") from error
    except Exception as error:
        kind = classify(error)
        if kind in (Kind.DENIED, Kind.OUTAGE):
            raise _remote_error(uri, action, error) from error
        if kind is not Kind.UNKNOWN:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise StorageError(f"cannot {action} {uri}: {reason.removesuffix('.')}.") from error
        raise


def _remote_error(uri: str, action: str, error: BaseException) -> StorageError:
    kind = classify(error)
    if kind is not Kind.DENIED:
        raised = StorageOutage if kind is Kind.OUTAGE else StorageError
        return raised(f"cannot {action} {uri}: {type(error).__name__}: {first_line(error)}")
    mend = (
        "If it needs credentials (a signature, user:password), give the whole URI by the option that names it: "
        "credentials are saved nowhere, and a signature expires."
        if uri.startswith(redact.HTTP)
        else "Give the account the job runs as the right to do this (on Google Cloud: roles/storage.objectUser on the "
        "bucket)."
    )
    return StorageError(f"cannot {action} {uri}: permission denied ({first_line(error)}). {mend}")


def _cause(error: BaseException) -> BaseException:
    """What made a web server's file "not found", which fsspec says of every failure, or the error itself."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.ClientResponseError) and cause.status in (404, 410):
        return error
    return cause if isinstance(cause, (aiohttp.ClientError, TimeoutError)) else error
