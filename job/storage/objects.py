"""Whole objects: look up, read, write, copy, delete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from job.errors import DataError, JobError, StorageOutage
from job.process.jitter import jittered
from job.storage.bucket_settings import BucketSettings
from job.storage.checksums import checksum_of
from job.storage.errors import translate_errors
from job.storage.filesystems import filesystem, store_of
from job.storage.uris import join

log = logging.getLogger(__name__)


def exists(uri: str) -> bool:
    """Whether there is an object (or a prefix with something under it).

    Raises:
        StorageError: the store does not say. A web server that denies access counts as one that has no such file, since
            public buckets do not tell the two apart.
    """
    store, path = store_of(uri)
    with translate_errors(uri, "look up"):
        try:
            store.fs.info(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error.__cause__, JobError):
                raise error.__cause__ from None
            if store.is_missing(error):
                return False
            raise
        return True


def info(uri: str) -> dict[str, Any]:
    """The details that the filesystem reports of one object: ``size`` in bytes, ``type``, checksums."""
    fs, path = filesystem(uri)
    with translate_errors(uri, "look up"):
        details: dict[str, Any] = fs.info(path)
        return details


def modified(uri: str) -> datetime | None:
    """When an object was written, by the store's clock; None where the store does not say."""
    fs, path = filesystem(uri)
    with translate_errors(uri, "look up"):
        try:
            when: datetime = fs.modified(path)
        except NotImplementedError:
            return None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


def bucket_settings(uri: str) -> BucketSettings | None:
    """Settings of the bucket that holds ``uri``; None where the store has no buckets, or does not tell.

    Raises:
        StorageError: the account may not read them.
    """
    store, path = store_of(uri)
    with translate_errors(uri, "read the settings of the bucket of"):
        return store.bucket_settings(path)


def info_below(root: str, key: str) -> dict[str, Any]:
    """:func:`info` of the object ``key`` below ``root``, whatever characters the key has."""
    store, path = store_of(root)
    with translate_errors(join(root, key), "look up"):
        details: dict[str, Any] = store.fs.info(store.child(root, path, key))
        return details


def serves_ranges(uri: str) -> bool:
    """Whether parts of an object can be read: of web servers only from those that declare it."""
    store, path = store_of(uri)
    with translate_errors(uri, "look up"):
        return store.serves_ranges(path)


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
    store, path = store_of(uri)
    with translate_errors(uri, "read"):
        details = store.fs.info(path)
        if details.get("type") == "other":
            raise DataError(f"{uri} is not a regular file.")
        size = details.get("size")
        if isinstance(size, int) and not store.on_disk:
            data: bytes = store.fs.cat_file(path) if size <= limit else b""
        else:
            with store.fs.open(path, "rb") as file:
                data = file.read(limit + 1)
            size = size if isinstance(size, int) else len(data)
    if max(size, len(data)) > limit:
        raise DataError(f"{uri} has {size:,} bytes, more than the {limit:,} that such a file may have.")
    return data


@contextlib.contextmanager
def open_for_reading(uri: str) -> Iterator[IO[bytes]]:
    """The object as a file whose parts are fetched when they are read, some MB at a time."""
    fs, path = filesystem(uri)
    with translate_errors(uri, "read"), fs.open(path, "rb", block_size=4 << 20, cache_type="readahead") as file:
        yield file


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
    store, path = store_of(uri)
    with translate_errors(uri, "write"):
        store.write(path, data, before_commit)


def write_text(uri: str, text: str, before_commit: Callable[[], None] = unconditionally) -> None:
    """:func:`write_bytes` of UTF-8."""
    write_bytes(uri, text.encode(errors="backslashreplace"), before_commit)


def write_many(root: str, contents: dict[str, bytes]) -> None:
    """Write objects ``root/key``, concurrently where the filesystem can."""
    fs, path = filesystem(root)
    with translate_errors(root, "write"):
        fs.pipe({f"{path.rstrip('/')}/{key}": content for key, content in contents.items()})


def upload(source: Path, uri: str, before_commit: Callable[[], None] = unconditionally) -> None:
    """:func:`write_bytes` of a local file's content, and a check that it arrived.

    Raises:
        StorageOutage: what the store reports differs from what was sent.
    """
    store, path = store_of(uri)
    with translate_errors(uri, "write"):
        details = store.upload(source, path, before_commit)
        if details is not None:
            require_same(uri, details, source)


def require_same(uri: str, details: dict[str, Any], file: Path) -> None:
    """Compare a local copy of ``uri`` with what its store reports: size and, where known, checksum.

    Raises:
        StorageOutage: they differ: something was lost in transfer.
    """
    size, expected, checksum = file.stat().st_size, details.get("size"), checksum_of(details)
    if isinstance(expected, int) and size != expected:
        raise StorageOutage(f"{uri}: {expected} bytes in the store, {size} here. Try again.")
    if checksum is not None and checksum.certain and not checksum.matches_file(file):
        raise StorageOutage(
            f"{uri}: the content here does not match its {checksum.kind.upper()} in the store ({checksum.value}). "
            "Try again."
        )


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
    log.warning("%s: two downloads are equal, so its ETag is not an MD5 checksum; it is not checked", uri)


def retry(action: Callable[[], None], seconds: float, waiting: str) -> None:
    """Call ``action``; retry transient errors for ``seconds``, with jittered backoff.

    The filesystems themselves retry a request several times first.

    Args:
        waiting: beginning of the log line for the first failure, such as "the upload waits".

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
            wait = jittered(pause)
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
