"""Conditional writes on a disk: POSIX locks, which NFS has between machines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from fsspec import AbstractFileSystem

from job import storage
from job.errors import StorageOutage
from job.storage.conditional.base import Compared, Versioned, in_process

LOCK_SECONDS = 20.0
"""How long the lock of a file on a disk is waited for: it is held for a comparison and a rename."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class _Changed(Exception):
    """The object has another version than expected."""


class Disk(Compared):
    """A lock file beside the object, locked for the moment of a write; the lock of a killed process is gone."""

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        super().__init__(fs, path)
        self.lock = Path(path).with_name(f".{Path(path).name}.lock")
        self.can_lock = True

    def read(self) -> Versioned | None:
        """Read the object and its version; None if there is none."""
        try:
            data = Path(self.path).read_bytes()
        except FileNotFoundError:
            return None
        return Versioned(data, hashlib.sha256(data).hexdigest())

    def write(self, data: bytes, version: str | None) -> str | None:
        """Write it if it has this version; returns the new one, or None."""
        # Locked for a comparison and a rename only: a process that is stopped meanwhile blocks all others.
        with contextlib.ExitStack() as stack:

            def lock_and_compare() -> None:
                stack.enter_context(self.locked())
                current = self.read()
                if (None if current is None else current.version) != version:
                    raise _Changed

            try:
                storage.write_bytes(self.path, data, lock_and_compare)
            except _Changed:
                return None
        return hashlib.sha256(data).hexdigest()

    def delete(self) -> None:
        """Delete it and the file that was locked for it; called within :meth:`locked`."""
        Path(self.path).unlink()
        self.lock.unlink(missing_ok=True)

    def weakness(self) -> str | None:
        """What conditional writes do not protect from here; None: nothing."""
        kind = _mount_type(Path(self.path).resolve())
        if kind.startswith("fuse"):
            return f"locks on a {kind} mount are seen by processes of this machine only"
        with self.locked():
            return None if self.can_lock else f"files on this {kind} mount cannot be locked"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other writers while the context lasts."""
        # POSIX locks, since a forked child does not inherit them, and since NFS has them between machines.
        deadline = time.monotonic() + LOCK_SECONDS
        with in_process:
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
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4])
            if path.is_relative_to(point) and len(point) >= len(best):
                best, kind = point, rest.split()[0]
    return kind
