"""Conditional writes: an object is written or deleted only if it is still the version that was read.

Google Cloud Storage has generations (ifGenerationMatch), S3 has entity tags (If-Match, If-None-Match), a disk has
POSIX locks. fsspec offers "create if absent" only (https://github.com/fsspec/filesystem_spec/issues/1693). This module
therefore sends the request itself through the filesystem's connection: ``_call`` of gcsfs and ``_call_s3`` of s3fs.
tests/integration/test_conditional.py notices when they change.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fsspec import AbstractFileSystem
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from job import storage
from job.errors import StorageOutage

LOCK_SECONDS = 20.0
"""How long the lock of a file on a disk is waited for: it is held for one read and one write."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BOUNDARY = "job-conditional-write"
_in_process = threading.Lock()
"""POSIX locks do not exclude the threads of one process from one another, and the memory filesystem has none."""


class Versioned(NamedTuple):
    """Content of an object and the version it was read at."""

    data: bytes
    version: str


def read_versioned(uri: str) -> Versioned | None:
    """Read an object and its version; None if there is no object.

    Raises:
        StorageError: it cannot be read.
    """
    store = _store(uri)
    with storage._explained(uri, "read"):
        return store.read()


def write_if(uri: str, data: bytes, version: str | None) -> str | None:
    """Write ``data`` if the object still has ``version``, or, for None, if there is no object.

    A filesystem repeats a request whose answer was lost, and the repetition is refused since the first one succeeded.
    An object that holds ``data`` therefore counts as written: the content of each call must be unique.

    Returns:
        The new version; None if the object has another version.

    Raises:
        StorageError: it cannot be written.
    """
    store = _store(uri)
    with storage._explained(uri, "write"):
        written = store.write(data, version)
        if written is None:
            current = store.read()
            if current is not None and current.data == data:
                return current.version
        return written


def remove_if(uri: str, version: str) -> bool:
    """Delete an object if it still has ``version``; returns whether it did.

    Raises:
        StorageError: it cannot be deleted.
    """
    store = _store(uri)
    with storage._explained(uri, "delete"):
        return store.remove(version)


def weakness(uri: str) -> str | None:
    """What conditional writes at ``uri`` do not protect from, as a clause for a message; None: they are complete."""
    store = _store(uri)
    with storage._explained(uri, "write"):
        return store.weakness()


class _Store(ABC):
    """One object in one kind of storage."""

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self.fs = fs
        self.path = path

    @abstractmethod
    def read(self) -> Versioned | None: ...

    @abstractmethod
    def write(self, data: bytes, version: str | None) -> str | None: ...

    @abstractmethod
    def remove(self, version: str) -> bool: ...

    def weakness(self) -> str | None:
        return None


class _GoogleCloudStorage(_Store):
    """https://cloud.google.com/storage/docs/request-preconditions. A failed condition is FileExistsError in gcsfs."""

    def read(self) -> Versioned | None:
        try:
            headers, content = self._call("GET", self.fs.url(self.path))
        except FileNotFoundError:
            return None
        return Versioned(bytes(content), str(headers["X-Goog-Generation"]))

    def write(self, data: bytes, version: str | None) -> str | None:
        bucket, key, _ = self.fs.split_path(self.path)
        parts = (
            ("application/json; charset=UTF-8", json.dumps({"name": key}).encode()),
            ("application/octet-stream", data),
        )
        body = b"".join(
            f"--{_BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n".encode() + part + b"\r\n" for kind, part in parts
        )
        try:
            answer = self._call(
                "POST",
                f"{self.fs._location}/upload/storage/v1/b/{quote(bucket)}/o",
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
        return str(answer["generation"])

    def remove(self, version: str) -> bool:
        bucket, key, _ = self.fs.split_path(self.path)
        try:
            self._call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=version)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def _call(self, *args: Any, **options: Any) -> Any:
        return sync(self.fs.loop, self.fs._call, *args, **options)


class _S3(_Store):
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html."""

    def read(self) -> Versioned | None:
        async def fetch() -> Versioned:
            answer = await self.fs._call_s3("get_object", **self._key())
            async with answer["Body"] as body:
                return Versioned(await body.read(), answer["ETag"])

        try:
            found: Versioned = sync(self.fs.loop, fetch)
        except FileNotFoundError:
            return None
        return found

    def write(self, data: bytes, version: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            answer = self.fs.call_s3("put_object", Body=data, **self._key(), **condition)
        except FileNotFoundError:
            if version is None:
                raise  # the bucket
            return None
        except OSError as error:
            if _is_condition_failed(error):
                return None
            raise
        return str(answer["ETag"])

    def remove(self, version: str) -> bool:
        try:
            self.fs.call_s3("delete_object", IfMatch=version, **self._key())
        except FileNotFoundError:
            return False
        except OSError as error:
            if _is_condition_failed(error):
                return False
            raise
        return True

    def _key(self) -> dict[str, str]:
        bucket, key, _ = self.fs.split_path(self.path)
        return {"Bucket": bucket, "Key": key}


def _is_condition_failed(error: OSError) -> bool:
    if isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code")
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


class _Compared(_Store):
    """Reads, compares and writes: complete where nobody else writes in between, which subclasses see to."""

    def read(self) -> Versioned | None:
        try:
            data = bytes(self.fs.cat_file(self.path))
        except FileNotFoundError:
            return None
        return Versioned(data, hashlib.sha256(data).hexdigest())

    def write(self, data: bytes, version: str | None) -> str | None:
        with self.locked():
            current = self.read()
            if (None if current is None else current.version) != version:
                return None
            self.replace(data)
            return hashlib.sha256(data).hexdigest()

    def remove(self, version: str) -> bool:
        with self.locked():
            current = self.read()
            if current is None or current.version != version:
                return False
            self.fs.rm_file(self.path)
            return True

    def replace(self, data: bytes) -> None:
        self.fs.pipe_file(self.path, data)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with _in_process:
            yield


class _Memory(_Compared):
    """One process sees it."""


class _Other(_Compared):
    """A filesystem whose conditional writes this module does not know."""

    def weakness(self) -> str | None:
        name = storage._protocols(self.fs)[0]
        return f"conditional writes are not supported on {name}://, so that two jobs that start at once may both get it"


class _Disk(_Compared):
    """A lock file beside the object, locked for the moment of a write; the lock of a killed process is gone."""

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        super().__init__(fs, path)
        self.lock = Path(path).with_name(f".{Path(path).name}.lock")
        self.can_lock = True

    def read(self) -> Versioned | None:
        try:
            data = Path(self.path).read_bytes()
        except FileNotFoundError:
            return None
        return Versioned(data, hashlib.sha256(data).hexdigest())

    def replace(self, data: bytes) -> None:
        storage.write_bytes(self.path, data)

    def remove(self, version: str) -> bool:
        with self.locked():
            current = self.read()
            if current is None or current.version != version:
                return False
            Path(self.path).unlink()
            self.lock.unlink(missing_ok=True)
            return True

    def weakness(self) -> str | None:
        kind = _mount_type(Path(self.path).absolute())
        if kind.startswith("fuse"):
            return f"locks on a {kind} mount are seen by processes of this machine only"
        with self.locked():
            return None if self.can_lock else f"files on this {kind} mount cannot be locked"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        # POSIX locks, since a forked child does not inherit them, and since NFS has them between machines.
        deadline = time.monotonic() + LOCK_SECONDS
        with _in_process:
            while True:
                self.lock.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    if self._try_lock(descriptor) and self._is_at_path(descriptor):
                        yield
                        return
                finally:
                    os.close(descriptor)
                if time.monotonic() > deadline:
                    raise StorageOutage(
                        f"{self.path}: another process has held the lock {self.lock} for {LOCK_SECONDS:.0f} s. It may "
                        "be stopped (SIGSTOP): end it, or let it go on."
                    )
                time.sleep(0.02)

    def _try_lock(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            self.can_lock = False
        return True

    def _is_at_path(self, descriptor: int) -> bool:
        """Whether the locked file is still the one that others will lock: :meth:`remove` deletes it."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.lock.stat())
        except FileNotFoundError:
            return False


def _mount_type(path: Path) -> str:
    """Type of the filesystem that holds ``path``, by proc(5)'s mountinfo; "unknown" elsewhere than on Linux."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            point = fields.split()[4].encode().decode("unicode_escape")
            if path.is_relative_to(point) and len(point) >= len(best):
                best, kind = point, rest.split()[0]
    return kind


_STORES: dict[str, Callable[[AbstractFileSystem, str], _Store]] = {
    "gs": _GoogleCloudStorage,
    "s3": _S3,
    "memory": _Memory,
}


def _store(uri: str) -> _Store:
    fs, path = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return _Disk(fs, path)
    kind = next((_STORES[name] for name in storage._protocols(fs) if name in _STORES), _Other)
    return kind(fs, path)
