"""Plain paths and ``file://``: files of this machine. Conditional writes use POSIX locks, which NFS shares."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from job.errors import StorageOutage
from job.storage.checksums import require_within
from job.storage.stores.base import Store, Versioned, in_process

LOCK_SECONDS = 20.0
"""How long to wait for the lock of a file: it is held for a comparison and a rename."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class _VersionChanged(Exception):
    """The file has another version than expected."""


class LocalDisk(Store):
    """Files are written by rename; a lock file beside a file makes its conditional writes exclusive.

    The lock is held for the moment of a write, and ends with the process that holds it.
    """

    protocols = ("file", "local")
    on_disk = True

    @classmethod
    def serves(cls, fs: fsspec.AbstractFileSystem) -> bool:
        """Whether the class is the one for ``fs``."""
        return isinstance(fs, LocalFileSystem)

    def list_folder(self, folder: str) -> list[dict[str, Any]]:
        """The details of what lies directly in a folder, links followed; ``problem`` is set where one leads nowhere."""
        try:
            with os.scandir(folder or self.fs.root_marker) as entries:
                return [_details(folder, entry) for entry in entries]
        except NotADirectoryError as error:
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder") from error

    def has_empty_folder(self, path: str) -> bool:
        """Whether there is a folder."""
        return bool(self.fs.isdir(path))

    def read(self, path: str, uri: str, start: int, length: int | None, largest: int | None) -> bytes:
        """Like :meth:`Store.read`, at a tenth of the cost of fsspec's own, and a half of pathlib's."""
        # O_NONBLOCK: to open a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, "it is no regular file")
            size = max(status.st_size - start, 0) if length is None else length
            if length is None:
                require_within(size, uri, largest)
            content = os.pread(descriptor, size, start)
            while len(content) < size and (chunk := os.pread(descriptor, size - len(content), start + len(content))):
                content += chunk
            return content
        finally:
            os.close(descriptor)

    def write(self, path: str, data: bytes, before_commit: Callable[[], None]) -> None:
        """Write a temporary file, and rename it."""
        _write_and_rename(Path(path), io.BytesIO(data), before_commit)

    def upload(self, source: Path, path: str, before_commit: Callable[[], None]) -> None:
        """:meth:`write` of a local file's content."""
        with source.open("rb") as file:
            _write_and_rename(Path(path), file, before_commit)

    def read_versioned(self, path: str) -> Versioned | None:
        """Read a file and its version; None if there is none."""
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        return Versioned(data, hashlib.sha256(data).hexdigest())

    def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        """Write a file if it has this version, or does not exist for None; returns the new version, or None."""
        # Locked for a comparison and a rename only: a process that is stopped meanwhile blocks all others.
        with contextlib.ExitStack() as stack:

            def lock_and_compare() -> None:
                stack.enter_context(self.locked(path))
                if self._version(path) != version:
                    raise _VersionChanged

            try:
                self.write(path, data, lock_and_compare)
            except _VersionChanged:
                return None
        return hashlib.sha256(data).hexdigest()

    def remove_locked(self, path: str) -> None:
        """Delete a file and its lock file; called within :meth:`locked`."""
        Path(path).unlink()
        _lock_file(path).unlink(missing_ok=True)

    def conditional_write_weakness(self, path: str) -> str | None:
        """Limit of the protection by conditional writes, as a clause for a message; None: there is none."""
        kind = _mount_type(Path(path).resolve())
        if kind.startswith("fuse"):
            return f"locks on a {kind} mount are seen by processes of this machine only"
        with self._locked(path) as can_lock:
            return None if can_lock else f"files on this {kind} mount cannot be locked"

    @contextlib.contextmanager
    def locked(self, path: str) -> Iterator[None]:
        """Exclude other writers while the context lasts."""
        with self._locked(path):
            yield

    @contextlib.contextmanager
    def _locked(self, path: str) -> Iterator[bool]:
        """Hold the lock; yields whether the filesystem has locks at all."""
        # POSIX locks, since a forked child does not inherit them, and since NFS has them between machines.
        deadline, lock = time.monotonic() + LOCK_SECONDS, _lock_file(path)
        with in_process:
            while True:
                lock.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    can_lock = _try_lock(descriptor)
                    # Who deletes a file deletes its lock file: another one may lie there by now.
                    if can_lock is not False and _is_at_path(descriptor, lock):
                        yield can_lock is True
                        return
                finally:
                    os.close(descriptor)
                if time.monotonic() > deadline:
                    raise StorageOutage(
                        f"{path}: another process has held the lock {lock} for {LOCK_SECONDS:.0f} s. It may "
                        "be stopped (SIGSTOP): end it, or let it go on."
                    )
                time.sleep(0.02)


def _details(folder: str, entry: os.DirEntry[str]) -> dict[str, Any]:
    """Size and modification time as fsspec's ``info`` has them, which follows links; its ``ls`` does not."""
    details: dict[str, Any] = {"name": f"{folder}/{entry.name}", "type": "file"}
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM):
            raise
        return {**details, "problem": "broken links"}
    if stat.S_ISDIR(status.st_mode):
        if entry.is_symlink() and _is_above(status, folder):
            return {**details, "problem": "links to a folder that holds them"}
        return {**details, "type": "directory"}
    if not stat.S_ISREG(status.st_mode):
        return {**details, "problem": "devices, pipes and sockets"}
    return {**details, "size": status.st_size, "mtime": status.st_mtime}


def _is_above(status: os.stat_result, folder: str) -> bool:
    """Whether a directory is ``folder`` or lies on the path to it, which may go through links."""
    path = Path(folder or "/").absolute()
    return any(os.path.samestat(status, each.stat()) for each in (path, *path.parents))


def _lock_file(path: str) -> Path:
    return Path(path).with_name(f".{Path(path).name}.lock")


def _try_lock(descriptor: int) -> bool | None:
    """True: locked; False: another process holds the lock; None: the filesystem has no locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_at_path(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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


def _mount_type(path: Path) -> str:
    """Type of the filesystem that holds ``path``, by proc(5)'s mountinfo; "unknown" elsewhere than on Linux."""
    longest, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4])
            if path.is_relative_to(point) and len(point) >= len(longest):
                longest, kind = point, rest.split()[0]
    return kind
