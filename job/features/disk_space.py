"""Room for cached features on the node's disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from job.features.store import FOLDER


def make_room(cache_dir: Path, folders: set[Path], needed: int, max_bytes: int, limit: str) -> str | None:
    """Delete the least recently used features of others; returns the reason if that does not make enough room.

    Args:
        cache_dir: local folder of the node's cache.
        folders: of the features to keep.
        needed: bytes that these take in the end.
        max_bytes: that all features may take.
        limit: name of that limit, for the message.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    allowed = max_bytes - needed
    free = shutil.disk_usage(cache_dir).free + sum(map(_size, folders))
    if allowed < 0:
        return f"they need {needed / 1e9:.3g} GB, {limit} allows {max_bytes / 1e9:.3g}."
    if free < needed * 1.05:
        return f"they need {needed / 1e9:.3g} GB, and {cache_dir} has {free / 1e9:.3g} GB left."
    _remove_oldest(cache_dir / FOLDER, folders, allowed)
    return None


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, which other processes write and remove meanwhile."""
    size = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                size += file.stat().st_size
    return size


def _remove_oldest(root: Path, kept: set[Path], allowed: int) -> None:
    """Remove folders in ``root``, the least recently used first, until the others hold ``allowed`` bytes."""
    others: list[tuple[float, int, Path]] = []
    with contextlib.suppress(FileNotFoundError):
        for folder in root.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process removes it
                if folder in kept:
                    os.utime(folder)
                else:
                    others.append((folder.stat().st_mtime, _size(folder), folder))
    total = sum(size for _, size, _ in others)
    for _, size, folder in sorted(others):
        if total <= allowed:
            break
        total -= size
        shutil.rmtree(folder, ignore_errors=True)
