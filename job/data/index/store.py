"""Index store: saved indexes beside the data and in run_dir, and copies of them on this node."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from job import storage
from job.data.index.access import Access, is_local_uri
from job.data.index.file import DamagedIndex, IndexInfo, load_index_info, read_index_file, verify_parts
from job.data.index.index import Index
from job.data.index.sources import INDEX_FILE, resolve
from job.errors import StorageError, StorageOutage
from job.storage.local_cache import locked, private_folder, read_small, report_disk_full, write_small

log = logging.getLogger(__name__)

VERIFIED_EACH_TIME = 16 << 20
"""Bytes of a local index below which to verify it costs less than to keep a record of it."""
SAMPLES_CHECKED = 32
"""Samples per part whose version is looked up to see whether a saved index is out of date."""


def is_fresh(uri: str, info: IndexInfo, indexes: Sequence[Index]) -> bool:
    """Whether the sources of an index have not changed, as far as some requests can tell.

    Archives and tables are compared by version, each once; of folders :data:`SAMPLES_CHECKED` samples per part are.
    Files that were added later are not noticed.

    Args:
        uri: of the index, for messages.
        info: of the index.
        indexes: its parts.
    """
    expected = {(source.uri, "", source.version): indexes[0].access for source in info.sources if source.version}
    for index in indexes:
        spread = np.linspace(0, len(index) - 1, min(SAMPLES_CHECKED, len(index)), dtype=np.int64)
        for sample in index.rows(spread.tolist()):
            if sample.offset < 0 and sample.version:
                expected[info.sources[sample.source].uri, sample.key, sample.version] = index.access
    with ThreadPoolExecutor(storage.LISTINGS_IN_FLIGHT) as pool:
        checked = pool.map(_has_version, expected.keys(), expected.values())
        changed = [source for source, same in checked if not same]
    if changed:
        log.warning("%s was made %s and is out of date: %s changed since", uri, info.created, changed[0])
    return not changed


def is_run_index_usable(uri: str, cache_dir: Path, request: dict[str, Any], roots: list[str], access: Access) -> bool:
    """Whether an earlier attempt of a run left its index undamaged, and the data has not changed since.

    A damaged one is made again: it follows from the data, and a run that resumes compares its fingerprint with that of
    the checkpoint.

    Args:
        uri: folder of the index in run_dir.
        request: options that it must have been made from.
        roots: URIs of the data on the command line: the index, which others may have written, must not read local
            files that they do not name.
        access: what it may name besides.

    Raises:
        DataError: it names something that must not be read, or a newer release wrote it.
    """
    if not storage.exists(storage.join(uri, INDEX_FILE)):
        return False
    try:
        folder = local_index(uri, cache_dir)
        info = load_index_info(folder)
        if info.request != request or not {"train", "val"} <= info.parts.keys() or not info.classes:
            raise DamagedIndex(f"{uri} was not made for this run's data.")
    except DamagedIndex as error:
        log.warning("the run's index is made again from the data: %s", error)
        return False
    local_roots = [root for root in roots if is_local_uri(root)]
    local = any(
        location.format.samples == "elsewhere"
        or location.is_saved_index
        or storage.exists(storage.join(location.index_uri, INDEX_FILE))
        for location in map(resolve, local_roots)
    )
    access.require_sources([source.uri for source in info.sources], uri, local=local)
    return is_fresh(uri, info, [Index(folder, part, access) for part in info.parts])


def local_index(uri: str, cache_dir: Path) -> Path:
    """The folder on this node that holds the index at ``uri``: where it lies, or a copy in the node's cache.

    Its files are verified once per node, not by each process.

    Raises:
        DataError: the index is damaged.
        StorageError: it is not there, or there is no room.
    """
    content = read_index_file(uri)
    info = IndexInfo.from_json(storage.join(uri, INDEX_FILE), content)
    local = storage.is_local(uri)
    if local and sum(part.bytes for part in info.parts.values()) < VERIFIED_EACH_TIME:
        verify_parts(_local_path(uri), info, uri)
        return _local_path(uri)
    digest = hashlib.sha256(content).hexdigest()[:32]
    copy = cache_dir / "index" / digest
    folder = _local_path(uri) if local else copy
    verified = copy.with_name(f"{digest}.verified")
    with report_disk_full(copy.parent, "keep the index"):
        private_folder(copy.parent)
        with locked(copy):
            if local or folder.exists():
                if read_small(verified) == (state := _state(folder, info)):
                    return folder
                if local:
                    verify_parts(folder, info, uri)
                    write_small(verified, state)
                    return folder
                log.warning("the local copy %s was changed and is downloaded again", folder)
            _download(uri, content, info, folder)
            write_small(verified, _state(folder, info))
    return folder


def fetch_index(uri: str, folder: Path) -> IndexInfo:
    """Copy the index at ``uri`` into the new local ``folder``, and verify it.

    Raises:
        DataError: the index is damaged.
        StorageError: it is not there, or there is no room.
    """
    content = read_index_file(uri)
    info = IndexInfo.from_json(storage.join(uri, INDEX_FILE), content)
    with report_disk_full(folder.parent, "keep the index"):
        _download(uri, content, info, folder)
    return info


def publish_index(folder: Path, uri: str, before_write: Callable[[], None] = storage.unconditionally) -> None:
    """Copy the local index to ``uri``; ``index.json`` comes last and makes it valid.

    Args:
        folder: of the local index.
        uri: of its copy.
        before_write: called immediately before each write; raises if this job may not write there.
    """
    for name in (*(f"{part}.arrow" for part in load_index_info(folder).parts), INDEX_FILE):
        storage.upload(folder / name, storage.join(uri, name), before_write)


def _download(uri: str, content: bytes, info: IndexInfo, folder: Path) -> None:
    """Copy an index and verify it; ``folder`` appears whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".index-", dir=folder.parent) as scratch:
        copy = private_folder(Path(scratch) / "copy")
        for name, part in info.parts.items():
            source, target = storage.join(uri, f"{name}.arrow"), copy / f"{name}.arrow"
            size = _size(uri, source)
            if size is not None and size != part.bytes:
                raise DamagedIndex(
                    f"{source} is damaged: {size:,} bytes, {part.bytes:,} in {INDEX_FILE}. Make it again by python -m "
                    "job index."
                )
            target.touch(mode=0o600)
            storage.download(source, target)
        verify_parts(copy, info, uri)
        (copy / INDEX_FILE).touch(mode=0o600)
        (copy / INDEX_FILE).write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        copy.replace(folder)


def _size(uri: str, part: str) -> int | None:
    try:
        size = storage.info(part).get("size")
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DamagedIndex(f"{uri} lacks {part}. Make the index again by python -m job index.") from error
        raise
    return size if isinstance(size, int) else None


def _local_path(uri: str) -> Path:
    return Path(storage.filesystem(uri)[1])


def _state(folder: Path, info: IndexInfo) -> bytes:
    """Digest that changes when a file of a local index is replaced or written to."""
    lines = [str(folder)]
    for name in info.parts:
        try:
            details = (folder / f"{name}.arrow").stat()
        except FileNotFoundError:
            return b""
        lines.append(f"{name} {details.st_size} {details.st_mtime_ns} {details.st_ctime_ns} {details.st_ino}")
    return "\n".join(lines).encode()


def _has_version(expected: tuple[str, str, int], access: Access) -> tuple[str, bool]:
    """The URI of an object ``(root, key, version)``, and whether it still has this version."""
    root, key, version = expected
    uri = storage.join(root, key) if key else root
    with access.guarded():
        try:
            details = storage.info_below(root, key) if key else storage.info(root)
            return uri, storage.version(details) == version
        except StorageOutage:
            raise
        except StorageError:
            return uri, False
