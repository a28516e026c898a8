"""Temporary folders that are deleted however a process ends, each with a record of its owner.

A folder ``job-KIND-XXXXXXXX`` in ``TMPDIR`` holds a file that its process keeps locked. The kernel drops the lock of a
killed process, so that :func:`delete_stale` of a later attempt deletes them, even from another container that shares
``TMPDIR``. A folder that :func:`keep` has marked stays until a person deletes it; the log of the next attempt names it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from pathlib import Path

from job.process.file_lock import has_locks, lock_exclusively

log = logging.getLogger(__name__)

OWNER = ".owner"
"""File in each folder that its process has locked."""

KEPT = ".kept"
"""File in a folder that must not be deleted; its text says why."""

LISTED = ".listed"
"""File in a kept folder that the log of a later attempt has named."""

_UNFINISHED = ".job-new-"
_UNFINISHED_SECONDS = 3600.0
"""Age of an unfinished folder at which its process is considered dead."""

_owned: dict[Path, tuple[int, int]] = {}
"""Process and descriptor of the lock by folder: a forked child has this dictionary, too, and owns nothing."""

_lock = threading.RLock()  # a signal handler may end the process while it is held


def folder(kind: str) -> Path:
    """Create a private folder (mode 0700) that exists as long as this process."""
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED))
    descriptor = os.open(unfinished / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # without locks delete_stale() leaves the folder alone
        lock_exclusively(descriptor)
    # Under its final name a folder is always locked by its owner or abandoned.
    final = unfinished.with_name(f"job-{kind}-{uuid.uuid4().hex[:8]}")
    unfinished.rename(final)
    with _lock:
        _owned[final] = (os.getpid(), descriptor)
    return final


def create_file(path: Path) -> Path:
    """Create an empty file that only this user may read (mode 0600)."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    return path


def keep(path: Path, reason: str) -> None:
    """Keep a folder after the end of the process, since a message has named it to the user."""
    create_file(path / KEPT).write_text(reason + "\n")
    _disown(path)


def remove(path: Path) -> None:
    """Delete a folder, unless it is kept."""
    if not (path / KEPT).exists():
        shutil.rmtree(path, ignore_errors=True)
    _disown(path)


def remove_all() -> None:
    """Delete all folders of this process; called before it ends, :func:`os._exit` included."""
    with _lock:
        paths = [path for path, (pid, _) in _owned.items() if pid == os.getpid()]
    for path in paths:
        remove(path)


def delete_stale() -> None:
    """Delete stale folders of killed processes, and list those that are kept, each once."""
    with contextlib.suppress(OSError):
        for path in sorted(Path(tempfile.gettempdir()).iterdir()):
            with contextlib.suppress(OSError):
                _delete_if_stale(path)


def _delete_if_stale(path: Path) -> None:
    if not path.name.startswith(("job-", _UNFINISHED)):
        return
    details = path.lstat()
    if not stat.S_ISDIR(details.st_mode) or details.st_uid != os.getuid():
        return
    if path.name.startswith(_UNFINISHED):
        if time.time() - details.st_mtime > _UNFINISHED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
        return
    if not has_locks():
        return  # the owner may be alive
    if (path / KEPT).exists():
        if not (path / LISTED).exists():
            reason = (path / KEPT).read_text().strip()
            log.warning("%s is kept: %s Delete it when it is no longer needed: it is not named again.", path, reason)
            create_file(path / LISTED)
        return
    descriptor = os.open(path / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        lock_exclusively(descriptor, wait=False)  # fails while its owner lives
        shutil.rmtree(path, ignore_errors=True)
        log.info("deleted %s, which a killed process had left", path)
    finally:
        os.close(descriptor)


def _disown(path: Path) -> None:
    with _lock:
        _, descriptor = _owned.pop(path, (0, None))
    if descriptor is not None:
        os.close(descriptor)


atexit.register(remove_all)
