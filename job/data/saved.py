"""Indexes that were made before: beside the data, in run_dir, and copies of them on this node."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from job import storage
from job.data.index import Index, IndexInfo
from job.data.source import INDEX_FILE, is_saved_index, kind_of, locked, room_needed
from job.errors import StorageError, StorageOutage

log = logging.getLogger(__name__)

SAMPLES_CHECKED = 32
"""Samples whose version is looked up to see whether a saved index still tells the truth."""


def saved_index(uri: str) -> str:
    """Where ``job index`` keeps the index of ``uri``: within a folder, or beside an archive, shards or a manifest."""
    if is_saved_index(uri):
        return uri.removesuffix(f"/{INDEX_FILE}")
    if kind_of(uri) == "folder":
        return storage.join(uri, ".index")
    return f"{re.sub(r'[{}*?]', '_', uri)}.index"


def is_fresh(uri: str, info: IndexInfo, index: Index) -> bool:
    """Whether the sources still are what they were, as far as some requests can tell.

    Archives and manifests are compared by version; of folders :data:`SAMPLES_CHECKED` samples are.
    Files that came in since are not seen.
    """
    spread = np.linspace(0, len(index) - 1, min(SAMPLES_CHECKED, len(index)), dtype=np.int64)
    wanted = [(source.uri, source.version) for source in info.sources if source.version]
    for sample in (index[int(n)] for n in spread):
        if sample.offset < 0 and sample.version:
            wanted.append((storage.join(info.sources[sample.source].uri, sample.key), sample.version))
    with ThreadPoolExecutor(storage.LISTINGS_IN_FLIGHT) as pool:
        changed = [uri for uri, same in pool.map(_same_version, wanted) if not same]
    if changed:
        log.warning("%s was made %s and is out of date: %s changed since", uri, info.created, changed[0])
    return not changed


def local_index(uri: str, cache_dir: Path) -> Path:
    """The folder on this node that holds the index at ``uri``: where it lies, or a copy in the node's cache."""
    if storage.is_local(uri):
        return Path(uri.removeprefix("file://"))
    digest = hashlib.sha256(storage.read_bytes(storage.join(uri, INDEX_FILE))).hexdigest()[:16]
    fetch_index(uri, cache_dir / "index" / digest)
    return cache_dir / "index" / digest


def fetch_index(uri: str, folder: Path) -> IndexInfo:
    """Copy the index at ``uri`` into the local ``folder``, the same for all processes of a node.

    Raises:
        StorageError: it is not there, or there is no room.
    """
    with room_needed(folder.parent, "keep the index"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not (folder / INDEX_FILE).exists():
                info = IndexInfo.from_json(uri, storage.read_bytes(storage.join(uri, INDEX_FILE)))
                with tempfile.TemporaryDirectory(prefix=".index-", dir=folder.parent) as scratch:
                    for name in (*(f"{part}.arrow" for part in info.parts), INDEX_FILE):
                        storage.download(storage.join(uri, name), Path(scratch) / name)
                    shutil.rmtree(folder, ignore_errors=True)
                    shutil.copytree(scratch, folder)
    return IndexInfo.from_json(uri, (folder / INDEX_FILE).read_bytes())


def publish_index(folder: Path, uri: str) -> None:
    """Copy the local index to ``uri``; ``index.json`` comes last and makes it valid."""
    info = IndexInfo.from_json(str(folder), (folder / INDEX_FILE).read_bytes())
    for name in (*(f"{part}.arrow" for part in info.parts), INDEX_FILE):
        storage.upload(folder / name, storage.join(uri, name))


def _same_version(wanted: tuple[str, int]) -> tuple[str, bool]:
    uri, version = wanted
    try:
        return uri, storage.version(storage.info(uri)) == version
    except StorageOutage:
        raise
    except StorageError:
        return uri, False
