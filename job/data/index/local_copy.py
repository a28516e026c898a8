"""Copies on this node of archives that cannot be read in parts."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
from pathlib import Path

from job import storage
from job.data.index.access import Access
from job.data.index.bounded import compression_of, unpack
from job.data.index.embedded_images import extract_images
from job.data.index.sources.base import Source
from job.storage.local_cache import locked, private_folder, report_disk_full

log = logging.getLogger(__name__)


def materialise(source: Source, cache_dir: str, access: Access | None = None) -> str:
    """Make ``source`` readable in parts; returns its URI, or the path of its copy on this node.

    It is downloaded once per node (other processes wait for the first), and unpacked. Its size and, where
    the store reports one, checksum are verified, as is a compressed stream's own.

    Args:
        cache_dir: local folder of the node's cache.
        access: where it may be read from; default: anywhere.

    Raises:
        StorageError: the archive cannot be fetched, or there is no room for it.
        DataError: it is damaged.
    """
    if not source.whole:
        return source.uri
    place = hashlib.sha256("\0".join(filter(None, (source.uri, source.column))).encode()).hexdigest()[:8]
    name = f"{storage.basename(source.uri)}-{place}-{source.version:016x}"
    target = Path(cache_dir).expanduser() / "archives" / name
    with report_disk_full(target.parent, f"keep a copy of {source.uri}"):
        private_folder(target.parent)
        with locked(target), access.guarded() if access else contextlib.nullcontext():
            if not target.exists():
                _fetch(source, target)
    return str(target)


def _fetch(source: Source, target: Path) -> None:
    uri = source.uri
    # Written beside the target and renamed at the end: a killed process leaves no half of it.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        copy = Path(scratch) / "copy"
        log.info("fetching %s", uri)
        storage.download_verified(uri, copy)
        if compression_of(storage.basename(uri)):
            unpacked = Path(scratch) / "unpacked"
            unpack(uri, copy, unpacked)
            copy = unpacked
        if source.column:
            images = Path(scratch) / "images"
            extract_images(uri, copy, source.column, images)
            copy = images
        copy.chmod(0o600)
        copy.replace(target)
