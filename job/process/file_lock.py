"""Locks on open files, which the kernel drops with the process that holds them."""

from __future__ import annotations


def lock_exclusively(descriptor: int, *, wait: bool = True) -> None:
    """Lock an open file by flock(2); does nothing on a system that has no such locks.

    Args:
        descriptor: of the file.
        wait: for another process to release the lock.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the filesystem has no locks.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def has_locks() -> bool:
    """Whether this system can lock files."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return False
    return True
