"""Local folders of the node's cache: locks, permissions, and errors of full disks."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from job.errors import DISK_FULL, StorageError
from job.process.file_lock import lock_exclusively

log = logging.getLogger(__name__)

_SMALL_FILE = 4096


@contextlib.contextmanager
def report_disk_full(folder: Path, purpose: str) -> Iterator[None]:
    """Name the option to change when ``folder`` cannot be written or its disk is full.

    Args:
        folder: that is written to.
        purpose: what for, as in "cannot keep the index in FOLDER".

    Raises:
        StorageError: in place of the OSError.
    """
    try:
        yield
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, StorageError) and getattr(cause, "errno", None) not in DISK_FULL:
            raise
        raise StorageError(
            f"cannot {purpose} in {folder}: {getattr(cause, 'strerror', None) or error}. Choose a writable place "
            "with enough room by --data.cache_dir."
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on the file ``path`` with ``.lock``; the kernel drops it with the process that holds it.

    Raises:
        OSError: the lock is a symbolic link or no regular file, or it cannot be opened.
    """
    file = open_regular(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT)
    try:
        lock_exclusively(file)
        yield
    finally:
        os.close(file)


def private_folder(folder: Path) -> Path:
    """Create ``folder`` if it is missing, and make it private to this user.

    Raises:
        OSError: it cannot be made, is a symbolic link, or belongs to another user.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    details = folder.lstat()
    if not stat.S_ISDIR(details.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder (symbolic links are not followed)", str(folder))
    if details.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, f"it belongs to user {details.st_uid}", str(folder))
    if details.st_mode & 0o077:
        folder.chmod(details.st_mode & 0o700)
    return folder


def read_small(path: Path) -> bytes | None:
    """The content of a regular file of at most 4 KiB; None where there is no such file."""
    try:
        file = open_regular(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        content = os.read(file, _SMALL_FILE + 1)
    except OSError:
        return None
    finally:
        os.close(file)
    return content if len(content) <= _SMALL_FILE else None


def write_small(path: Path, content: bytes) -> None:
    """Replace the file ``path``, or the link that lies there, whole or not at all; only its owner can read it."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def default_cache_dir() -> str:
    """``$XDG_CACHE_HOME/job``, or ``~/.cache/job``."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "job")


@functools.cache
def cache_problem(folder: Path) -> str | None:
    """Reason for which ``folder`` cannot be the node's cache, or None; creates it if it is missing.

    A folder that belongs to root is accepted: Kubernetes creates volumes so.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
        if owner not in (0, os.geteuid()):
            return f"it belongs to user {owner}, this process runs as user {os.geteuid()}"
        for name in ("archives", "index", "samples"):
            private_folder(folder / name)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        if error.errno in DISK_FULL:  # fails the run only where the space is needed; samples are then not cached
            return None
        return f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"


@functools.cache
def usable_cache_dir(folder: Path) -> Path:
    """``folder``, or, with one warning, a private temporary folder where it cannot be the node's cache."""
    problem = cache_problem(folder)
    if problem is None:
        return folder
    temporary = _temporary_cache_dir()
    log.warning(
        "%s cannot be the cache: %s. Samples and features are not cached; what must be copied to this node goes to "
        "%s. Choose a folder of your own by --data.cache_dir.",
        folder,
        problem,
        temporary,
    )
    return temporary


def _temporary_cache_dir() -> Path:
    """One folder for all processes of a user: ranks of a node share copies, and killed ones leave one folder behind."""
    shared = Path(tempfile.gettempdir()) / f"job-cache-{os.geteuid()}"
    try:
        return private_folder(shared)
    except OSError:  # it belongs to another user
        return Path(tempfile.mkdtemp(prefix="job-cache-"))


def open_regular(path: Path, flags: int) -> int:
    """Open a regular file, or create it with mode 0600; neither follows a link nor waits for a pipe.

    Raises:
        OSError: it is a symbolic link or no regular file, or it cannot be opened.
    """
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file
