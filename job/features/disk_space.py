"""Room for cached features on the node's disk."""

from __future__ import annotations

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
    return sum(file.stat().st_size for file in folder.glob("*")) if folder.is_dir() else 0


def _remove_oldest(root: Path, kept: set[Path], allowed: int) -> None:
    """Remove folders in ``root``, the least recently used first, until the others hold ``allowed`` bytes."""
    for folder in kept:
        if folder.is_dir():
            os.utime(folder)
    others = sorted((f for f in root.glob("*") if f not in kept), key=lambda folder: folder.stat().st_mtime)
    total = sum(_size(folder) for folder in others)
    for folder in others:
        if total <= allowed:
            break
        total -= _size(folder)
        shutil.rmtree(folder, ignore_errors=True)
